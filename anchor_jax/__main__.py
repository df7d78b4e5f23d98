"""Runs the command line: `python -m anchor_jax COMMAND [flags]`."""

import sys

from anchor_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
