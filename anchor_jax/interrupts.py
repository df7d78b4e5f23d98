"""Handles requests to stop: Ctrl-C (SIGINT) and SIGTERM.

The signal handler only sets a flag, because a library's callback could swallow an
exception. Long work calls `check` wherever it can stop. In a command-line process a
thread also watches for requests. It notices them even while the main thread loads or
compiles, when no Python handler can run. The thread ends the process if the main thread
does not stop within `GRACE` seconds, and immediately after a second Ctrl-C.

In a job (`join_job`) SIGTERM means "stop, you will be started again", and a second one
ends the process immediately too, if it comes `REBOUND_IN_JOB` seconds later. Requests
to one process of a job reach all: functions in `on_request` pass them on, and `request`
takes them.
"""

import atexit
import collections
import contextlib
import dataclasses
import functools
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from anchor_jax import io
from anchor_jax.errors import Stopped

GRACE = 1.5
"""Default number of seconds that work may take to stop."""

STATUS = 130
"""Exit status of a command that stopped on request, and is not started again."""
AGAIN = 75
"""Exit status of a process of a job that asks to be started again."""

on_request: list[Callable[[int], None]] = []
"""Functions that are called with the signal of the first request."""
at_end: list[Callable[[int], None]] = []
"""Functions that are called with the exit status before a process is ended early."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REBOUND = 0.2  # seconds; some launchers pass a single Ctrl-C to their children twice
REBOUND_IN_JOB = 2.0
"""Seconds in a job, where a launcher and the parent process pass on the same signal."""
_POLL = 0.05  # seconds
_LAST_CALL = 6.0  # seconds for each function in `at_end`

_counts: collections.Counter[int] = collections.Counter()
_requested = threading.Event()
_ending = threading.Event()
_brief = threading.RLock()
_end_once = threading.Lock()


@dataclasses.dataclass(eq=False)
class _Process:
    """How this process reacts to requests.

    Attributes:
      is_watched: whether a thread watches, as in command-line processes.
      is_listening: whether the signal handlers are installed.
      stopping: whether the main thread has seen the request.
      calm: time at which the main thread last reached a point where it could stop.
      sections: active sections that must finish; the innermost is last.
      status: the command's exit status after it has ended.
      is_in_job: whether something starts this process again after `AGAIN`.
      numbers: the signals that were received, here or by other processes of the job.
      is_quiet: whether the sections' lines are not shown.
      waker: file descriptor that wakes the watching thread.
    """

    is_watched: bool = False
    is_listening: bool = False
    stopping: bool = False
    calm: float = 0.0
    sections: list["_Section"] = dataclasses.field(default_factory=list)
    status: int | None = None
    is_in_job: bool = False
    numbers: set[int] = dataclasses.field(default_factory=set)
    is_quiet: bool = False
    waker: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Section:
    """Work that may finish after a request.

    Attributes:
      message: the line shown at the request.
      since: returns the start time of the work that would be lost. None waits without
        a limit.
      least: minimum number of seconds to wait.
    """

    message: str
    since: Callable[[], float] | None
    least: float

    def patience(self, requested_at: float) -> float:
        """Returns the seconds to wait: the time that the work has taken so far."""
        if self.since is None:
            return math.inf
        try:
            return max(self.least, requested_at - self.since())
        except Exception:  # noqa: BLE001 - the watching thread must not die.
            return self.least


_process = _Process()


def stop_requested() -> bool:
    """Returns whether the process was asked to stop."""
    return _requested.is_set()


def status() -> int:
    """Returns the exit status after a request: `AGAIN` after SIGTERM in a job."""
    only_terminated = _process.numbers == {signal.SIGTERM}
    return AGAIN if _process.is_in_job and only_terminated else STATUS


def join_job() -> None:
    """Declares that this process belongs to a job that may start it again."""
    _process.is_in_job = True


def is_in_job() -> bool:
    """Returns whether `join_job` was called."""
    return _process.is_in_job


def be_quiet() -> None:
    """Prints no lines about requests, which another process of the job prints."""
    _process.is_quiet = True


def request(number: int) -> None:
    """Takes a request that another process of the job received as a signal."""
    _process.numbers.add(number)
    _requested.set()
    if _process.waker is not None:
        with contextlib.suppress(BlockingIOError):
            os.write(_process.waker, b"\0")


def check() -> None:
    """Raises Stopped if the process was asked to stop.

    Does nothing outside the main thread, where libraries would swallow the exception.

    Raises:
      Stopped: The process was asked to stop.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not _requested.is_set() or not is_main:
        return
    if not _process.stopping:
        _process.stopping, _process.calm = True, time.monotonic()
    raise Stopped("interrupted")


def checking(progress: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a progress function such that it calls `check` first."""

    def check_and_continue(*arguments):
        check()
        return progress(*arguments)

    return check_and_continue


@contextlib.contextmanager
def patient(
    message: str = "",
    since: Callable[[], float] | None = None,
    least: float = GRACE,
) -> Iterator[None]:
    """A section that may finish after a request, because it will end soon.

    A second Ctrl-C does not wait for it.

    Args:
      message: the line shown at the request; it names the work that must finish.
      since: returns the `time.monotonic()` at which the work that would be lost
        started. The wait is limited to the duration of that work. None waits without a
        limit.
      least: minimum number of seconds to wait.
    """
    section = _Section(message, since, least)
    _process.sections.append(section)
    try:
        yield
    finally:
        _process.calm = time.monotonic()
        _process.sections.remove(section)


def uninterrupted() -> contextlib.AbstractContextManager:
    """A brief section, such as a few renames, that always finishes before an exit."""
    return _brief


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Blocks requests, here and in processes that are started inside.

    Such a process receives them when it calls `install`.
    """
    from multiprocessing import resource_tracker

    # The thread is started now, because its start unblocks the signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Handles requests in a process that is not a command-line process.

    The first request is seen by `check` and `stop_requested`. A second Ctrl-C raises
    `KeyboardInterrupt`. Does nothing if nested, after `install`, or outside the main
    thread.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if _process.is_listening or not is_main:
        yield
        return
    # A handler that was not installed from Python could not be restored.
    ours = [one for one in _SIGNALS if signal.getsignal(one) is not None]
    before = {one: signal.signal(one, _note) for one in ours}
    _process.is_listening = True
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        _process.is_listening = _process.stopping = False
        _process.numbers.clear()
        _requested.clear()


@contextlib.contextmanager
def counting(number: int) -> Iterator[None]:
    """Counts a signal that requests something and would else end the process.

    It may be nested. Does nothing outside the main thread. A command-line process
    ignores the signal afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, _count)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
    try:
        yield
    finally:
        if number in mask:
            signal.pthread_sigmask(signal.SIG_BLOCK, (number,))
        if before is not _count:
            _counts.pop(number, None)
            before = signal.SIG_IGN if _process.is_watched else before
        signal.signal(number, before)


def counted(number: int) -> int:
    """Returns how often a signal has come since the last call."""
    return _counts.pop(number, 0)


def _count(number: int, frame) -> None:
    del frame
    _counts[number] += 1


def install() -> None:
    """Makes this a command-line process, in which a thread watches for requests."""
    if _process.is_watched:
        return
    _process.is_watched = _process.is_listening = True
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    _process.waker = sink
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(source,), daemon=True).start()
    for one in _SIGNALS:
        signal.signal(one, _note)
    # A parent process may have blocked the signals.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # It is registered first, so that it runs last, after the libraries' own handlers.
    atexit.register(_leave)


def leave_with(given: int) -> int:
    """Returns the process's exit status, which a late request may still change.

    After a request nothing more is printed, because messages of libraries would only be
    confusing.
    """
    _process.status = given
    if _requested.is_set():
        _flush_streams()
        _silence()
        _process.status = status()
    return _process.status


def leave_now(number: int) -> NoReturn:
    """Exits with a status, without the libraries' own work at the exit."""
    _flush_streams()
    io.remove_unfinished()
    os._exit(number)


def _note(number: int, frame) -> None:
    """Handles a signal in the main thread."""
    del frame
    if _ending.is_set():
        _halt()
    again = _requested.is_set() and number == signal.SIGINT
    if again and not _process.is_watched:
        raise KeyboardInterrupt
    _process.numbers.add(number)
    _requested.set()


def _watch(source: int) -> None:
    """Reads signal numbers, and ends the process if the main thread does not stop.

    Runs in its own thread.
    """
    first = own = None  # times of the first request, and of the first signal
    while True:
        wait = None if first is None else _POLL
        ready, _, _ = select.select([source], [], [], wait)
        numbers = os.read(source, 64) if ready else b""
        if _ending.is_set():
            _halt()
        signals = [one for one in _SIGNALS if one in numbers]
        _process.numbers.update(signals)
        now = time.monotonic()
        # A request without a signal comes from another process.
        if first is None and (signals or 0 in numbers):
            first = now
            _requested.set()
            _announce()
        elif own is not None and now > own + _rebound() and _is_second(signals):
            _end(status())
        own = now if own is None and signals else own
        if first is not None and now > _deadline(first):
            _end(status())


def _rebound() -> float:
    """Returns the seconds in which a repeated signal is the same request."""
    return REBOUND_IN_JOB if _process.is_in_job else _REBOUND


def _is_second(signals: list[int]) -> bool:
    """Returns whether signals after the first one end the process immediately."""
    return signal.SIGINT in signals or (_process.is_in_job and bool(signals))


def _announce() -> None:
    for section in _process.sections[-1:]:
        if section.message and not _process.is_quiet:
            _show(section.message)
    for one in list(_process.numbers):
        for call in on_request:
            call(one)


def _deadline(first: float) -> float:
    """Returns the time at which the process is ended after a request."""
    waits = [section.patience(first) for section in _process.sections]
    if waits:
        return first + max(waits)
    return max(first, _process.calm) + GRACE


def end(number: int, line: str = "interrupted") -> None:
    """Ends a command-line process early, with a status and a last line.

    Does nothing in other processes.
    """
    if _process.is_watched:
        _end(number, line)


def _end(number: int, line: str = "interrupted") -> NoReturn:
    """Ends the process with a status, and removes incomplete files."""
    if not _end_once.acquire(blocking=False):
        _halt()
    try:
        _brief.acquire(timeout=1)
        _ending.set()
        # The main thread must not write any more, so its handler never returns.
        if threading.current_thread() is not threading.main_thread():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if line and not _process.stopping and _process.status is None:
            _show(line)
        _within(0.5, _flush_streams)
        _silence()
        _within(1.5, io.remove_unfinished)
        for call in at_end:
            _within(_LAST_CALL, functools.partial(call, number))
    finally:
        os._exit(number)


def _leave() -> None:
    """Ends the process before the interpreter's own exit, which ignores requests."""
    if _ending.is_set():
        _halt()
    if _process.status is None and not _requested.is_set():
        return
    _flush_streams()
    os._exit(status() if _requested.is_set() else _process.status)


def _halt() -> NoReturn:
    """Waits while another thread ends the process."""
    while True:
        time.sleep(1)


def _show(line: str) -> None:
    """Writes a line to standard error without Python's lock on the stream."""
    with contextlib.suppress(OSError):
        place = _terminal()
        start = "\n" if os.isatty(place) else ""
        os.write(place, f"{start}{line}\n".encode())


def _terminal() -> int:
    """Returns the descriptor of standard error, which a job may have moved."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Runs `work` with a time limit, because the halted main thread may hold a lock."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _forget() -> None:
    """Restores the default handlers in a forked child."""
    global _process, _requested, _ending, _brief, _end_once
    if _process.is_watched:
        signal.set_wakeup_fd(-1)
    if _process.is_listening:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _process, _brief = _Process(), threading.RLock()
    _requested, _ending = threading.Event(), threading.Event()
    _end_once = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _silence() -> None:
    """Discards all further output, including that of libraries at exit."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for place in {1, 2, _terminal()}:
            os.dup2(nowhere, place)
