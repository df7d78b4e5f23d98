"""`anchor-jax trajectories`: writes a teacher's ODE trajectories."""

from absl import flags

from anchor_jax.cli import jobs
from anchor_jax.cli.output import to_stderr
from anchor_jax.config import define_config_flag
from anchor_jax.errors import Stopped

SUMMARY = "Write a teacher's ODE trajectories, from which a causal generator learns."
USAGE = """\
anchor-jax trajectories --config=configs/trajectories.py --config.weights=runs/teacher
anchor-jax trajectories --config=configs/trajectories.py:paper \\
    --config.weights=weights/wan --config.data.path=prompts.txt
anchor-jax trajectories --config=configs/trajectories.py --process=3 --processes=8
anchor-jax train --config=configs/train_ode.py:tiny --config.data.path=data/trajectories
The same command resumes a stopped run. Process p of n writes every n-th trajectory. All
processes write into one folder, and n may change between runs."""

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    define_config_flag("configs/trajectories.py")
    jobs.define_flags()
    flags.DEFINE_integer(
        "process",
        None,
        "Zero-based index of this process. Default: jax.process_index().",
        0,
    )
    flags.DEFINE_integer(
        "processes", None, "Number of processes. Default: jax.process_count().", 1
    )


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: The config is wrong, or the folder holds other trajectories.
      Stopped: It stopped on request before the last trajectory.
    """
    del argv
    from anchor_jax.cli import compile_cache

    if FLAGS.process is None:
        jobs.join("trajectories")
    compile_cache.enable()
    import jax

    from anchor_jax.training import ode, reports
    from anchor_jax.weights.load import load_bundle

    config = ode.read_config(FLAGS.config)
    bundle = load_bundle(config.weights, grid=config.size, dtype=config.dtype)
    if not FLAGS.process:
        own = [("config.negative_prompt", config.negative_prompt)]
        for line in reports.report_texts(config.data, bundle.tokenizer, own):
            to_stderr(line)
    process = jax.process_index() if FLAGS.process is None else FLAGS.process
    processes = jax.process_count() if FLAGS.processes is None else FLAGS.processes
    count, missing = ode.write(config, bundle, process, processes)
    print(f"{count} trajectories written to {config.out}")
    if missing:
        raise Stopped(f"Stopped; {missing} are missing. Rerun this command to resume.")
