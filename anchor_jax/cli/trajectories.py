"""`anchor-jax trajectories`: writes a teacher's ODE trajectories."""

import os

from absl import flags

from anchor_jax import processes, tpu_hosts
from anchor_jax.cli import jobs
from anchor_jax.cli.output import to_stderr
from anchor_jax.config import define_config_flag
from anchor_jax.errors import Stopped, UserError

SUMMARY = "Write a teacher's ODE trajectories, from which a causal generator learns."
USAGE = """\
anchor-jax trajectories --config=configs/trajectories.py --config.weights=runs/teacher
anchor-jax trajectories --config=configs/trajectories.py:paper \\
    --config.weights=weights/wan --config.data.path=prompts.txt
anchor-jax trajectories --config=configs/trajectories.py --process=3 --processes=8
anchor-jax train --config=configs/train_ode.py:tiny --config.data.path=data/trajectories
The same command resumes a stopped run. Process p of n writes every n-th trajectory. All
processes write into one folder, and n may change between runs. The processes of a job
(--num_processes) share the work by themselves: give neither --process nor --processes.
One that is lost disturbs no other; its share is missing, and the status is 75."""

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags."""
    define_config_flag("configs/trajectories.py")
    jobs.define_flags()
    flags.DEFINE_integer(
        "process",
        None,
        "Zero-based index of this process, without a job. Default: its number in"
        " the job, or 0.",
        0,
    )
    flags.DEFINE_integer(
        "processes",
        None,
        "Number of processes that share the work. Default: those of the job, or 1.",
        1,
    )


def main(argv) -> None:
    """Runs the command.

    Raises:
      UserError: The config or a flag is wrong, or the folder holds other trajectories.
      Stopped: It stopped on request before the last trajectory.
    """
    del argv
    from anchor_jax.cli import compile_cache

    if FLAGS.process is None:
        jobs.join("trajectories")
        _check_count()
    else:
        tpu_hosts.separate(os.environ, tpu_hosts.chips_of_host())
    compile_cache.enable()
    if FLAGS.process is not None:
        tpu_hosts.check()
    from anchor_jax.training import ode, reports
    from anchor_jax.weights.load import load_bundle

    config = ode.read_config(FLAGS.config)
    bundle = load_bundle(config.weights, grid=config.size, dtype=config.dtype)
    if not FLAGS.process:
        own = [("config.negative_prompt", config.negative_prompt)]
        for line in reports.report_texts(config.data, bundle.tokenizer, own):
            to_stderr(line)
    process = processes.index() if FLAGS.process is None else FLAGS.process
    number = processes.count() if FLAGS.processes is None else FLAGS.processes
    count, missing = ode.write(config, bundle, process, number)
    if missing or not processes.is_joined():
        print(f"{count} trajectories written to {config.out}")
    else:
        print(f"All {config.count} trajectories are in {config.out}")
    if missing:
        raise Stopped(f"Stopped; {missing} are missing. Rerun this command to resume.")


def _check_count() -> None:
    """Raises UserError unless the job's processes share the work."""
    given, found = FLAGS.processes, processes.count()
    if processes.is_joined() and given not in (None, found):
        raise UserError(
            f"--processes={given}: the job has {found} processes, which share the work;"
            " leave --processes out"
        )
