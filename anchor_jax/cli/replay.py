"""`anchor-jax replay`: makes a video again, or changes its prompt at a frame."""

import dataclasses
import pathlib
from collections.abc import Sequence

from absl import flags

from anchor_jax.cli import compile_cache
from anchor_jax.cli.output import to_stderr
from anchor_jax.errors import UserError
from anchor_jax.io import expand

SUMMARY = (
    "Make a video again from its recipe and compare it, or continue from one of its"
    " frames with another prompt."
)
USAGE = """
anchor-jax replay out/first/000.json
anchor-jax replay out/first/000.json --check
anchor-jax replay out/first/000.json --check --until=4
anchor-jax replay out/first/000.json --at=20 --prompt="a blue ring moves up"

# Without --check a video is written to --out (default: a new folder out/<time>). With
# --check alone nothing is written. The recipe holds a digest of every block, and each
# block is compared. Differences between then and now (versions, device, weights) are
# listed first. Blocks are bit-identical only if no differences are listed. With --check
# the exit status is 1 if a block differs although no differences are listed.
# For safety, paths in recipes are ignored: give the folder of weights with --weights.
"""
ARGUMENTS = "RECIPE.json"


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string(
        "out", None, "Folder for the video. Default: a new folder out/<time>."
    )
    flags.DEFINE_bool("check", False, "Compare only, and fail if a block differs.")
    flags.DEFINE_string(
        "weights",
        None,
        "'tiny', or a folder with weights. Needed unless the recipe used 'tiny'.",
    )
    flags.DEFINE_integer("until", None, "Number of blocks to make. Default: all.")
    flags.DEFINE_integer("at", None, "Latent frame at which to switch to --prompt.")
    flags.DEFINE_string("prompt", None, "Prompt from latent frame --at.")
    flags.DEFINE_integer(
        "frames",
        None,
        "Length of a video with --at, in latent frames. Default: the recipe's.",
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns 1 if a block differs unexpectedly.

    Raises:
      UserError: The recipe or a flag is wrong, or the weights are not the recipe's.
    """
    path = _recipe_path(argv)
    from anchor_jax.sampling import replay
    from anchor_jax.streaming.recipe import load_recipe

    names = [field.name for field in dataclasses.fields(replay.ReplayOptions)]
    options = replay.ReplayOptions(
        **{name: getattr(flags.FLAGS, name) for name in names}
    )
    stored = load_recipe(path)
    compile_cache.enable()
    made = replay.replay(stored, path, options, tell=to_stderr)
    for line in made.lines:
        print(line)
    return int(options.check and not made.same and not made.changed)


def _recipe_path(argv: Sequence[str]) -> pathlib.Path:
    if len(argv) != 2:
        raise UserError(
            f"replay: got {len(argv) - 1} files, expected one recipe; give the .json"
            " beside a video"
        )
    path = expand(argv[1])
    what = {".mp4": "a video", ".png": "an image"}.get(path.suffix.lower())
    if what:
        raise UserError(
            f"{path.name} is {what}; give the recipe beside it,"
            f" {path.with_suffix('.json').name}"
        )
    return path
