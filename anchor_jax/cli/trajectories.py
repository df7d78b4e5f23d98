"""`anchor-jax trajectories`: a teacher's ways from noise to clips."""

import sys

from absl import flags

from anchor_jax.config import define_config_flag
from anchor_jax.errors import Stopped

SUMMARY = "Write a teacher's trajectories, which a causal generator then regresses."
USAGE = """\
anchor-jax trajectories --config=configs/trajectories.py --config.weights=runs/teacher
anchor-jax trajectories --config=configs/trajectories.py:paper \\
    --config.weights=weights/wan --config.data.path=prompts.txt
anchor-jax trajectories --config=configs/trajectories.py --process=3 --processes=8
anchor-jax train --config=configs/train_ode.py:tiny --config.data.path=data/trajectories
The same command goes on where it was ended. Process p of n writes every n-th
trajectory; all of them write into one folder, and their number may change."""

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    define_config_flag("configs/trajectories.py")
    flags.DEFINE_integer(
        "process", None, "This process, from 0; else of this cluster, 0 of 1 alone.", 0
    )
    flags.DEFINE_integer(
        "processes", None, "Of all; else of this cluster, 0 of 1 alone.", 1
    )


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: The config is wrong, or the folder holds other trajectories.
      Stopped: It was asked to, before its end.
    """
    del argv
    from anchor_jax.cli import compile_cache

    compile_cache.enable()
    import jax

    from anchor_jax.experiment import parse_size
    from anchor_jax.training import ode, reports
    from anchor_jax.weights.load import load_bundle

    config = ode.read_config(FLAGS.config)
    size = None if config.size is None else parse_size(config.size)
    bundle = load_bundle(config.weights, grid=size, dtype=config.dtype)
    if not FLAGS.process:
        own = [("config.negative_prompt", config.negative_prompt)]
        for line in reports.report_texts(config.data, bundle.tokenizer, own):
            print(line, file=sys.stderr)
    process = jax.process_index() if FLAGS.process is None else FLAGS.process
    processes = jax.process_count() if FLAGS.processes is None else FLAGS.processes
    count, missing = ode.write(config, bundle, process, processes)
    print(f"{count} trajectories written to {config.out}")
    if missing:
        raise Stopped(f"stopped; {missing} are missing, and the same command goes on")
