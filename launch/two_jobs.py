"""Starts two jobs together on one folder, repeatedly, and checks their results.

    python launch/two_jobs.py [--commands=sample,train,...] [--times=20] [--seed=0]

The second job starts after a random delay, at most the duration of the first one. Each
time one of the two must do the work. The other one must be refused in one line, with
status 2, or find the work done if it comes later. The folder must contain exactly what
one job alone makes, bit for bit. Prints one JSON, and ends with status 1 otherwise.
Jobs are forked from this program, so that modules are imported only once.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable

SHORT = ("--config.steps=3", "--config.batch=2", "--config.save_every=1")
TINY = (
    "--config=train_teacher",
    *SHORT,
    "--config.log_every=1",
    "--config.sample_every=0",
    "--config.regression.blocks=1",
    "--config.data.size=16",
)
ODE = ("--config.count=6", "--config.frames=3", "--config.steps=4", "--config.batch=2")
REFUSED = re.compile(r"^error: .* is in use by process \d+ on host .* since .*$", re.M)


def checkpoints(folder: pathlib.Path) -> dict[str, str]:
    """Returns a digest of every array in every checkpoint below a folder."""
    import jax

    from anchor_jax.weights import checkpoint

    found = {}
    for meta in folder.rglob("meta"):
        step = meta.parent
        for item in checkpoint.items(step):
            if item in ("data", "meta"):
                continue
            arrays = jax.device_get(checkpoint.restore(step, item))
            for keys, array in jax.tree_util.tree_flatten_with_path(arrays)[0]:
                name = jax.tree_util.keystr(keys)
                place = f"{step.relative_to(folder)}/{item}/{name}"
                found[place] = hashlib.sha256(array.tobytes()).hexdigest()
    for log in folder.rglob("log.jsonl"):
        lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
        found[str(log.relative_to(folder))] = [line["step"] for line in lines]
    return found


def files(folder: pathlib.Path) -> dict[str, str]:
    """Returns a digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def clips(folder: pathlib.Path) -> dict[str, str]:
    """Returns a digest of every trajectory in a folder."""
    from anchor_jax.training.data.trajectories import Trajectories

    found = Trajectories(folder)
    return {
        f"{number} {clip['prompt']}": hashlib.sha256(clip["states"]).hexdigest()
        for number, clip in zip(found.numbers, found, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that two jobs run at the same time.

    Attributes:
      line: its flags; `{out}` is the folder, and `{scratch}` a folder with its inputs.
      content: function that returns a folder's content.
      late: a line that a job prints if the work is already done.
    """

    line: tuple[str, ...]
    content: Callable[[pathlib.Path], dict]
    late: str


COMMANDS = {
    "sample": Command(
        (
            *("sample", "--config=tiny", "--config.sampler.steps=(1000, 500)"),
            *("--config.prompt=a red ring[6f] | a blue ring[6f]", "--out={out}"),
        ),
        files,
        "Skipped 1 video",
    ),
    "train": Command(
        ("train", *TINY, "--config.out={out}"), checkpoints, "Already finished"
    ),
    "sweep": Command(
        ("sweep", *TINY, "--config.out={out}", "--vary=seed=1"),
        checkpoints,
        "is finished",
    ),
    "trajectories": Command(
        ("trajectories", "--config=trajectories", *ODE, "--config.out={out}"),
        clips,
        "0 trajectories written",
    ),
    "port": Command(
        ("port", "--wan={scratch}/wan", "--out={out}"), checkpoints, "already exists"
    ),
    "export": Command(
        (
            *("export", "--weights={scratch}/ported", "--out={out}"),
            "--layout=diffusers",
        ),
        files,
        "already exists",
    ),
}


def fork(log: pathlib.Path, run: Callable[[], int]) -> int:
    """Runs a function in a new process, and returns the process's number.

    This program itself must not start threads, which a forked process would lack.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = run()
    except BaseException:  # noqa: BLE001 - it is in the log, and in the status.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(line: list[str], log: pathlib.Path) -> int:
    """Starts a command in a new process and returns the process's number."""
    from anchor_jax.cli.main import main

    return fork(log, lambda: main(line))


def content(command: "Command", out: pathlib.Path) -> dict:
    """Returns a folder's content, read by a new process."""
    found = out.with_name(f"{out.name}.json")

    def read() -> int:
        found.write_text(json.dumps(command.content(out)), encoding="utf-8")
        return 0

    log = out.with_name(f"{out.name}.content.log")
    if wait(fork(log, read)):
        return {"error": log.read_text("utf-8")}
    return json.loads(found.read_text("utf-8"))


def wait(pid: int) -> int:
    """Returns the status of a process, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def left_over(out: pathlib.Path) -> list[str]:
    """Returns the names of leases and temporary files in a folder and beside it."""
    found = [*out.rglob(".*"), *out.rglob("*tmp*"), *out.parent.glob(f".{out.name}*")]
    return sorted(path.name for path in found)


def compete(name: str, out: pathlib.Path, scratch, most: float, expected) -> list[str]:
    """Starts two jobs on a folder and returns the faults."""
    command = COMMANDS[name]
    line = [one.format(out=out, scratch=scratch) for one in command.line]
    logs = [out.with_name(f"{out.name}.{number}.log") for number in (1, 2)]
    first = start(line, logs[0])
    time.sleep(random.choice((random.uniform(0, 0.2), random.uniform(0, most))))
    second = start(line, logs[1])
    ended = [wait(first), wait(second)]
    output = [log.read_text("utf-8", "replace") for log in logs]
    roles = [role(command, *one) for one in zip(ended, output, strict=True)]
    wrong = []
    if sorted(roles)[-1] != "worked" or roles.count("worked") != 1:
        wrong.append(f"roles {roles}, see {logs[0]} and {logs[1]}")
    wrong += [f"{one} is left over" for one in left_over(out)]
    if content(command, out) != expected:
        wrong.append(f"{out} differs from what one job makes")
    sys.stderr.write(f"{name}: {', '.join(roles)} {'; '.join(wrong)}\n")
    return wrong or roles


def role(command: Command, status: int, output: str) -> str:
    """Returns a job's role, "worked", "refused" or "late", or its failure."""
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    if status == 2 and len(errors) == 1 and REFUSED.search(output):
        return "refused"
    if status in (0, 2) and command.late in output and "Traceback" not in output:
        return "late"
    return "worked" if status == 0 else f"failed with {status}"


def race(name: str, folder: pathlib.Path, scratch: pathlib.Path, times: int) -> dict:
    """Returns the number of jobs by role, and the faults."""
    command, alone = COMMANDS[name], folder / f"{name}-alone"
    line = [one.format(out=alone, scratch=scratch) for one in command.line]
    log = folder / f"{name}-alone.log"
    for _ in range(2):  # The first time compiles programs and stores them.
        shutil.rmtree(alone, ignore_errors=True)
        began = time.monotonic()
        if wait(start(line, log)):
            raise SystemExit(f"{name} failed alone:\n{log.read_text('utf-8')}")
        seconds = time.monotonic() - began
    expected, roles, wrong = content(command, alone), [], []
    if "error" in expected:
        raise SystemExit(expected["error"])
    for number in range(times):
        out = folder / f"{name}-{number:02d}"
        found = compete(name, out, scratch, 1.2 * seconds, expected)
        if len(found) == 2 and "worked" in found:
            roles += found
            shutil.rmtree(out)
        else:
            wrong += found
    counts = {one: roles.count(one) for one in ("worked", "refused", "late")}
    return {"races": times, **counts, "wrong": wrong}


def prepare(scratch: pathlib.Path) -> None:
    """Makes published weights to port, and ported weights to export."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
    import layouts

    layouts.write_layout(scratch / "wan", "wan")
    line = ["port", f"--wan={scratch / 'wan'}", f"--out={scratch / 'ported'}"]
    if wait(start(line, scratch / "port.log")):
        raise SystemExit((scratch / "port.log").read_text("utf-8"))


def main() -> int:
    """Races every command and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--commands", default=",".join(COMMANDS), help="some of these, with commas"
    )
    parser.add_argument("--times", type=int, default=20, help="races of a command")
    parser.add_argument("--seed", type=int, default=0, help="seed of the delays")
    parser.add_argument(
        "--folder", type=pathlib.Path, help="folder for the jobs; default: a new one"
    )
    given = parser.parse_args()
    names = given.commands.split(",")
    if unknown := set(names) - set(COMMANDS):
        parser.error(f"--commands: {', '.join(unknown)}; choose from {list(COMMANDS)}")
    folder = (given.folder or pathlib.Path(tempfile.mkdtemp())).resolve()
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    os.environ.setdefault("ANCHOR_JAX_CACHE", str(folder / "cache"))
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    load_modules()
    random.seed(given.seed)
    if {"port", "export"} & set(names):
        prepare(scratch)
    report = {name: race(name, folder, scratch, given.times) for name in names}
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return int(any(one["wrong"] for one in report.values()))


def load_modules() -> None:
    """Imports the jobs' modules, none of which starts a thread."""
    with contextlib.suppress(ModuleNotFoundError):
        import anchor_jax.training.data.trajectories
    import anchor_jax.porting.export
    import anchor_jax.streaming.stream
    import anchor_jax.training.ode
    import anchor_jax.training.run  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
