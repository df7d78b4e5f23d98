"""Where a process's time goes: seconds by cause, without a gap."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

STARTING, HOST, DEVICE = "starting", "host", "device"
DATA, COMPILING = "data", "compiling"
SAVING, SAMPLING, PROFILING = "saving", "sampling", "profiling"

_COMPILES = "/jax/core/compile/"  # tracing, lowering, compiling or reading the cache
_REMEMBERED = 1000  # compilations that a later one may contain


class Times:
    """The seconds of a process's main thread, by cause.

    Every second has one cause: the innermost `of`, or `STARTING` outside. What jax
    compiles meanwhile is taken from that cause and counted as `COMPILING`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Starts to count.

        Args:
          clock: returns seconds.
        """
        self._clock = clock
        self._seconds: collections.Counter[str] = collections.Counter()
        self._causes = [STARTING]
        self._since = clock()
        # The ends of compilations and their seconds.
        self._compiles = collections.deque(maxlen=_REMEMBERED)

    def seconds(self) -> dict[str, float]:
        """Returns the seconds until now, by cause."""
        self._settle()
        return dict(self._seconds)

    @contextlib.contextmanager
    def of(self, cause: str) -> Iterator[None]:
        """Counts the time inside as that of a cause."""
        self._settle()
        self._causes.append(cause)
        try:
            yield
        finally:
            self._settle()
            self._causes.pop()

    def counted(self, cause: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function whose calls by the main thread count as a cause."""

        def call(*arguments):
            if threading.current_thread() is not threading.main_thread():
                return function(*arguments)
            with self.of(cause):
                return function(*arguments)

        return call

    @contextlib.contextmanager
    def separating_compiles(self) -> Iterator[None]:
        """Counts the main thread's compilations separately."""
        listen = self._note_event
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    def compiled(self, seconds: float) -> None:
        """Moves seconds that end now from the current cause to `COMPILING`.

        Tracing a function contains the tracing of the functions that it calls; the
        time of both counts once.
        """
        self._settle()
        start, inner = self._since - seconds, 0.0
        while self._compiles and self._compiles[-1][0] > start:
            inner += self._compiles.pop()[1]
        self._compiles.append((self._since, max(seconds, inner)))
        self._seconds[self._causes[-1]] -= max(0.0, seconds - inner)
        self._seconds[COMPILING] += max(0.0, seconds - inner)

    def _note_event(self, event: str, seconds: float, **details) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and event.startswith(_COMPILES):
            self.compiled(seconds)

    def _settle(self) -> None:
        now = self._clock()
        self._seconds[self._causes[-1]] += now - self._since
        self._since = now
