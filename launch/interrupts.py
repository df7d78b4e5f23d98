"""Presses Ctrl-C at random moments of sample and train, and checks how they stop.

    python launch/interrupts.py [--presses=60] [--seed=0] [--folder=FOLDER]

Both commands run on the tiny model, alternately with and without compiled programs of
an earlier run. The moments are spread over a whole run, from the start of Python:
importing, loading, compiling, streaming, saving. Each press must end the command with
status 130 within --limit seconds and without a traceback, and leave nothing incomplete:
no temporary file or folder, no video without its recipe, no checkpoint that is not
whole, no lease. Every --again-th command is then run again, and must work. Prints a
line for each press and a summary; the status is 1 if anything failed.
"""

import argparse
import dataclasses
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

SHORT = (
    "--config.weights=tiny",
    "--config.steps=40",
    "--config.batch=2",
    "--config.save_every=10",
    "--config.sample_every=20",
    "--config.samples.num=1",
    "--config.samples.frames=6",
    "--config.regression.blocks=2",
    "--config.data.size=16",
)
PROMPT = "--config.prompt=a red ring moves up on gray[2s] | a blue ring[2s]"
COMMANDS = {
    "sample": ("sample", "--config=tiny", PROMPT, "--out={out}"),
    "train": ("train", "--config=train_teacher", "--config.out={out}", *SHORT),
}
HALF_MADE = ("*.part*", "*orbax-checkpoint-tmp*", ".owner", ".*.owner")
WHOLE = "_CHECKPOINT_METADATA"  # the last file that Orbax writes
TRIES = 20


@dataclasses.dataclass(frozen=True)
class Case:
    """A command in folders of its own.

    Attributes:
      name: name of the command.
      folder: folder of its results.
      cache: cache of compiled programs.
    """

    name: str
    folder: pathlib.Path
    cache: pathlib.Path

    @property
    def out(self) -> pathlib.Path:
        return self.folder / "out"

    @property
    def temporary(self) -> pathlib.Path:
        return self.folder / "tmp"

    def start(self) -> subprocess.Popen:
        """Starts the command."""
        self.temporary.mkdir(parents=True, exist_ok=True)
        words = [word.format(out=self.out) for word in COMMANDS[self.name]]
        return subprocess.Popen(
            [sys.executable, "-m", "anchor_jax", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "ANCHOR_JAX_CACHE": str(self.cache),
                "TMPDIR": str(self.temporary),
            },
        )

    def finish(self) -> float:
        """Runs the command to the end, and returns the seconds."""
        began = time.monotonic()
        process = self.start()
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"status {process.returncode}: {output[-2000:]}")
        return time.monotonic() - began

    def incomplete_files(self) -> list[str]:
        """Returns the files that should not exist."""
        found = [
            path
            for pattern in HALF_MADE
            for place in (self.folder, self.cache)
            for path in place.rglob(pattern)
        ]
        found += list(self.temporary.iterdir())
        found += [one for one in self.cache.rglob("*") if not _is_filled(one)]
        if self.name == "sample":
            videos = self.out.rglob("*.mp4")
            found += [one for one in videos if not one.with_suffix(".json").exists()]
        steps = (one for one in self.out.glob("[0-9]*") if one.is_dir())
        found += [one for one in steps if not (one / WHOLE).exists()]
        return sorted({path.name for path in found})


def _is_filled(path: pathlib.Path) -> bool:
    return path.is_dir() or path.stat().st_size > 0


def press(case: Case, moment: float, limit: float) -> list[str] | None:
    """Presses once, and returns the faults, or None if the command had ended."""
    process = case.start()
    time.sleep(moment)
    if process.poll() is not None:
        process.communicate()
        return None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=4 * limit)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    seconds = time.monotonic() - began
    wrong = []
    if process.returncode != 130:
        wrong.append(f"status {process.returncode}")
    if seconds > limit:
        wrong.append(f"{seconds:.1f} s")
    if "Traceback" in output:
        wrong.append(f"a traceback: {output[-600:]}")
    left = case.incomplete_files()
    if left:
        wrong.append(f"left: {', '.join(left)}")
    last = (output.strip().splitlines() or [""])[-1]
    sys.stdout.write(
        f"{case.name}, {case.cache.name} cache, at {moment:.2f} s: ended after"
        f" {seconds:.2f} s, {last[-60:]!r}: {'; '.join(wrong) or 'ok'}\n"
    )
    sys.stdout.flush()
    return wrong


def seconds_of(folder: pathlib.Path) -> dict[tuple[str, str], float]:
    """Returns the seconds of whole runs by command and cache; fills the warm cache."""
    found = {}
    for name in COMMANDS:
        for cache in ("cold", "warm"):
            case = Case(name, folder / f"{name}-{cache}", folder / "warm")
            found[name, cache] = case.finish()
            shutil.rmtree(case.folder)
    return found


def begin_of_python() -> float:
    """Returns the start-up seconds of an interpreter, which handles no presses."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.monotonic() - began


def endure(folder: pathlib.Path, given: argparse.Namespace) -> int:
    """Presses the given number of times, and returns the number of failures."""
    earliest, durations = begin_of_python() + 0.1, seconds_of(folder)
    rounds = [(name, cache) for cache in ("warm", "cold") for name in COMMANDS]
    failed = 0
    for number in range(given.presses):
        name, cache = rounds[number % len(rounds)]
        for _ in range(TRIES):
            case = Case(name, folder / "run", folder / cache)
            shutil.rmtree(case.folder, ignore_errors=True)
            if cache == "cold":
                shutil.rmtree(case.cache, ignore_errors=True)
            case.cache.mkdir(mode=0o700, exist_ok=True)
            moment = random.uniform(earliest, durations[name, cache])
            wrong = press(case, moment, given.limit)
            if wrong is not None:
                break
        else:
            raise RuntimeError(f"{name} ends sooner than measured")
        if number % given.again == 0:
            seconds = case.finish()
            sys.stdout.write(f"  the same command again: done in {seconds:.1f} s\n")
            wrong += case.incomplete_files()
        failed += bool(wrong)
    return failed


def main() -> int:
    """Runs all and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presses", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--limit", type=float, default=5.0, help="seconds")
    parser.add_argument("--again", type=int, default=10)
    parser.add_argument("--folder", type=pathlib.Path, help="folder for the results")
    given = parser.parse_args()
    random.seed(given.seed)
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        failed = endure(pathlib.Path(folder), given)
    sys.stdout.write(f"{given.presses} presses, {failed} failed\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
