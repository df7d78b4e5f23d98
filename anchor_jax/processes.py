"""The processes of one job: how they meet, exchange values, and end together.

    processes.join(clusters.find(flags))     # before a device is requested
    processes.count(), processes.index(), processes.is_first()
    names = processes.gather(name)           # a value of each process, in order
    processes.post("pace", seconds)          # for all to see; `posted` reads
    step = processes.share(step)             # the first process's value
    processes.barrier("weights", 600)        # raises Missing after 600 s

`gather`, `share`, `barrier` and `agree` wait for all processes. So every process must
call them in the same order. Values are those of JSON. All of them are instant in
a job of one process, which never opens a port.

With `join(..., is_apart=True)` each process computes on its own devices only, as if it
were alone. `part` then ends the connection: no process waits for another afterwards,
and the loss of one does not disturb the others.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import mmap
import os
import pathlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from anchor_jax import clusters, interrupts, meeting
from anchor_jax.errors import UserError, shown, some
from anchor_jax.peers import FOLLOWING, Peers

HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as lost."""
SAME_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
"""Flag with which cached programs for CPUs order their operations like new ones."""
PATIENCE = 600.0
"""Default seconds to wait for the other processes."""
LOADING = 3600.0
"""Seconds to wait for others that may still load weights or build data."""

_POSTS = "anchor/posts/"
_CLOSING = 30  # seconds to wait for the others at the end
_LEAVING = 15.0  # seconds to end the connection, when all have come to the end
_VERDICT = HEARTBEAT + 15  # seconds until the loss of a process is known
_THREADS = 32  # of XLA, on CPUs
_PACKAGES = ("anchor_jax", "jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Flags of the compiler that may differ: paths of debug files, simulated devices.
_FREE = ("--xla_dump_", "--xla_force_host_platform_device_count")
_OF_JAX = (
    *("jax_enable_x64", "jax_default_matmul_precision"),
    *("jax_threefry_partitionable", "jax_default_prng_impl"),
)
# Errors of a process whose peer has gone.
_FROM_PEER = re.compile(
    r"gloo|nccl|rccl|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|barrier"
    r"|coordination|heartbeat|connection (closed|reset|refused)|socket",
    re.IGNORECASE,
)


class Missing(Exception):
    """Other processes did not come to a point that all must reach."""


@dataclasses.dataclass(eq=False)
class _Job:
    """The job that this process has joined.

    Attributes:
      place: the place of this process.
      client: client of jax's coordinator.
      service: the coordinator, if this process has it and jax does not know of it.
      peers: the other processes.
      is_apart: whether jax sees this process only.
      hosts: host names by process.
      key: random text of the first process, which is new at every start of the job.
      turns: numbers of the exchanges.
    """

    place: clusters.Place
    client: Any
    service: Any
    peers: Peers
    is_apart: bool = False
    hosts: list[str] = dataclasses.field(default_factory=list)
    key: str = ""
    turns: Iterator[int] = dataclasses.field(default_factory=itertools.count)


_job: _Job | None = None
_has_parted = False


def count() -> int:
    """Returns the number of processes."""
    return _job.place.count if _job else _from_jax("process_count")


def index() -> int:
    """Returns the number of this process, from 0."""
    return _job.place.index if _job else _from_jax("process_index")


def is_first() -> bool:
    """Returns whether this process writes what one process must write."""
    return index() == 0


def name(number: int | None = None) -> str:
    """Returns the name of a process in messages; default: of this process."""
    number = index() if number is None else number
    hosts = _job.hosts if _job else []
    host = f" ({hosts[number]})" if number < len(hosts) else ""
    return f"process {number}{host}"


def hosts() -> list[str]:
    """Returns the host names of all processes."""
    return list(_job.hosts) if _job else [socket.gethostname()]


def key() -> str:
    """Returns a text that is new at every start of a job; "" for one process."""
    return _job.key if _job else ""


def _from_jax(what: str) -> int:
    """Returns a number that a program of the user's own has given to jax."""
    import jax

    return getattr(jax, what)()


def join(
    place: clusters.Place | None,
    tell: Callable[[str], None] = lambda line: None,
    wait: int = clusters.WAIT,
    is_apart: bool = False,
) -> None:
    """Meets the other processes of a job; does nothing in a job of one process.

    It must be called before a device is requested, by every process of the job.

    Args:
      place: the place of this process, from `clusters.find`.
      tell: called with warnings.
      wait: seconds to wait for the coordinator and the other processes.
      is_apart: whether jax sees only this process and its devices.

    Raises:
      UserError: The coordinator or other processes cannot be reached.
    """
    global _job
    if place is None:
        if os.environ.get("JAX_NUM_CPU_DEVICES", "1") != "1":
            keep_order()
        return
    interrupts.join_job()
    if place.count == 1 or _job is not None:
        return
    _connect(place, tell, wait, is_apart)
    client, service = _connection(is_apart)
    peers = Peers(client, place.index, place.count, _follow)
    _job = _Job(place, client, service, peers, is_apart)
    interrupts.at_end.append(_write_end)
    _job.peers.start()
    try:
        found = gather([socket.gethostname(), secrets.token_hex(8)], wait)
        _job.hosts, _job.key = [host for host, _ in found], found[0][1]
    except Missing as error:
        raise UserError(
            f"--num_processes={place.count}: {error}; start all processes with the same"
            " --coordinator and --num_processes, each with its own --process_id"
        ) from error


def _connection(is_apart: bool) -> tuple[Any, Any]:
    """Returns the client and the coordinator of jax, or None for the coordinator.

    Args:
      is_apart: whether they are taken away from jax, which then sees one process.
    """
    from jax._src import distributed

    state = distributed.global_state
    client, service = state.client, state.service
    if not is_apart:
        return client, None
    state.client = state.service = None
    state.process_id, state.num_processes = 0, 1
    return client, service


def part(seconds: float = PATIENCE) -> None:
    """Ends the connection of a job that was joined with `is_apart`.

    All processes must call it. Each is then independent: it receives no requests of the
    others, is not ended with them, and may call nothing here that waits for them.

    Args:
      seconds: time to wait for the others to call it.

    Raises:
      Missing: A process did not call it in time.
    """
    if not _is_connected():
        return
    barrier("the others are not ready", seconds)
    _disconnect()


def _disconnect() -> None:
    """Ends the connection, after waiting until the others end theirs."""
    global _has_parted
    interrupts.at_end.remove(_write_end)
    _job.peers.stop()
    _has_parted = True
    _job.client.shutdown()
    if _job.service is not None:
        _job.service.shutdown()


def _connect(
    place: clusters.Place, tell: Callable[[str], None], wait: int, is_apart: bool
) -> None:
    """Initializes jax for several processes.

    Raises:
      UserError: The coordinator cannot be reached, or its port is taken.
    """
    import jax

    # Requests to stop are handled in `interrupts`; jax would take SIGTERM away.
    jax.config.update("jax_enable_preemption_service", False)
    if not is_apart:
        _avoid_blocked_threads(jax)
        keep_order()
    bind = None
    if place.index == 0:
        bind = meeting.own_address(place, tell)
        meeting.check_free(place, bind)
    else:
        meeting.await_coordinator(place, wait)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=wait,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=_CLOSING,
            coordinator_bind_address=bind,
        )
    # Jax raises the errors of its coordinator, whose types differ by version.
    except Exception as error:
        shown = " ".join(str(error).split())[:300]
        what = f"the processes cannot meet ({shown})"
        raise UserError(meeting.failed(place, what)) from error


def _avoid_blocked_threads(jax) -> None:
    """Lets collective operations on CPUs have a thread each.

    Each blocks a thread of XLA. With fewer threads, processes that start them in
    different orders wait for each other without end.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if (os.cpu_count() or 1) < _THREADS:
        os.environ.setdefault("NPROC", str(_THREADS))


def keep_order() -> None:
    """Makes CPUs run collective operations in the order of the program.

    Otherwise processes start them in different orders and wait for each other, and
    simulated devices of one process may mix them up. Call it before a device is used.

    XLA ends the process if it does not know a flag, and so does the library for TPUs.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if os.environ.get("JAX_PLATFORMS") != "cpu" or SAME_ORDER in given:
        return
    if _is_flag(SAME_ORDER.partition("=")[0].lstrip("-")):
        os.environ["XLA_FLAGS"] = f"{given} {SAME_ORDER}".strip()


def _is_flag(name: str) -> bool:
    """Returns whether the installed XLA has a flag."""
    found = importlib.util.find_spec("jaxlib")
    folder = pathlib.Path(found.origin).parent if found and found.origin else None
    for path in folder.glob("libjax_common.*") if folder else ():
        with path.open("rb") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.find(name.encode()) >= 0:
                    return True
    return False


def why_alone(place: clusters.Place) -> str:
    """Returns the message for a process that waited for the others in vain."""
    return meeting.failed(place, f"not all processes came within {clusters.WAIT} s")


def gather(value: Any, seconds: float = PATIENCE) -> list[Any]:
    """Returns the values of all processes, by their numbers.

    Raises:
      Missing: A process did not call it in time.
    """
    if _job is None:
        return [value]
    return _exchange(f"turn-{next(_job.turns)}", value, seconds)


def _exchange(turn: str, value: Any, seconds: float) -> list[Any]:
    folder = f"anchor/{turn}/"
    _job.client.key_value_set(f"{folder}{index()}", json.dumps(value))
    try:
        _job.client.wait_at_barrier(folder, round(1000 * seconds))
    # The errors of jax's coordinator have no type of their own.
    except Exception as error:
        missing = [one for one in range(count()) if str(one) not in _stored(folder)]
        names = ", ".join(name(one) for one in missing[:8]) or "another process"
        raise Missing(f"{names} did not answer within {seconds:g} s") from error
    found = _stored(folder)
    return [json.loads(found[str(one)]) for one in range(count())]


def _stored(folder: str) -> dict[str, str]:
    entries = _job.client.key_value_dir_get(folder)
    return {place.removeprefix(folder): text for place, text in entries}


def share(value: Any, seconds: float = PATIENCE) -> Any:
    """Returns the first process's value.

    Raises:
      Missing: A process did not call it in time.
    """
    return gather(value if is_first() else None, seconds)[0]


def post(name: str, value: Any) -> None:
    """Shows a value to the other processes, instead of an earlier one of this name.

    It waits for the coordinator, but for no other process.
    """
    if _job is not None:
        _job.client.key_value_set(
            f"{_POSTS}{name}/{index()}", json.dumps(value), allow_overwrite=True
        )


def posted(name: str) -> dict[int, Any]:
    """Returns the newest value of each process that has posted one, by its number."""
    if _job is None:
        return {}
    found = _stored(f"{_POSTS}{name}/")
    return {int(number): json.loads(text) for number, text in found.items()}


def barrier(what: str, seconds: float = PATIENCE) -> None:
    """Waits until all processes have called it.

    Raises:
      Missing: A process did not call it in time.
    """
    try:
        gather(what, seconds)
    except Missing as error:
        raise Missing(f"{what}: {error}") from error


def agree(facts: Mapping[str, Any], seconds: float = PATIENCE) -> None:
    """Checks that all processes give the same values.

    Args:
      facts: JSON values by name.
      seconds: time to wait for the others.

    Raises:
      UserError: Values differ; each is named with the processes that have it.
      Missing: A process did not call it in time.
    """
    text = json.dumps(dict(facts), sort_keys=True)
    if len({*gather(hashlib.sha256(text.encode()).hexdigest(), seconds)}) == 1:
        return
    differing = differences(gather(dict(facts)), name)
    if differing:
        raise UserError(
            "the processes of this job disagree; start all with the same command,"
            " versions and devices:\n" + "\n".join(differing)
        )


def differences(
    facts: list[Mapping[str, Any]], name: Callable[[int], str]
) -> list[str]:
    """Returns a line for each fact in which processes differ from most of them.

    Args:
      facts: JSON values by name, of each process.
      name: returns the name of a process.
    """
    lines = []
    for fact in dict.fromkeys(key for one in facts for key in one):
        values = [json.dumps(one.get(fact), sort_keys=True) for one in facts]
        ((usual, times), *others) = collections.Counter(values).most_common()
        if not others:
            continue
        odd = [n for n, value in enumerate(values) if value != usual]
        own = [f"{name(n)} has {shown(json.loads(values[n]))}" for n in odd]
        lines.append(
            f"{fact}: {'; '.join(some(own))}; {times} have {shown(json.loads(usual))}"
        )
    return lines


def versions() -> dict[str, Any]:
    """Returns what determines the programs that a process compiles, for `agree`."""
    found = {}
    for package in _PACKAGES:
        try:
            found[f"version of {package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[f"version of {package}"] = None
    for variable in _FLAGS:
        words = os.environ.get(variable, "").split()
        found[variable] = sorted(x for x in words if not x.startswith(_FREE))
    import jax

    return found | {one: str(getattr(jax.config, one, None)) for one in _OF_JAX}


def devices() -> dict[str, Any]:
    """Returns the kind and number of this process's devices, for `agree`."""
    import jax

    found = jax.local_devices()
    return {"devices per process": len(found), "kind of device": found[0].device_kind}


def may_start(step: int) -> bool:
    """Returns whether the next step of a loop may start.

    In a job of several processes all get the same answer for the same step. Each must
    call it before each step, and `leave_steps` after the last one.
    """
    if _job is None:
        return not interrupts.stop_requested()
    return _job.peers.may_start(step)


def leave_steps() -> bool:
    """Ends the loop of `may_start`; returns whether all stopped at the same step."""
    if _job is None:
        return True
    _job.peers.leave_steps()
    return _job.peers.is_agreed()


def blames_peer(error: BaseException) -> bool:
    """Returns whether an error may be the consequence of another process's end."""
    if not _is_connected() or isinstance(error, UserError):
        return False
    if isinstance(error, Missing) or "RESOURCE_EXHAUSTED" in str(error):
        return isinstance(error, Missing)
    return bool(_FROM_PEER.search(f"{type(error).__name__} {error}"))


def await_verdict() -> None:
    """Waits until it is known which process was lost; that ends this process.

    Returns if none was. Then this process's own error is the cause.
    """
    time.sleep(_VERDICT)


def close(status: int, reason: str = "") -> int:
    """Ends the job's work in this process, and returns the job's exit status.

    If it is not 0, the process must exit at once, without waiting for the others.

    Args:
      status: the exit status of this process.
      reason: the message if the others need not finish their work.
    """
    if not _is_connected():
        return status
    have_all_come = False
    if not reason:
        # Otherwise a process that is still saving would lose the coordinator. If a
        # process has failed, its reason ends this one.
        with contextlib.suppress(Exception):
            status = max(_exchange("close", status, _CLOSING))
            have_all_come = True
    if status:
        _write_end(status, reason)
    _job.peers.close()
    if have_all_come and not status and _job.is_apart:
        # Jax does not know of the connection, so at its exit it would not wait for
        # slower processes, which end with an error if process 0 goes first.
        _disconnect_within(_LEAVING)
    return status


def _disconnect_within(seconds: float) -> None:
    """Ends the connection, unless a process was lost just now."""

    def disconnect() -> None:
        with contextlib.suppress(Exception):
            _disconnect()

    thread = threading.Thread(target=disconnect, daemon=True)
    thread.start()
    thread.join(seconds)


def _is_connected() -> bool:
    return _job is not None and not _has_parted


def is_joined() -> bool:
    """Returns whether this process has joined a job of several processes."""
    return _job is not None


def is_printing() -> bool:
    """Returns whether this process prints what all processes would print."""
    return _job is None or is_first()


def is_said_by_first(reason: str, seconds: float = 2.0) -> bool:
    """Returns whether the first process ends for the same reason, and so prints it."""
    if is_printing() or not _is_connected():
        return False
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if _job.peers.ends().get(0, {}).get("reason") == reason:
            return True
        time.sleep(0.1)
    return False


def _write_end(status: int, reason: str = "") -> None:
    """Tells the others that this process ends; the coordinator ends last."""
    _job.peers.write_end(status, reason)
    deadline = time.monotonic() + FOLLOWING + 2
    while is_first() and time.monotonic() < deadline:
        time.sleep(0.2)
        if len(_job.peers.ends()) == count():
            return


def _follow(number: int, status: int, reason: str) -> None:
    """Ends this process, because another one has failed."""
    why = f": {reason}" if reason else ""
    interrupts.end(status, f"{name(number)} ended with status {status}{why}")
