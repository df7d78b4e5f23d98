"""Steps: commands that a launcher runs, or shows as a script that does the same."""

import dataclasses
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterable

_END = "END_OF_FILE"


@dataclasses.dataclass(frozen=True)
class Step:
    """A command. Its standard input is `text`, or `file`, or that of the launcher."""

    argv: tuple[str, ...]
    text: str = ""
    file: pathlib.Path | None = None

    def shown(self) -> str:
        """Returns the lines of a shell script that run this command."""
        line = shlex.join(self.argv)
        if self.file is not None:
            return f"{line} < {shlex.quote(str(self.file))}"
        return f"{line} << '{_END}'\n{self.text}{_END}" if self.text else line

    def run(self) -> int:
        """Runs the command and returns its exit status; 127 if it is not installed."""
        given = self.file.read_text() if self.file else self.text or None
        try:
            return subprocess.run(self.argv, input=given, text=True).returncode
        except FileNotFoundError:
            sys.stderr.write(f"error: {self.argv[0]} is not installed on this host\n")
            return 127


def carry_out(steps: Iterable[Step], dry_run: bool) -> int:
    """Runs steps in order, up to the first that fails, and returns the exit status.

    Args:
      steps: what to run.
      dry_run: whether to print them as a script instead.
    """
    if dry_run:
        sys.stdout.write("set -e\n")
    for step in steps:
        if dry_run:
            sys.stdout.write(step.shown() + "\n")
        elif status := step.run():
            return status
    return 0
