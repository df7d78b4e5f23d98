"""`anchor-jax compare`: the same prompts under several policies, side by side."""

from collections.abc import Sequence

from absl import flags

from anchor_jax.cli import compile_cache, video_flags
from anchor_jax.cli.output import to_stderr

SUMMARY = "Make the same videos under several policies, side by side in one MP4."
USAGE = """
anchor-jax compare --config=configs/tiny.py \\
    --policies=anchor_forcing,longlive,self_forcing_rolling \\
    --config.prompt="a red ring moves up on gray[4s] | it moves left on gray[6s]"
anchor-jax compare --config=configs/interactive.py --config.weights=FOLDER \\
    --config.prompt_file=prompts.txt --policies=anchor_forcing,no_recache --out=out/ab

# All policies get the same prompts, seed, weights and noise levels; only the policy
# changes. anchor-jax policies lists the policies. anchor-jax sample --help explains the
# config fields and the prompts.
# OUT/000.mp4 shows the policies side by side, with the name of each above it.
# OUT/000.png is a contact sheet with one row of frames per policy. OUT/POLICY has the
# video, contact sheet and recipe of each policy; anchor-jax replay OUT/POLICY/000.json
# makes a video again.
# If you repeat a command with the same --out, finished videos are skipped. Files of
# another recipe are replaced only with --overwrite.
"""

EXCLUSIVE = video_flags.EXCLUSIVE


def define_flags() -> None:
    """Defines the command's flags."""
    video_flags.define()
    flags.DEFINE_list(
        "policies",
        [],
        "Names of at least two policies, with commas. They replace config.policy.",
    )


def main(argv: Sequence[str]) -> None:
    """Runs the command.

    Raises:
      UserError: An input is wrong, and nothing has been written.
    """
    del argv
    cache = compile_cache.enable()
    from anchor_jax.sampling import compare

    given = flags.FLAGS
    lines = compare.compare(
        given.config,
        given.policies,
        given.out,
        given.overwrite,
        cache=cache,
        tell=to_stderr,
    )
    for line in lines:
        print(line)
