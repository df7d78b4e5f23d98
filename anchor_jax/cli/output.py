"""Prints lines that are not a command's result."""

import sys


def to_stderr(line: str) -> None:
    """Prints a line on standard error."""
    print(line, file=sys.stderr)
