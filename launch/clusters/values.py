"""Checks of what a user gives: names, counts, addresses, paths and arguments.

Each function is an argparse type. Nothing that passes can become a second option, a
second command or a second line in a script or a YAML file.
"""

import argparse
import ipaddress
import re
from collections.abc import Callable, Sequence

COMMANDS = ("train", "sample", "trajectories", "score")
PORT = 8476
# The launchers give these flags themselves.
_OWN_FLAGS = ("--coordinator", "--num_processes", "--process_id")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def matching(pattern: str, kind: str, allowed: str) -> Callable[[str], str]:
    """Returns a type for texts that match a regular expression from end to end."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {kind}; allowed: {allowed}"
            )
        return text

    return check


name = matching(
    r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?",
    "a name",
    "1 to 40 lower-case letters, digits and hyphens, a letter first, no hyphen last",
)
word = matching(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
    "a word",
    "letters, digits, dots, hyphens and underscores",
)
time = matching(
    r"(\d{1,3}-)?\d{1,3}(:\d{2}){1,2}|\d{1,3}-\d{1,2}|\d{1,6}",
    "a time limit of Slurm",
    "MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS",
)
duration = matching(r"[1-9]\d{0,4}[smhd]", "a duration", "a number and s, m, h or d")
image = matching(
    r"[a-z0-9][A-Za-z0-9._/:@-]{0,299}", "an image", "REGISTRY/NAME:TAG or @DIGEST"
)
email = matching(
    r"[a-z][a-z0-9-]*@[a-z0-9.-]+", "a service account", "NAME@PROJECT.DOMAIN"
)
host = matching(
    r"([A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*",
    "a host",
    "HOST or USER@HOST, of letters, digits, dots and hyphens",
)
claim = matching(
    r"[a-z0-9][a-z0-9.-]{0,99}:(/[A-Za-z0-9._-]+)+",
    "a mounted volume claim",
    "CLAIM:/PATH, without spaces",
)
worker = matching(r"\d{1,4}", "a host's number", "an integer from 0")
option = matching(
    r"--[a-z][a-z-]*(=[A-Za-z0-9._,:@%/+\[\]-]*)?",
    "an option of sbatch",
    "--NAME or --NAME=VALUE, without spaces",
)


def count(text: str) -> int:
    """Returns a positive integer of at most five digits."""
    return int(matching(r"[1-9]\d{0,4}", "a count", "an integer, 1 to 99999")(text))


def hosts(text: str) -> tuple[str, ...]:
    """Returns different hosts from a list with commas."""
    found = tuple(host(part) for part in text.split(","))
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(
            f"{text!r} names a host twice; each host runs one process"
        )
    return found


def coordinator(text: str) -> str:
    """Returns HOST:PORT of the coordinator, which must be on a private network."""
    place, _, port = text.partition(":")
    host(place)
    if not re.fullmatch(r"[1-9]\d{3,4}", port, re.ASCII) or int(port) > 65535:
        raise argparse.ArgumentTypeError(
            f"{text!r} has no port; give HOST:PORT, with a port from 1024 to 65535"
        )
    if is_public(place):
        raise argparse.ArgumentTypeError(
            f"{place} is a public address, and everybody who reaches the coordinator's"
            " port can take part in the job; give the host's private address"
        )
    return text


def is_public(place: str) -> bool:
    """Returns whether a host is given by an address that the internet can reach."""
    try:
        return ipaddress.ip_address(place).is_global
    except ValueError:
        return False  # a name


def path(text: str) -> str:
    """Returns a path or a bucket. Spaces and signs of the shell are quoted later."""
    if not text or text.startswith("-") or _CONTROL.search(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a path; it must not be empty, start with a hyphen, or"
            " hold control characters"
        )
    return text


def job(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of `anchor-jax`, checked; raises ValueError."""
    if not arguments:
        raise ValueError(
            "no command is given; put the command after --: cluster.py slurm --nodes=7"
            " -- train --config=train_dmd --config.out=OUT"
        )
    if arguments[0] not in COMMANDS:
        raise ValueError(
            f"the command after -- must be one of {', '.join(COMMANDS)}, but got"
            f" {arguments[0]!r}; example:"
            " -- train --config=train_dmd --config.out=OUT"
        )
    for argument in arguments:
        if _CONTROL.search(argument):
            raise ValueError(f"{argument!r} has control characters; remove them")
        flag = argument.partition("=")[0]
        if flag in _OWN_FLAGS:
            raise ValueError(f"{flag} is given by the launcher; remove it")
    return list(arguments)


def flags_of(arguments: Sequence[str], *names: str) -> list[tuple[str, str]]:
    """Returns the flags of these names and their values, in one word or in two."""
    found = []
    for number, argument in enumerate(arguments):
        name, sign, value = argument.partition("=")
        name = f"--{name.lstrip('-')}" if name.startswith("-") else name
        if name in names:
            following = arguments[number + 1 : number + 2]
            found.append((name, value if sign else "".join(following)))
    return found


def seconds(limit: str) -> int:
    """Returns the seconds of a time limit of Slurm that `time` has checked."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        units = (3600, 60, 1)  # HOURS, after DAYS-
    else:
        units = (60, 1) if len(parts) < 3 else (3600, 60, 1)
    counted = sum(part * unit for part, unit in zip(parts, units, strict=False))
    return int(days or 0) * 86400 + counted
