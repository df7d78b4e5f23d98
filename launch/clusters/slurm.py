"""Slurm: submits `slurm.sbatch`, which runs one task per GPU or per node."""

import argparse
import pathlib

from clusters import values
from clusters.steps import Step

SUMMARY = "submit a job to Slurm"
MOST_GRACE = 65535
SCRIPT = pathlib.Path(__file__).with_name("slurm.sbatch")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the launcher's flags."""
    parser.add_argument("--name", type=values.word, default="anchor-jax")
    parser.add_argument("--nodes", type=values.count, required=True)
    parser.add_argument(
        "--gpus", type=values.count, default=8, help="of each node; default 8"
    )
    parser.add_argument(
        "--task_per",
        choices=("gpu", "node"),
        default="gpu",
        help="one task for each GPU, or for each node; default gpu",
    )
    parser.add_argument("--time", type=values.time, default="24:00:00")
    parser.add_argument(
        "--grace",
        type=values.count,
        default=300,
        help="seconds before the time limit at which tasks save and leave; default 300",
    )
    parser.add_argument("--partition", type=values.word)
    parser.add_argument("--account", type=values.word)
    parser.add_argument(
        "--sbatch",
        type=values.option,
        action="append",
        default=[],
        help="another option of sbatch, such as --sbatch=--constraint=ib; repeatable",
    )


def steps(given: argparse.Namespace, job: list[str]) -> list[Step]:
    """Returns the command that submits the job; raises ValueError for a bad grace."""
    _check_grace(given)
    tasks = given.gpus if given.task_per == "gpu" else 1
    line = [
        "sbatch",
        f"--job-name={given.name}",
        f"--nodes={given.nodes}",
        f"--gpus-per-node={given.gpus}",
        f"--ntasks-per-node={tasks}",
        f"--time={given.time}",
        f"--signal=TERM@{given.grace}",
    ]
    for field in ("partition", "account"):
        if getattr(given, field):
            line.append(f"--{field}={getattr(given, field)}")
    return [Step((*line, *given.sbatch, str(SCRIPT), *job))]


def _check_grace(given: argparse.Namespace) -> None:
    """Raises ValueError unless Slurm sends the signal within the job's time."""
    limit = values.seconds(given.time)
    if given.grace > MOST_GRACE or (limit and given.grace >= limit):
        raise ValueError(
            f"--grace={given.grace} must be below the {limit} seconds of"
            f" --time={given.time}, and at most {MOST_GRACE}; example: --grace=300"
            " --time=24:00:00"
        )
