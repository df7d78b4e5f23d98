"""Prints lines that are not a command's result."""

import sys

from anchor_jax import processes


def to_stderr(line: str) -> None:
    """Prints a line on standard error, in one process of a job."""
    if processes.is_printing():
        print(line, file=sys.stderr)


def own_line(line: str) -> None:
    """Prints a line about this process; in a job on standard error, with its name."""
    if processes.is_joined():
        print(f"{processes.name()}: {line}", file=sys.stderr)
    else:
        print(line)
