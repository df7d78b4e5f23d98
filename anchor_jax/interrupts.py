"""Requests to stop: Ctrl-C (SIGINT) and SIGTERM.

A handler only sets a flag, since an exception that it raised could be swallowed in a
library's callback. Long work calls `check` wherever it can stop. In a process of the
command line a thread watches besides: it learns of a request even while the main
thread loads or compiles, where no Python handler can run. It ends the process when the
main thread does not stop within `GRACE` seconds, and at once at a second Ctrl-C.
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
"""Seconds in which work stops that has declared nothing else."""

STATUS = 130
"""Exit status of a command that was asked to stop."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REBOUND = 0.2  # seconds; some programs that start others pass Ctrl-C on to them twice
_POLL = 0.05  # seconds

_asked = threading.Event()
_ending = threading.Event()
_brief = threading.RLock()


@dataclasses.dataclass(eq=False)
class _Process:
    """How this process reacts.

    Attributes:
      is_watched: whether a thread ends it, as in processes of the command line.
      is_listening: whether the handlers are installed.
      stopping: whether the main thread has seen the request.
      calm: when the main thread last reached a place where it could stop.
      sections: that are waited for; the innermost last.
      status: of the command, once it has ended.
    """

    is_watched: bool = False
    is_listening: bool = False
    stopping: bool = False
    calm: float = 0.0
    sections: list["_Section"] = dataclasses.field(default_factory=list)
    status: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Section:
    """Work that is waited for.

    Attributes:
      message: shown at the request.
      since: returns when the work began that would be lost; None: it is waited for
        without an end.
      least: seconds that are waited in any case.
    """

    message: str
    since: Callable[[], float] | None
    least: float

    def patience(self, asked: float) -> float:
        """Returns the seconds to wait: as long as what would be lost took."""
        if self.since is None:
            return math.inf
        try:
            return max(self.least, asked - self.since())
        except Exception:  # noqa: BLE001 - the thread that watches must go on.
            return self.least


_process = _Process()


def asked() -> bool:
    """Returns whether the process was asked to stop."""
    return _asked.is_set()


def check() -> None:
    """Ends long work here, if the process was asked to stop.

    Does nothing outside the main thread, where libraries would swallow what is raised.

    Raises:
      Stopped: It was.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not _asked.is_set() or not is_main:
        return
    if not _process.stopping:
        _process.stopping, _process.calm = True, time.monotonic()
    raise Stopped("interrupted")


def checking(progress: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that is called while work goes on, with a `check` before."""

    def check_and_go_on(*arguments):
        check()
        return progress(*arguments)

    return check_and_go_on


@contextlib.contextmanager
def patient(
    message: str = "",
    since: Callable[[], float] | None = None,
    least: float = GRACE,
) -> Iterator[None]:
    """A section that ends soon after a request, and whose end is waited for.

    A second Ctrl-C does not wait.

    Args:
      message: shown at the request: what is waited for.
      since: returns `time.monotonic()` of when the work began that would be lost. The
        section is waited for as long as that work took. None: it is waited for
        without an end.
      least: seconds that it is waited for in any case.
    """
    section = _Section(message, since, least)
    _process.sections.append(section)
    try:
        yield
    finally:
        _process.calm = time.monotonic()
        _process.sections.remove(section)


def uninterrupted() -> contextlib.AbstractContextManager:
    """A brief section, such as some renames, in which the process is not ended."""
    return _brief


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Holds requests back, here and in processes that are started meanwhile.

    Such a process gets them when it calls `install`.
    """
    from multiprocessing import resource_tracker

    # It would let them through again when it starts, with the first process.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Listens to requests, in a process that is not the command line's own.

    The first one is for `check` and `asked`; a second Ctrl-C is a `KeyboardInterrupt`.
    Does nothing within itself, after `install`, and outside the main thread.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if _process.is_listening or not is_main:
        yield
        return
    # A handler that is not Python's could not be put back.
    ours = [one for one in _SIGNALS if signal.getsignal(one) is not None]
    before = {one: signal.signal(one, _note) for one in ours}
    _process.is_listening = True
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        _process.is_listening = _process.stopping = False
        _asked.clear()


def install() -> None:
    """Makes this process the command line's own: a thread watches for requests."""
    if _process.is_watched:
        return
    _process.is_watched = _process.is_listening = True
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(source,), daemon=True).start()
    for one in _SIGNALS:
        signal.signal(one, _note)
    # A parent may have held them back until now.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # Registered first and hence run last, when libraries have ended their work.
    atexit.register(_leave)


def leave_with(status: int) -> int:
    """Returns the process's exit status, which a request that is too late changes too.

    After a request nothing more is shown: what libraries say then is of no use.
    """
    _process.status = status
    if _asked.is_set():
        _flush_streams()
        _silence()
        _process.status = STATUS
    return _process.status


def _note(number: int, frame) -> None:
    """Handles a signal in the main thread."""
    del frame
    if _ending.is_set():
        _halt()
    again = _asked.is_set() and number == signal.SIGINT
    if again and not _process.is_watched:
        raise KeyboardInterrupt
    _asked.set()


def _watch(source: int) -> None:
    """Reads the numbers of signals, and ends the process if the main thread does not.

    Runs in a thread of its own.
    """
    first = None
    while True:
        wait = None if first is None else _POLL
        ready, _, _ = select.select([source], [], [], wait)
        numbers = os.read(source, 64) if ready else b""
        now = time.monotonic()
        if first is None and any(one in numbers for one in _SIGNALS):
            first = now
            _asked.set()
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
    """Returns when a process that was asked to stop is ended."""
    waits = [section.patience(first) for section in _process.sections]
    if waits:
        return first + max(waits)
    return max(first, _process.calm) + GRACE


def _end() -> NoReturn:
    """Ends the process, without what is half made."""
    try:
        _brief.acquire(timeout=1)
        _ending.set()
        # The main thread must write nothing more: its handler does not return now.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if not _process.stopping and _process.status is None:
            _show("interrupted")
        _within(0.5, _flush_streams)
        _silence()
        _within(1.5, io.remove_unfinished)
    finally:
        os._exit(STATUS)


def _leave() -> None:
    """Ends the process, before the interpreter's own end, where a request is lost."""
    if _ending.is_set():
        _halt()
    if _process.status is None and not _asked.is_set():
        return
    _flush_streams()
    os._exit(STATUS if _asked.is_set() else _process.status)


def _halt() -> NoReturn:
    """Waits while another thread ends the process."""
    while True:
        time.sleep(1)


def _show(line: str) -> None:
    """Writes a line to standard error, whose lock another thread may hold."""
    with contextlib.suppress(OSError):
        start = "\n" if os.isatty(2) else ""
        os.write(2, f"{start}{line}\n".encode())


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Works at most so long: the main thread, which stands still, may hold a lock."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)


def _flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _forget() -> None:
    """Gives a forked child the usual handlers: its signals are not its parent's."""
    global _process, _asked, _ending, _brief
    if _process.is_watched:
        signal.set_wakeup_fd(-1)
    if _process.is_listening:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _process, _brief = _Process(), threading.RLock()
    _asked, _ending = threading.Event(), threading.Event()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _silence() -> None:
    """Shows nothing more, not even what libraries say as they end."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
