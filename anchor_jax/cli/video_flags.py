"""Flags of the commands that make videos from a sampling config."""

from absl import flags

from anchor_jax import config as configs

EXCLUSIVE = (
    ("prompt", "prompt_file"),
    ("sampler.negative_prompt", "sampler.negative_prompt_file"),
)
"""Pairs of config fields of which only one can be given."""


def define() -> None:
    """Defines `--config`, `--out` and `--overwrite`."""
    configs.define_config_flag()
    flags.DEFINE_string(
        "out",
        None,
        "Folder for the videos. Default: config.out, or a new folder out/<time>.",
    )
    flags.DEFINE_bool("overwrite", False, "Replace files that another recipe made.")
