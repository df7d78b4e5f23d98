"""Runs the command line: `python -m anchor_jax COMMAND [flags]`."""

import sys

from anchor_jax import interrupts
from anchor_jax.cli import jobs


def main() -> int:
    """Runs the command line of this process and returns its exit status."""
    jobs.supervise(sys.argv[1:])
    # Before imports that take long.
    interrupts.install()
    from anchor_jax.cli import main as cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
