"""Commands that run as several processes of one job: their flags, and how they join."""

import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from anchor_jax import clusters, interrupts, processes, supervisor, tpu_hosts
from anchor_jax.cli.output import to_stderr
from anchor_jax.errors import some

COMMANDS = ("train", "sample", "trajectories", "score")
"""Commands that define these flags."""

_APART = ("sample", "trajectories", "score")
"""Commands whose processes compute apart, each on its own devices."""
_ORBAX_LOG = "absl"  # the logger of Orbax and jax
_OWN = ("process_id", "process", "processes")


def define_flags() -> None:
    """Defines `--coordinator`, `--num_processes` and `--process_id`."""
    from absl import flags

    flags.DEFINE_string(
        clusters.COORDINATOR,
        None,
        "HOST:PORT of process 0 where the processes of a job meet: a private address of"
        " its host and a free port. Whoever reaches the port controls the job. Default:"
        " JAX_COORDINATOR_ADDRESS, or found under Slurm, Kubernetes and on TPU slices.",
    )
    flags.DEFINE_integer(
        clusters.COUNT,
        None,
        "Number of processes of the job; 1 opens no port. Default: JAX_NUM_PROCESSES,"
        " or found like the coordinator, or 1.",
    )
    flags.DEFINE_integer(
        clusters.INDEX,
        None,
        "Number of this process, from 0. Process 0 writes logs and samples. Default:"
        " JAX_PROCESS_ID, or found like the coordinator.",
    )


def supervise(argv: Sequence[str]) -> None:
    """Starts a parent for this process if it may be one of several processes."""
    if not argv or argv[0] not in COMMANDS or _asks_for_help(argv):
        return
    given = {
        name: int(value) if name != clusters.COORDINATOR else value
        for name in clusters.VARIABLES
        if (value := _value(argv, name)) is not None
        and (name == clusters.COORDINATOR or value.isdecimal())
    }
    if "--process" in {one.partition("=")[0] for one in argv}:
        return
    try:
        is_needed = clusters.may_be_several(given, os.environ)
    except ValueError:  # The command itself reports wrong values.
        return
    if is_needed:
        supervisor.start()


def _asks_for_help(argv: Sequence[str]) -> bool:
    return any(one.lstrip("-").startswith("help") or one == "-h" for one in argv)


def _value(argv: Sequence[str], name: str) -> str | None:
    """Returns the text of a flag before the flags are parsed, or None."""
    for place, one in enumerate(argv):
        flag, is_joined, value = one.lstrip("-").partition("=")
        if one.startswith("-") and flag == name:
            return value if is_joined else (argv[place + 1 : place + 2] or [None])[0]
    return None


def join(command: str) -> None:
    """Joins the processes of the job, before a device is requested.

    All processes but the first then print nothing more than errors.

    Args:
      command: name of the command.

    Raises:
      UserError: The processes cannot meet, or were started differently.
    """
    from anchor_jax import devices

    is_apart = command in _APART
    place = clusters.find(_flags_of_place(), tell=to_stderr)
    if place is not None and place.count > 1:
        supervisor.tell(index=place.index, joining=processes.why_alone(place))
        if is_apart:
            tpu_hosts.separate(os.environ, tpu_hosts.chips_of_host())
    processes.join(place, to_stderr, is_apart=is_apart)
    if place is None or place.count == 1:
        supervisor.release()
        return
    supervisor.tell(name=processes.name(), hosts=processes.hosts())
    threading.excepthook = _report_thread
    logging.getLogger(_ORBAX_LOG).addFilter(_is_shown)
    interrupts.on_request.append(
        lambda number: supervisor.tell(status=interrupts.status())
    )
    processes.agree({"command": command, **_given(), **processes.versions()})
    devices.check()
    if is_apart:
        tpu_hosts.check()
    processes.agree(processes.devices())
    if processes.is_first():
        hosts = ", ".join(some([*dict.fromkeys(processes.hosts())]))
        to_stderr(f"{place.count} processes on {hosts}, at {place.coordinator}")
    else:
        interrupts.be_quiet()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _flags_of_place() -> dict[str, Any]:
    """Returns the values of the flags that `define_flags` defines."""
    from absl import flags

    return {name: flags.FLAGS[name].value for name in clusters.VARIABLES}


def _report_thread(failed) -> None:
    """Prints the error of a thread, such as one that saves a checkpoint.

    An error that the loss of another process causes goes to the messages of C++: the
    last line says what happened.
    """
    if failed.exc_value is None or not processes.blames_peer(failed.exc_value):
        threading.__excepthook__(failed)
        return
    _write_to_file(failed.exc_value)


def _is_shown(record: logging.LogRecord) -> bool:
    """Returns whether a library's log record goes to the terminal; see above."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None or not processes.blames_peer(error):
        return True
    _write_to_file(error)
    return False


def _write_to_file(error: BaseException) -> None:
    """Writes a stack beside the messages of C++."""
    lines = traceback.format_exception(error)
    with contextlib.suppress(OSError):
        os.write(2, "".join(lines).encode(errors="replace"))


def _given() -> dict[str, Any]:
    """Returns the values of all flags and config fields but this process's number."""
    from absl import flags

    found = {}
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if hasattr(value, "to_dict"):
            found |= {f"config.{key}": one for key, one in _flat(value.to_dict())}
        elif name not in _OWN:
            found[f"--{name}"] = _plain(value)
    return found


def _flat(section: Mapping[str, Any]):
    """Yields dotted names and values of nested mappings."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", one) for inner, one in _flat(value))
        else:
            yield name, _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float | type(None)) else str(value)
