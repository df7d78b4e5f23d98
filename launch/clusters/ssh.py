"""Plain ssh: one process on each host, kept running by `host.py`."""

import argparse
import pathlib
import shlex

from clusters import values
from clusters.steps import Step

SUMMARY = "run a job on hosts that ssh reaches"
PROGRAM = pathlib.Path(__file__).with_name("host.py")
FOLDER = "anchor_jax_jobs"
ACTIONS = {
    "run": "start the job on all hosts and return",
    "logs": "follow the log of the first host",
    "stop": "ask the job to save and leave",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the launcher's flags."""
    parser.add_argument(
        "action",
        choices=ACTIONS,
        help="; ".join(f"{name}: {text}" for name, text in ACTIONS.items()),
    )
    parser.add_argument(
        "--hosts", type=values.hosts, required=True, help="HOST,USER@HOST,..."
    )
    parser.add_argument("--name", type=values.name, default="anchor-jax")
    parser.add_argument(
        "--coordinator",
        type=values.coordinator,
        help=f"private address of the first host; default its name, port {values.PORT}",
    )
    parser.add_argument(
        "--directory", type=values.path, default=".", help="working folder on the hosts"
    )
    parser.add_argument(
        "--program", type=values.path, default="anchor-jax", help="path on the hosts"
    )


def steps(given: argparse.Namespace, job: list[str]) -> list[Step]:
    """Returns the commands of an action."""
    if given.action == "logs":
        return [_on(given.hosts[0], follow(given.name))]
    if given.action == "stop":
        return [_on(host, stop(given.name)) for host in given.hosts]
    copies = [_on(host, _receive(), file=PROGRAM) for host in given.hosts]
    return copies + [
        _on(host, _start(given, [given.program, *job, *flags]))
        for host, flags in zip(given.hosts, _places(given), strict=True)
    ]


def start(name: str, command: list[str], directory: str = FOLDER) -> str:
    """Returns the shell command that starts a job on a host."""
    program = f'"$HOME"/{FOLDER}/{PROGRAM.name}'
    line = f"python3 {program} start {name} -- {shlex.join(command)}"
    return f"cd {shlex.quote(directory)} && {line}"


def stop(name: str) -> str:
    """Returns the shell command that asks a job on a host to save and leave."""
    return f"python3 {FOLDER}/{PROGRAM.name} stop {name}"


def follow(name: str) -> str:
    """Returns the shell command that shows a job's log and follows it."""
    return f'tail -n 100 -F {FOLDER}/{name}/"$(uname -n)"/log'


def _start(given: argparse.Namespace, command: list[str]) -> str:
    return start(given.name, command, given.directory)


def _places(given: argparse.Namespace) -> list[list[str]]:
    """Returns the flags that tell each process its place; none for one host."""
    count = len(given.hosts)
    if count == 1:
        return [[]]
    first = given.hosts[0].rpartition("@")[2]
    coordinator = given.coordinator or f"{first}:{values.PORT}"
    values.coordinator(coordinator)
    common = [f"--coordinator={coordinator}", f"--num_processes={count}"]
    return [[*common, f"--process_id={number}"] for number in range(count)]


def _receive() -> str:
    target = f"{FOLDER}/{PROGRAM.name}"
    return f"mkdir -p {FOLDER} && cat > {target}.new && mv {target}.new {target}"


def _on(host: str, command: str, file: pathlib.Path | None = None) -> Step:
    line = ["ssh", "-o", "BatchMode=yes", *([] if file else ["-n"])]
    return Step((*line, host, command), file=file)
