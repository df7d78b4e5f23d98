"""Stand-ins for the programs of platforms, which record how they were called."""

import contextlib
import importlib
import io
import os
import pathlib
import subprocess
import sys
import types

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
PROGRAMS = ("sbatch", "kubectl", "xpk", "gcloud", "ssh", "rm", "env")
# Writes its name, arguments and standard input, each with a zero byte behind it.
RECORDER = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"
  [[ -t 0 ]] || cat
  printf '\\0\\n'
} >> "$STAND_IN_LOG"
"""


@pytest.fixture(scope="session", autouse=True)
def _launchers_are_importable():
    sys.path.insert(0, str(LAUNCH))
    yield
    sys.path.remove(str(LAUNCH))


@pytest.fixture
def launcher():
    """Returns a module of the launchers by its name."""
    return importlib.import_module


class Launch:
    """Runs `cluster.py`, or a script, with stand-ins for the platforms' programs."""

    def __init__(self, folder, monkeypatch):
        self.log = folder / "calls"
        self.folder = folder / "bin"
        self.folder.mkdir()
        for name in PROGRAMS:
            self.install(name, RECORDER)
        path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
        monkeypatch.setenv("PATH", path)
        monkeypatch.setenv("HOME", str(folder))
        monkeypatch.setenv("STAND_IN_LOG", str(self.log))

    def install(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def script(self, text):
        """Runs a shell script."""
        return subprocess.run(
            ["/bin/bash", "-c", text],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def cluster(self, *arguments):
        """Runs `cluster.py` in this process."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = importlib.import_module("cluster").main(arguments)
            except SystemExit as end:
                status = end.code
        return types.SimpleNamespace(
            returncode=status, stdout=out.getvalue(), stderr=err.getvalue()
        )

    def calls(self):
        """Returns the calls since the last time: the words, then the input."""
        if not self.log.exists():
            return []
        found = self.log.read_text().split("\0\n")[:-1]
        self.log.unlink()
        return [call.split("\0") for call in found]


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """A folder of stand-ins."""
    return Launch(tmp_path, monkeypatch)
