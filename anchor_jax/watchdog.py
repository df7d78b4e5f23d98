"""Ends a training that makes no progress, after writing where each thread is.

A collective operation waits without end if another process or a network hangs. A thread
therefore compares the time since the last step with the usual time of a step.

The thread runs Python code. In a job of several processes a timer of `faulthandler`,
which does not, ends the process if some other code lets no Python run.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import pathlib
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterator

from anchor_jax import interrupts, places, remote, supervisor

STATUS = 76
"""Exit status of a training that made no progress."""

_CHECK = 1.0  # seconds
_ASLEEP = 20.0  # seconds without a check, after which the process was itself stopped
_REMEMBERED = 50  # steps
_UPLOAD = 5.0  # seconds, less than `interrupts` gives a function at the end
_MESSAGES = 2  # descriptor of the messages that the parent reads


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """The section `watchdog`: when a training counts as hanging.

    Attributes:
      medians: a step may take this many times the median of the steps before it. 0
        turns the watchdog off.
      least: seconds that every step may take.
      most: seconds for what takes long by nature: the first step of each kind, which
        compiles, saving a checkpoint, and sample videos.
    """

    medians: float = 10.0
    least: float = 120.0
    most: float = 3600.0


class Watchdog:
    """Watches the steps of a training, in a thread."""

    def __init__(
        self,
        config: WatchdogConfig,
        stacks: pathlib.Path,
        end: Callable[[int, str], None] = interrupts.end,
        clock: Callable[[], float] = time.monotonic,
        copy: places.Place | None = None,
    ):
        """Initializes; entering the object as a context starts the thread.

        Args:
          config: the limits.
          stacks: file for the stacks of all threads.
          end: called with `STATUS` and a line if the training hangs.
          clock: returns seconds.
          copy: object in a bucket to copy `stacks` to.
        """
        self.config, self.stacks, self.copy = config, stacks, copy
        self._end, self._clock = end, clock
        self._seconds = collections.deque(maxlen=_REMEMBERED)
        self._known: set[Hashable] = set()
        self._started: collections.deque[Hashable] = collections.deque()
        self._since: float | None = None
        self._busy, self._is_written = "", False
        self._checked = clock()
        self._stopped = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.config.medians:
            interrupts.at_end.append(self._write_for)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._stopped.set()
        if self._write_for in interrupts.at_end:
            interrupts.at_end.remove(self._write_for)

    def started(self, kind: Hashable) -> None:
        """Declares that a step starts; the steps before it may still run.

        Args:
          kind: steps of one kind run the same programs.
        """
        self._since = self._since or self._clock()
        self._started.append(kind)

    def ended(self) -> None:
        """Declares that the oldest step has ended."""
        now, kind = self._clock(), self._started.popleft()
        if kind in self._known:
            self._seconds.append(now - self._since)
        self._known.add(kind)
        self._since = now

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """A section that may take `most` seconds; it does not count as part of a step.

        Args:
          what: the work, for the message.
        """
        began, before, self._busy = self._clock(), self._busy, what
        since, self._since = self._since, began
        try:
            yield
        finally:
            # The time before the section still belongs to the step.
            self._since = since and since + self._clock() - began
            self._busy = before

    def check(self) -> None:
        """Ends the process if the training hangs."""
        now, last = self._clock(), self._checked
        self._checked = now
        if self._since is None:
            return
        if now - last > _ASLEEP:
            # This process was suspended, and its step with it.
            self._since += now - last
        allowed, usual = self._allowed()
        if now - self._since > allowed:
            began, self._since = self._since, None
            place = self.write_stacks()
            what = f"{self._busy} takes" if self._busy else "no step for"
            self._end(
                STATUS,
                f"{what} {now - began:.0f} s{usual}; the stacks of all threads"
                f" are in {place}; exit status {STATUS}",
            )

    def write_stacks(self) -> places.Place:
        """Writes the Python stacks of all threads, and returns where they are."""
        self._is_written = True
        with contextlib.suppress(OSError), self.stacks.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        if self.copy and remote.upload_within(_UPLOAD, self.stacks, self.copy):
            return self.copy
        return self.stacks

    def _allowed(self) -> tuple[float, str]:
        """Returns the seconds that the current work may take, and the usual ones."""
        config = self.config
        is_new = not self._known.issuperset(self._started)
        if self._busy or is_new or not self._seconds:
            return config.most, ""
        median = statistics.median(self._seconds)
        allowed = max(config.least, config.medians * median)
        return allowed, f", while a step usually takes {median:.3g} s"

    def _watch(self) -> None:
        while not self._stopped.wait(_CHECK):
            if supervisor.keeps_messages():
                self._set_timer()
            self.check()
        faulthandler.cancel_dump_traceback_later()

    def _set_timer(self) -> None:
        """Ends the process unless this is called again in time."""
        seconds = max(self.config.most, 3 * _CHECK)
        faulthandler.dump_traceback_later(seconds, exit=True, file=_MESSAGES)

    def _write_for(self, status: int) -> None:
        """Writes the stacks too if another process of the job hangs."""
        if status == STATUS and not self._is_written:
            self.write_stacks()
