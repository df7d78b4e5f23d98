"""Kills processes of one `anchor-jax sample` at random, until all videos exist.

    python launch/kill_samples.py [--videos=30] [--processes=3] [--starts=6] ...

Every process is started by the command's own flags, on one simulated CPU device. In
each of the first --starts starts, each process is killed (SIGKILL, of it or of its
child) with a chance of 2 in 3, at a random moment after the job has started; the number
of processes varies. Then the same command is started once more, undisturbed. Checks:

* Each video is made once: the files of a finished video never change again.
* Processes that were not killed finish their shares, and end with 75, or with 0 if no
  video is missing.
* At the end, all videos exist, the manifest lists each as finished, nothing else is in
  the folder, and every video has the digest that one process alone gives it.

Prints a line for each start and a summary; the status is 1 if anything failed.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from kill_processes import AGAIN, family, start

from anchor_jax.sampling.manifest import FINISHED, NAME

SUFFIXES = ("mp4", "png", "json")
OPTIONS = ("--config=tiny", "--config.sampler.steps=(1000, 500)")
STUCK = 1200  # seconds after which a start counts as hanging
CHANCE = 2 / 3


@dataclasses.dataclass(frozen=True)
class Batch:
    """The videos of one command.

    Attributes:
      folder: folder of the videos and of the other files of this program.
      count: number of videos.
    """

    folder: pathlib.Path
    count: int

    @property
    def prompts(self) -> pathlib.Path:
        """The file of the prompts."""
        return self.folder / "prompts.jsonl"

    def write_prompts(self) -> None:
        """Writes the file of the prompts, each of 10 seconds, with its own seed."""
        lines = [
            {"prompt": "a red ring moves up on gray", "durations": [10], "seed": number}
            for number in range(self.count)
        ]
        self.prompts.write_text("".join(f"{json.dumps(one)}\n" for one in lines))

    def start(self, out: pathlib.Path, count: int) -> list[subprocess.Popen]:
        """Starts a number of processes, which write into a folder."""
        line = [sys.executable, "-m", "anchor_jax", "sample", *OPTIONS, f"--out={out}"]
        line.append(f"--config.prompt_file={self.prompts}")
        return start(line, count, self.output, self.environment())

    def output(self, number: int) -> pathlib.Path:
        """Returns the file of what a process prints."""
        return self.folder / f"output-{number}.txt"

    def environment(self) -> dict[str, str]:
        """Returns variables: one CPU device a process, and a cache of programs."""
        return os.environ | {
            "ANCHOR_JAX_CACHE": str(self.folder / "cache"),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
        }

    def made(self, out: pathlib.Path) -> dict[str, list[tuple[int, int]]]:
        """Returns inode and time of the files of each finished video, by its name."""
        found = {}
        for number in range(self.count):
            files = [out / f"{number:03d}.{suffix}" for suffix in SUFFIXES]
            if all(one.exists() for one in files):
                stats = [one.stat() for one in files]
                found[files[0].stem] = [(one.st_ino, one.st_mtime_ns) for one in stats]
        return found


def disturb(
    batch: Batch, out: pathlib.Path, running: list[subprocess.Popen], seconds: float
) -> list[int]:
    """Kills some processes while they work; returns their numbers."""
    before = len(batch.made(out))
    began = time.monotonic()
    while (
        len(batch.made(out)) == before
        and any(one.poll() is None for one in running)
        and time.monotonic() < began + STUCK
    ):
        time.sleep(0.05)
    chosen = [n for n in range(len(running)) if random.random() < CHANCE]
    moments = sorted((random.uniform(0, seconds), number) for number in chosen)
    began, killed = time.monotonic(), []
    for moment, number in moments:
        time.sleep(max(0, began + moment - time.monotonic()))
        if running[number].poll() is None:
            os.kill(random.choice(family(running[number].pid)), signal.SIGKILL)
            killed.append(number)
    return killed


def finish(running: list[subprocess.Popen]) -> list[int]:
    """Returns the statuses of all processes; kills those that hang."""
    deadline = time.monotonic() + STUCK
    for one in running:
        try:
            one.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            for pid in family(one.pid):
                os.kill(pid, signal.SIGKILL)
            one.wait()
    return [one.returncode for one in running]


def once(
    batch: Batch, out: pathlib.Path, count: int, seconds: float | None
) -> tuple[dict, list[str]]:
    """Starts all processes, disturbs them, and returns what happened, and the faults.

    Args:
      batch: the videos.
      out: their folder.
      count: number of processes.
      seconds: time in which processes are killed; None kills none.
    """
    before, began = batch.made(out), time.monotonic()
    running = batch.start(out, count)
    killed = [] if seconds is None else disturb(batch, out, running, seconds)
    statuses = finish(running)
    after = batch.made(out)
    found = [f"{name} was made twice" for name in before if after[name] != before[name]]
    rest = {n: status for n, status in enumerate(statuses) if n not in killed}
    expected = 0 if len(after) == batch.count else AGAIN
    wrong = {n: status for n, status in rest.items() if status != expected}
    if wrong:
        printed = batch.output(min(wrong)).read_text(errors="replace")[-1000:]
        found.append(f"statuses {wrong}, expected {expected}: {printed}")
    absent = {int(n) for n in range(batch.count) if f"{n:03d}" not in after}
    left = {n % count for n in absent} - set(killed)
    if left:
        found.append(f"processes {sorted(left)} were not killed, but left videos out")
    event = {
        "processes": count,
        "killed": killed,
        "statuses": statuses,
        "finished": len(after),
        "seconds": round(time.monotonic() - began, 1),
    }
    return event, found


def check(batch: Batch, out: pathlib.Path, alone: pathlib.Path) -> list[str]:
    """Returns the faults of the videos, the manifest and the folder at the end."""
    lists = [
        [json.loads(line) for line in (folder / NAME).read_text().splitlines()]
        for folder in (out, alone)
    ]
    found = []
    for ours, theirs in zip(*lists, strict=True):
        if ours["state"] != FINISHED or ours["digest"] != theirs["digest"]:
            found.append(f"{ours} is not that of one process: {theirs}")
    if len(lists[0]) != batch.count:
        found.append(f"{len(lists[0])} lines in the manifest")
    names = {f"{n:03d}.{suffix}" for n in range(batch.count) for suffix in SUFFIXES}
    other = {one.name for one in out.iterdir()} ^ {*names, NAME}
    return found + [f"{sorted(other)} are left over or missing"] * bool(other)


def main() -> int:
    """Runs all starts, prints a summary, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=30)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--starts", type=int, default=6, help="with kills")
    parser.add_argument("--seconds", type=float, default=2, help="of the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, help="kept; default: temporary")
    given = parser.parse_args()
    folder = (given.folder or pathlib.Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(given.seed)
    batch, out, alone = Batch(folder, given.videos), folder / "out", folder / "alone"
    batch.write_prompts()
    faults, kills, starts = [], 0, 0
    while starts < given.starts and len(batch.made(out)) < given.videos:
        count = given.processes if starts % 2 == 0 else max(2, given.processes - 1)
        event, found = once(batch, out, count, given.seconds)
        sys.stderr.write(f"{json.dumps(event)} {found}\n")
        faults, kills, starts = faults + found, kills + len(event["killed"]), starts + 1
    for place, count in ((out, given.processes), (alone, 1)):
        event, found = once(batch, place, count, None)
        sys.stderr.write(f"{json.dumps(event)} {found}\n")
        faults += found
    faults += check(batch, out, alone)
    sys.stdout.write(
        f"{given.videos} videos by {given.processes} processes: {starts} starts with"
        f" {kills} kills, then one without; faults: {faults or 'none'}\n"
    )
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
