"""The small parent of a process of a job: it outlives a crash of jax, and explains it.

When jax loses another process, its C++ code ends this one with a stack that names no
host. So each process of a job is the child of a parent that imports no jax. The parent
passes signals on, keeps the C++ messages in a file, and prints the last line: which
process was lost, and where the messages are.
"""

import contextlib
import ctypes
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from typing import Any, NoReturn

from anchor_jax import interrupts, places, remote
from anchor_jax.errors import UserError

AGAIN, FAILED, STUCK = 75, 2, 76
"""Exit statuses: "start me again", wrong input, no progress (as in `interrupts`, `cli`
and `watchdog`)."""

_REQUESTS = {signal.SIGINT: 130, signal.SIGTERM: AGAIN}
_FORWARDED = (*_REQUESTS, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PATIENCE = 10  # seconds after a second signal
_MOST = 100_000  # characters of the C++ messages that are read
_DEATH_SIGNAL = 1  # of `prctl`, PR_SET_PDEATHSIG
_CRASHES = (1, STUCK)  # statuses of a child after which its C++ messages are kept
_UPLOAD = 20.0  # seconds to copy them into a bucket
# Settings that ask NCCL and XLA for messages, which are then kept in any case.
_ASKING = re.compile(
    r"NCCL_DEBUG=.+|TF_CPP_(MAX_VLOG_LEVEL|VMODULE)=.+|TF_CPP_MIN_LOG_LEVEL=0"
)
# What faulthandler writes before it ends a process whose Python is blocked.
_BLOCKED = re.compile(r"^Timeout \((\d+:\d\d:\d\d)", re.MULTILINE)

# Messages of jax's coordination service. The first names the processes that were lost;
# the second means that process 0 is gone, because it answers for the service.
_SILENT = re.compile(r"stopped sending heartbeats\):\s*([^\n]*(?:\n[\d,\s]+)?)")
_NO_LEADER = re.compile(
    r"leader task|remote target coordination_service|CoordinationService/Heartbeat"
)
_SERVICE = re.compile(r"coordination service|JAX distributed service", re.IGNORECASE)

_lock = threading.Lock()
_parent: int | None = None  # the descriptor that the parent reads


@dataclasses.dataclass
class _Streams:
    """Standard output and error of a child, before C++ messages go to a file."""

    out: int
    err: int


_streams: _Streams | None = None


def start() -> None:
    """Splits this process: the child returns, and the parent never does.

    The parent exits with the child's status, with `AGAIN` if another process was lost,
    or with 128 and the signal's number if a signal ended the child. Requests to stop
    are blocked in the child until it handles them. Does nothing on systems without
    `fork`.
    """
    if not hasattr(os, "fork"):
        return
    log, place = tempfile.mkstemp(prefix="anchor-jax-", suffix=".log")
    source, sink = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)
    child = os.fork()
    if child:
        os.close(sink)
        os.close(log)
        parent = _Parent(child, pathlib.Path(place))
        parent.listen(source)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        parent.exit()
    os.close(source)
    _begin(log, sink)


def tell(**facts: Any) -> None:
    """Tells the parent JSON values, which it uses in its last line.

    Args:
      **facts: `joining`: the message if the processes cannot meet; `name`, `hosts`: the
        name of this process and all hosts; `folder`: where messages are kept; `status`:
        the exit status if a process is lost, or this one is killed, after a request to
        stop; `last`: a line to print at the end.
    """
    if _parent is None:
        return
    with _lock, contextlib.suppress(OSError):
        os.write(_parent, json.dumps(facts).encode() + b"\n")


def keeps_messages() -> bool:
    """Returns whether descriptor 2 is the file of C++ messages, which the parent reads.

    If `faulthandler` then ends the process, the parent exits with `STUCK`.
    """
    return _streams is not None


def release() -> None:
    """Sends C++ messages to the terminal again, in a job of one process."""
    global _streams
    if _streams is None:
        return
    os.dup2(_streams.out, 1)
    os.dup2(_streams.err, 2)
    _streams = None


def _begin(log: int, sink: int) -> None:
    """Sends what C++ prints to a file, and what Python prints to the terminal."""
    global _parent, _streams
    _parent = sink
    _die_with_parent()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _streams = _Streams(os.dup(1), os.dup(2))
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # With PYTHONUNBUFFERED streams do not count as line buffered.
    is_direct = sys.stdout.line_buffering or sys.stdout.write_through
    sys.stdout = _reopened(sys.stdout, _streams.out, 1 if is_direct else -1)
    sys.stderr = _reopened(sys.stderr, _streams.err, 1)


def _reopened(stream: io.TextIOWrapper, place: int, buffering: int) -> io.TextIOWrapper:
    """Returns a text stream like another one, on a descriptor."""
    return open(  # noqa: SIM115 - it stays open until the process ends.
        place,
        "w",
        buffering=buffering,
        encoding=stream.encoding,
        errors=stream.errors,
    )


def _die_with_parent() -> None:
    """Kills this process if its parent is killed; Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)


@dataclasses.dataclass(eq=False)
class _Parent:
    """The parent of a process of a job.

    Attributes:
      child: id of the child.
      log: file of the child's C++ messages.
      facts: the values that the child gave.
      first: time of the first signal.
    """

    child: int
    log: pathlib.Path
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    first: float | None = None

    def listen(self, source: int) -> None:
        """Passes signals on, and reads what the child tells."""
        for one in _FORWARDED:
            signal.signal(one, self._pass_on)
        signal.signal(signal.SIGALRM, lambda number, frame: self._send(signal.SIGKILL))
        self._reader = threading.Thread(target=self._read, args=(source,), daemon=True)
        self._reader.start()

    def exit(self) -> NoReturn:
        """Waits for the child, prints the last line, and exits."""
        _, result = os.waitpid(self.child, 0)
        self._reader.join(1)
        text = ""
        with contextlib.suppress(OSError):
            text = self.log.read_text(errors="replace")[-_MOST:]
        status, line = explain(result, self.facts, text)
        settings = (f"{name}={value}" for name, value in os.environ.items())
        is_asked = any(map(_ASKING.fullmatch, settings))
        kept = self._keep(os.WIFSIGNALED(result) or status in _CRASHES or is_asked)
        if kept:
            line = "; ".join(filter(None, [line, f"messages of C++: {kept}"]))
        if line:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"{line}\n")
                sys.stderr.flush()
        os._exit(status)

    def _pass_on(self, number: int, frame) -> None:
        del frame
        now = time.monotonic()
        is_request = number in _REQUESTS
        if (
            is_request
            and self.first is not None
            and now > self.first + interrupts.REBOUND_IN_JOB
        ):
            # The child ends by itself unless its Python is blocked.
            signal.alarm(_PATIENCE)
        if is_request and self.first is None:
            self.first = now
            self.facts.setdefault("status", _REQUESTS[number])
        self._send(number)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, number)

    def _read(self, source: int) -> None:
        with open(source, encoding="utf-8") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    self.facts.update(json.loads(line))

    def _keep(self, is_needed: bool) -> places.Place | None:
        """Moves the messages into the run's folder, or removes them."""
        with contextlib.suppress(OSError, UserError):
            if not is_needed or not self.log.stat().st_size:
                self.log.unlink()
                return None
            folder = self.facts.get("folder")
            if not folder:
                return self.log
            place = places.place(folder) / f"process-{self.facts.get('index', 0)}.log"
            if places.is_remote(place):
                # A pod loses its own files at its end.
                if remote.upload_within(_UPLOAD, self.log, place):
                    self.log.unlink()
                    return place
                return self.log
            if place.parent.is_dir():
                shutil.move(self.log, place)
                return place
        return self.log


def explain(result: int, facts: dict[str, Any], text: str) -> tuple[int, str]:
    """Returns the exit status and the last line for the end of a child.

    Args:
      result: its result, as `os.waitpid` returns it.
      facts: the values that it gave with `tell`.
      text: its C++ messages.
    """
    name = facts.get("name", "this process")
    if os.WIFEXITED(result):
        status, blocked = os.WEXITSTATUS(result), _BLOCKED.search(text)
        if status == 1 and blocked:
            what = f"no Python code ran for {blocked[1]}, see the stacks of all threads"
            return STUCK, f"{name} ends with status {STUCK}: {what}"
        return status, facts.get("last", "")
    number = os.WTERMSIG(result)
    if number == signal.SIGABRT and _SERVICE.search(text):
        if "hosts" not in facts:
            why = facts.get("joining", "the processes did not meet")
            return FAILED, f"error: {why}"
        status = facts.get("status", AGAIN)
        lost = ", ".join(lost_processes(text, facts["hosts"])) or "another process"
        return status, f"{name} ends with status {status}: lost {lost}"
    status = _REQUESTS.get(number, 128 + number)
    if number == signal.SIGKILL:  # after a request: the parent, or the launcher
        status = facts.get("status", status)
    why = ", perhaps because memory ran out" if number == signal.SIGKILL else ""
    what = f"{signal.Signals(number).name} ended it{why}"
    return status, f"{name} ends with status {status}: {what}"


def lost_processes(text: str, hosts: list[str]) -> list[str]:
    """Returns names of the processes that were lost, from jax's messages."""
    found = _SILENT.search(text)
    numbers = {int(one) for one in re.findall(r"\d+", found[1])} if found else set()
    # Older versions write /job:jax_worker/replica:0/task:1.
    if found and "task:" in found[1]:
        numbers = {int(one) for one in re.findall(r"task:(\d+)", found[1])}
    if not numbers and _NO_LEADER.search(text):
        numbers = {0}
    return [
        f"process {one} ({hosts[one]})" for one in sorted(numbers) if one < len(hosts)
    ]
