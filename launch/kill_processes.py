"""Disturbs trainings of several processes on this machine, and checks how they end.

    python launch/kill_processes.py [--parts sigterm kill ...] [--sigterms=20] ...

Every process is started by the command's own flags, on one simulated CPU device. One
random process is disturbed at a random moment, from its start to its last step, and all
are started again until the run has finished. Checks:

* sigterm: all processes end with 75, having saved the step that process 0 names. These
  runs make sample videos too.
* interrupt: Ctrl-C to one process; all end with 130, having saved that step.
* kill, stop: SIGKILL, or SIGSTOP of a process and its parent (a host that hangs). The
  others end with 75 within 60 s, and their last line names the lost process.
* Every run that was disturbed equals the undisturbed run of as many processes, bit for
  bit: all arrays of the last checkpoint, and all lines of the log.
* resume: 4 processes are started --resumes times, one step each; no log line is lost.
* mesh: a checkpoint of 4 processes is restored by 4, 1 and 2; all arrays are equal.

Prints a line for each disturbance and a table; the status is 1 if anything failed.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from anchor_jax import clusters, processes
from anchor_jax.config import load_config
from anchor_jax.training import files, run
from anchor_jax.training.checkpoints import present
from anchor_jax.training.monitor import MEASURED
from anchor_jax.weights import checkpoint

TINY = (
    "--config.weights=tiny",
    "--config.save_every=2",
    "--config.log_every=1",
    "--config.sample_every=0",
    "--config.regression.blocks=1",
    "--config.data.size=16",
    "--config.optimizer.decay=0",
)
SAMPLES = (
    "--config.sample_every=5",
    "--config.samples.num=1",
    "--config.samples.frames=3",
    "--config.samples.steps=2",
)
AGAIN, INTERRUPTED = 75, 130
LIMIT = 60  # seconds in which the others must have ended
STUCK = 300  # seconds after which a run counts as hanging
DISTURBANCES = {
    "sigterm": (signal.SIGTERM, AGAIN),
    "interrupt": (signal.SIGINT, INTERRUPTED),
    "kill": (signal.SIGKILL, AGAIN),
    "stop": (signal.SIGSTOP, AGAIN),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A training of several processes on this machine.

    Attributes:
      out: folder of the run.
      count: number of processes.
      steps: number of steps.
      batch: videos per step.
      cache: folder of compiled programs.
      more: further overrides of the config.
    """

    out: pathlib.Path
    count: int
    steps: int
    batch: int
    cache: pathlib.Path
    more: tuple[str, ...] = ()

    def config(self) -> list[str]:
        """Returns the overrides of the config."""
        return [
            *TINY,
            f"--config.out={self.out}",
            f"--config.steps={self.steps}",
            f"--config.batch={self.batch}",
            *self.more,
        ]

    def start(self, program: tuple[str, ...] = ()) -> list[subprocess.Popen]:
        """Starts all processes; by default those of `anchor-jax train`."""
        program = program or ("-m", "anchor_jax", "train", "--config=train_teacher")
        line = [sys.executable, *program, *self.config()]
        return start(line, self.count, self.output, self.environment())

    def output(self, number: int) -> pathlib.Path:
        """Returns the file of what a process prints."""
        return self.out.with_name(f"{self.out.name}-output-{number}.txt")

    def printed(self, number: int = 0) -> str:
        """Returns what a process has printed."""
        text = self.output(number).read_text(errors="replace")
        return text.replace("\r", "\n")

    def environment(self) -> dict[str, str]:
        """Returns variables: one CPU device a process, and fast compilation."""
        return os.environ | {
            "ANCHOR_JAX_CACHE": str(self.cache),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }

    def lines(self) -> int:
        """Returns the number of complete lines in the log."""
        path = self.out / files.LOG
        return path.read_bytes().count(b"\n") if path.exists() else 0


def start(
    line: list[str],
    count: int,
    output: Callable[[int], pathlib.Path],
    environment: dict[str, str],
) -> list[subprocess.Popen]:
    """Starts a command as the processes of a job, by its own flags.

    Args:
      line: the command.
      count: number of processes.
      output: returns the file of what a process prints.
      environment: variables.
    """
    job = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"]
    running = []
    for number in range(count):
        own = [*job, f"--process_id={number}"] if count > 1 else []
        with output(number).open("wb") as file:
            running.append(
                subprocess.Popen(
                    [*line, *own],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
            )
    return running


def free_port() -> int:
    """Returns a port that no program uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finish(job: Job, running: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Returns status and output of all processes; kills those that hang."""
    wait_for(lambda: all(one.poll() is not None for one in running))
    for one in running:
        if one.poll() is None:
            kill_all(one.pid)
            one.wait()
    return [one.returncode for one in running], [
        job.printed(number) for number in range(job.count)
    ]


def wait_for(is_done: Callable[[], bool]) -> None:
    """Waits until something is done, at most as long as nothing may hang."""
    deadline = time.monotonic() + STUCK
    while not is_done() and time.monotonic() < deadline:
        time.sleep(0.05)


def family(pid: int) -> list[int]:
    """Returns the ids of a process and of its child, if it has one."""
    try:
        path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
        return [pid, *map(int, path.read_text().split())]
    except OSError:
        return [pid]


def kill_all(pid: int) -> None:
    """Kills a process and its child."""
    for one in family(pid):
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            pass


def disturb(job: Job, kind: str, seconds: float) -> dict:
    """Starts a job, disturbs one process, and returns what happened.

    Args:
      job: the job.
      kind: a name in `DISTURBANCES`.
      seconds: a whole run takes about this long.
    """
    number, _ = DISTURBANCES[kind]
    first, begun = checkpoint_step(job.out), job.lines()
    running = job.start()
    # Before they have met, processes know nothing of one another.
    wait_for(lambda: f"{job.count} processes on" in job.printed())
    time.sleep(random.uniform(0, seconds))
    chosen = random.randrange(job.count)
    lines, target = job.lines(), family(running[chosen].pid)
    # A launcher signals the parent, a host's memory killer the child.
    for one in target if kind == "stop" else [random.choice(target)]:
        try:
            os.kill(one, number)
        except ProcessLookupError:
            pass
    began = time.monotonic()
    others = [one for place, one in enumerate(running) if place != chosen]
    if kind == "stop":
        wait_for(lambda: all(one.poll() is not None for one in others))
        kill_all(running[chosen].pid)
    statuses, outputs = finish(job, running)
    found = faults(job, kind, chosen, first, statuses, outputs)
    is_behind = checkpoint_step(job.out) != job.lines()
    if kind in ("sigterm", "interrupt") and lines > begun and is_behind:
        found += unsaved(statuses, outputs[0])
    if time.monotonic() - began > LIMIT:
        found.append(f"took over {LIMIT} s")
    return {
        "kind": kind,
        "process": chosen,
        "steps": lines,
        "statuses": statuses,
        "seconds": round(time.monotonic() - began, 1),
        "faults": found,
    }


def checkpoint_step(out: pathlib.Path) -> int | None:
    """Returns the step of the last checkpoint, or None."""
    return checkpoint.last_step(out) if checkpoint.is_checkpoint(out) else None


def faults(job, kind, chosen, first, statuses, outputs) -> list[str]:
    """Returns the faults of the end of a disturbed job."""
    _, expected = DISTURBANCES[kind]
    if set(statuses) == {0}:  # It had ended before.
        return []
    found = []
    is_lost = kind in ("kill", "stop")
    rest = [n for n in range(job.count) if n != chosen or not is_lost]
    wrong = {n: statuses[n] for n in rest if statuses[n] != expected}
    if wrong:
        found.append(f"statuses {statuses}: {[outputs[n][-600:] for n in wrong]}")
    if "Traceback" in "".join(outputs):
        found.append(f"traceback: {''.join(outputs)[-1500:]}")
    if is_lost:
        lines = [outputs[n].strip().split("\n")[-1] for n in rest]
        name = f"process {chosen} ("
        if not all(name in line for line in lines):
            found.append(f"{name}...) is not named: {lines}")
    elif stopped := re.search(r"Stopped at (\d+)/", outputs[0]):
        last = checkpoint_step(job.out)
        if last != int(stopped[1]) and first != int(stopped[1]):
            found.append(f"stopped at {stopped[1]}, but the checkpoint is {last}")
    return found


def unsaved(statuses: list[int], output: str) -> list[str]:
    """Returns a fault if a job that was stopped within its steps saved none.

    Args:
      statuses: statuses of all processes.
      output: what process 0 printed: the step that it saved, or that it has finished.
    """
    if set(statuses) == {0} or re.search(r"Stopped at \d+/|^Done\.", output, re.M):
        return []
    return [f"no checkpoint at the stop: {output[-600:]}"]


def differing(first: pathlib.Path, second: pathlib.Path) -> list[str]:
    """Returns the arrays and log lines of two runs that are not identical."""
    if checkpoint.last_step(first) != checkpoint.last_step(second):
        return [f"steps {checkpoint.last_step(first)}, {checkpoint.last_step(second)}"]
    a, b = digests(first), digests(second)
    found = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    logs = [
        [{k: v for k, v in one.items() if not MEASURED.fullmatch(k)} for one in lines]
        for lines in map(files.read_log, (first, second))
    ]
    if logs[0] != logs[1]:
        found.append(f"log: {len(logs[0])} and {len(logs[1])} lines")
    return found


def digests(folder: pathlib.Path) -> dict[str, str]:
    """Returns a hash of every array in the last checkpoint of a run."""
    names = [name for name in checkpoint.items(folder) if name not in ("data", "meta")]
    return {
        name_of(name, path): digest(leaf)
        for name in names
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            checkpoint.restore(folder, name)
        )[0]
    }


def name_of(tree: str, path) -> str:
    """Returns a name of an array; a tree of classes has that of a tree of mappings."""
    return "/".join([tree, *re.findall(r"\w+", jax.tree_util.keystr(path))])


def digest(leaf) -> str:
    """Returns a hash of an array's bytes."""
    return hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()[:16]


def endure(kind: str, count: int, folder: pathlib.Path, times: int, steps: int) -> dict:
    """Disturbs runs of a number of processes, and compares those that have finished."""
    cache = folder / "cache"
    more = SAMPLES if kind == "sigterm" else ()
    job = Job(folder / f"{kind}-{count}", count, steps, 4, cache, more)
    whole = dataclasses.replace(job, out=folder / f"whole-{count}", more=())
    if checkpoint_step(whole.out) != steps:
        statuses, outputs = finish(whole, whole.start())
        if any(statuses):
            raise SystemExit(f"the undisturbed run ended with {statuses}: {outputs}")
    timed = dataclasses.replace(job, out=folder / f"timed-{count}")
    running = timed.start()
    wait_for(lambda: f"{count} processes on" in timed.printed())
    began = time.monotonic()
    finish(timed, running)
    seconds = time.monotonic() - began
    shutil.rmtree(timed.out)
    events, found, ended = [], [], 0
    while len(events) < times:
        event = disturb(job, kind, seconds)
        if set(event["statuses"]) == {0}:
            found += differing(whole.out, job.out)
            shutil.rmtree(job.out)
            ended += 1
            continue
        events.append(event)
        sys.stderr.write(f"{json.dumps(event)}\n")
    statuses, outputs = finish(job, job.start())
    if any(statuses):
        found.append(f"the last start ended with {statuses}: {outputs[0][-1000:]}")
    else:
        found += differing(whole.out, job.out)
    found += [one for event in events for one in event["faults"]]
    slowest = max(event["seconds"] for event in events)
    in_steps = sum(event["steps"] > 0 for event in events)
    return {
        "times": times,
        "in the steps": in_steps,
        "slowest end (s)": slowest,
        "runs compared": ended + 1,
        "faults": found,
    }


def resume(folder: pathlib.Path, times: int) -> dict:
    """Starts 4 processes repeatedly, one step each, and checks the log each time."""
    found = []
    for steps in range(1, times + 1):
        job = Job(folder / "resumed", 4, steps, 4, folder / "cache")
        if job.lines() >= steps:
            continue
        statuses, outputs = finish(job, job.start())
        if any(statuses) or job.lines() != steps:
            found.append(
                f"{steps}: {statuses}, {job.lines()} lines: {outputs[0][-500:]}"
            )
            break
    whole = Job(folder / "resumed-whole", 4, times, 4, folder / "cache")
    if not found and times > 1:
        finish(whole, whole.start())
        found += differing(whole.out, folder / "resumed")
    return {"times": times, "log lines": job.lines(), "faults": found}


def mesh(folder: pathlib.Path) -> dict:
    """Trains with 4, 1 and 2 processes in one folder; compares what each restores."""
    found = []
    for steps, count in ((2, 4), (4, 1), (6, 2)):
        job = Job(folder / "mesh", count, steps, 4, folder / "cache")
        if checkpoint_step(job.out) is not None:
            saved = digests(job.out)
            statuses, outputs = finish(job, job.start((__file__, "--digest")))
            restored = json.loads(outputs[0].strip().split("\n")[-1])
            if any(statuses) or saved != restored:
                found.append(f"{count} processes restored another state")
        statuses, outputs = finish(job, job.start())
        if any(statuses) or checkpoint_step(job.out) != steps:
            found.append(f"{count} processes: {statuses}, {outputs[0][-500:]}")
            break
    return {"processes": "4, 1, 2", "arrays": len(saved), "faults": found}


def print_digests(words: list[str]) -> None:
    """Restores a run as a process of a job, and prints a hash of every array."""
    flags = dict(word.lstrip("-").split("=", 1) for word in words)
    given = {
        "coordinator": flags.get("coordinator"),
        "num_processes": int(flags.get("num_processes", 1)),
        "process_id": int(flags.get("process_id", 0)),
    }
    processes.join(clusters.find(given))
    overrides = [word for word in words if word.startswith("--config.")]
    config = run.read_config(load_config("train_teacher", overrides))
    training = run.open_training(config, tell=lambda line: None)
    with training.lease:
        state, places = training.prepared.state, training.prepared.compiled.places
        restored, _ = training.checkpoints.restore(state, places)
    found = {
        name_of(name, path): digest(multihost_utils.process_allgather(leaf, tiled=True))
        for name in present(restored)
        for path, leaf in jax.tree_util.tree_flatten_with_path(getattr(restored, name))[
            0
        ]
    }
    if processes.is_first():
        sys.stdout.write(f"\n{json.dumps(found)}\n")
        sys.stdout.flush()
    processes.barrier("end")


def main() -> int:
    """Runs the chosen parts, prints a table, and returns the exit status."""
    if sys.argv[1:2] == ["--digest"]:
        print_digests(sys.argv[2:])
        return 0
    parts = [*DISTURBANCES, "resume", "mesh"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sigterms", type=int, default=20)
    parser.add_argument("--interrupts", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--resumes", type=int, default=50)
    parser.add_argument("--steps", type=int, default=20, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the results")
    parser.add_argument("--folder", type=pathlib.Path, help="kept; default: temporary")
    given = parser.parse_args()
    folder = (given.folder or pathlib.Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(given.seed)
    report = {}
    for part in given.parts:
        if part == "resume":
            report[part] = resume(folder, given.resumes)
        elif part == "mesh":
            report[part] = mesh(folder)
        else:
            times = getattr(given, f"{part}s")
            report[part] = endure(part, given.processes, folder, times, given.steps)
        sys.stderr.write(f"{part}: {report[part]}\n")
        if given.out:
            given.out.write_text(json.dumps(report, indent=1))
    sys.stdout.write(f"{table(report)}\n")
    return int(any(one["faults"] for one in report.values()))


def table(report: dict[str, dict]) -> str:
    """Returns the results as a table in Markdown."""
    lines = ["| part | result | faults |", "|---|---|---|"]
    for part, one in report.items():
        shown = ", ".join(f"{k}: {v}" for k, v in one.items() if k != "faults")
        lines.append(f"| {part} | {shown} | {len(one['faults'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
