"""Handles requests to stop: Ctrl-C (SIGINT) and SIGTERM.

The signal handler only sets a flag, because a library's callback could swallow an
exception. Long work calls `check` wherever it can stop. In a command-line process a
thread also watches for requests. It notices them even while the main thread loads or
compiles, when no Python handler can run. The thread ends the process if the main thread
does not stop within `GRACE` seconds, and immediately after a second Ctrl-C.
"""

import atexit
import contextlib
import dataclasses
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
"""Exit status of a command that stopped on request."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REBOUND = 0.2  # seconds; some launchers pass a single Ctrl-C to their children twice
_POLL = 0.05  # seconds

_requested = threading.Event()
_ending = threading.Event()
_brief = threading.RLock()


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
    """

    is_watched: bool = False
    is_listening: bool = False
    stopping: bool = False
    calm: float = 0.0
    sections: list["_Section"] = dataclasses.field(default_factory=list)
    status: int | None = None


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
        _requested.clear()


def install() -> None:
    """Makes this a command-line process, in which a thread watches for requests."""
    if _process.is_watched:
        return
    _process.is_watched = _process.is_listening = True
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(source,), daemon=True).start()
    for one in _SIGNALS:
        signal.signal(one, _note)
    # A parent process may have blocked the signals.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # It is registered first, so that it runs last, after the libraries' own handlers.
    atexit.register(_leave)


def leave_with(status: int) -> int:
    """Returns the process's exit status, which a late request may still change.

    After a request nothing more is printed, because messages of libraries would only be
    confusing.
    """
    _process.status = status
    if _requested.is_set():
        _flush_streams()
        _silence()
        _process.status = STATUS
    return _process.status


def _note(number: int, frame) -> None:
    """Handles a signal in the main thread."""
    del frame
    if _ending.is_set():
        _halt()
    again = _requested.is_set() and number == signal.SIGINT
    if again and not _process.is_watched:
        raise KeyboardInterrupt
    _requested.set()


def _watch(source: int) -> None:
    """Reads signal numbers, and ends the process if the main thread does not stop.

    Runs in its own thread.
    """
    first = None
    while True:
        wait = None if first is None else _POLL
        ready, _, _ = select.select([source], [], [], wait)
        numbers = os.read(source, 64) if ready else b""
        now = time.monotonic()
        if first is None and any(one in numbers for one in _SIGNALS):
            first = now
            _requested.set()
            _announce()
        elif first is not None and signal.SIGINT in numbers and now > first + _REBOUND:
            _end()
        if first is not None and now > _deadline(first):
            _end()


def _announce() -> None:
    for section in _process.sections[-1:]:
        if section.message:
            _show(section.message)


def _deadline(first: float) -> float:
    """Returns the time at which the process is ended after a request."""
    waits = [section.patience(first) for section in _process.sections]
    if waits:
        return first + max(waits)
    return max(first, _process.calm) + GRACE


def _end() -> NoReturn:
    """Ends the process and removes incomplete files."""
    try:
        _brief.acquire(timeout=1)
        _ending.set()
        # The main thread must not write any more, so its handler never returns.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if not _process.stopping and _process.status is None:
            _show("interrupted")
        _within(0.5, _flush_streams)
        _silence()
        _within(1.5, io.remove_unfinished)
    finally:
        os._exit(STATUS)


def _leave() -> None:
    """Ends the process before the interpreter's own exit, which ignores requests."""
    if _ending.is_set():
        _halt()
    if _process.status is None and not _requested.is_set():
        return
    _flush_streams()
    os._exit(STATUS if _requested.is_set() else _process.status)


def _halt() -> NoReturn:
    """Waits while another thread ends the process."""
    while True:
        time.sleep(1)


def _show(line: str) -> None:
    """Writes a line to standard error without Python's lock on the stream."""
    with contextlib.suppress(OSError):
        start = "\n" if os.isatty(2) else ""
        os.write(2, f"{start}{line}\n".encode())


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
    global _process, _requested, _ending, _brief
    if _process.is_watched:
        signal.set_wakeup_fd(-1)
    if _process.is_listening:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _process, _brief = _Process(), threading.RLock()
    _requested, _ending = threading.Event(), threading.Event()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _silence() -> None:
    """Discards all further output, including that of libraries at exit."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
