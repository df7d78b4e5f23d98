"""`anchor-jax doctor`: reports this machine's hardware, expected speed and problems."""

import json

from absl import flags

from anchor_jax.cli import compile_cache

SUMMARY = "Show device, memory, kernels, missing packages, and expected speed."
USAGE = """\
anchor-jax doctor
anchor-jax doctor --weights=weights/anchor
anchor-jax doctor --json"""

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("weights", None, "Folder of weights to check. Default: none.")
    flags.DEFINE_bool("json", False, "Print one JSON object instead of text.")


def main(argv) -> None:
    """Runs the command."""
    del argv
    from anchor_jax import machine

    report = machine.examine(FLAGS.weights, compile_cache.enable())
    if FLAGS.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(machine.lines(report)))
