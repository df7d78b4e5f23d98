"""Starts an anchor-jax command on a cluster.

    python launch/cluster.py slurm --nodes=7 -- train --config=train_dmd ...
    python launch/cluster.py gke run --name=dmd --topology=h100:7x8 ... -- train ...
    python launch/cluster.py tpu run --name=dmd --zone=us-east5-a -- train ...
    python launch/cluster.py ssh run --hosts=alpha,beta -- train ...

Everything after -- is the command and its flags. --dry_run prints a script that does
the same, and runs nothing. It needs Python 3.11 and the platform's own programs
(sbatch, kubectl, xpk, gcloud, ssh), and not this package.
"""

import argparse
import sys
from collections.abc import Sequence

from clusters import gke, slurm, ssh, steps, tpu_vm, values

PLATFORMS = {"slurm": slurm, "gke": gke, "tpu": tpu_vm, "ssh": ssh}


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of everything before `--`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    platforms = parser.add_subparsers(dest="platform", required=True)
    for name, module in PLATFORMS.items():
        platform = platforms.add_parser(name, help=module.SUMMARY, allow_abbrev=False)
        platform.add_argument("--dry_run", action="store_true")
        module.add_flags(platform)
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs a command line and returns its exit status; 2 for a mistake in it."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    parser = make_parser()
    given = parser.parse_args(argv[:end])
    runs = getattr(given, "action", "run") in ("run", "xpk")
    try:
        if not runs and argv[end:]:
            raise ValueError(f"`{given.action}` takes no command after --; remove it")
        job = values.job(argv[end + 1 :]) if runs else []
        found = PLATFORMS[given.platform].steps(given, job)
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    return steps.carry_out(found, given.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
