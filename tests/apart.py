"""Programs that run in a process of their own, to compile for a TPU."""

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parent


def compile_apart(program):
    """Returns the end of a program that compiles for a TPU, with its output."""
    # The TPU's compiler knows other flags than the CPU's.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS), str(TESTS / "perf"), *filter(None, [env.get("PYTHONPATH")])]
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
