"""Compares the processes of a training, and names the one that others wait for.

All devices wait for one another in every step, so all processes take equally long. What
differs is the time that a process takes outside its devices: to start programs, and to
get its data.
"""

import contextlib
import dataclasses
import statistics
import threading
from collections.abc import Callable, Mapping
from typing import Any

from anchor_jax import processes

SLOW = 0.2
"""Share of a step that a slow process takes longer than the median process."""
STARVED = 0.8
"""Share of a step that a host takes if its devices wait for it."""
PATIENCE = 3
"""Lines of the log in a row after which a slow process is named in a warning."""

_CHANNEL = "pace"
_WHAT = {
    "data": "waits {own:.3g} s per step for data (median {median:.3g} s)",
    "host": "takes {own:.3g} s per step outside its devices (median {median:.3g} s)",
    "step": "takes {own:.3g} s per step (median {median:.3g} s)",
}


@dataclasses.dataclass(frozen=True)
class Slow:
    """A process that the others wait for.

    Attributes:
      process: its number.
      excess: what it takes longer than the median, as a share of a step.
      why: what takes long, for a message.
    """

    process: int
    excess: float
    why: str


def find_slow(found: Mapping[int, Mapping[str, float]]) -> Slow | None:
    """Returns the slowest process, if it is slower than the median by `SLOW`.

    A process whose devices are busy most of the time delays nobody, however long its
    host takes.

    Args:
      found: for each process, seconds of a `step`, and in it those of the `host` and
        of waiting for `data`.
    """
    step = median([one["step"] for one in found.values()])
    worst = None
    for name, what in _WHAT.items():
        usual = median([one[name] for one in found.values()])
        number = max(found, key=lambda process: found[process][name])
        own = found[number][name]
        excess = (own - usual) / step if step else 0.0
        is_hidden = name != "step" and not _starves(found[number])
        if not is_hidden and excess > (worst.excess if worst else SLOW):
            worst = Slow(number, excess, what.format(own=own, median=usual))
    return worst


def _starves(one: Mapping[str, float]) -> bool:
    """Returns whether the devices of a process wait for their host."""
    return one["host"] + one["data"] > STARVED * one["step"]


def median(values) -> float:
    """Returns the median; the lower one of two, so that the other may be slow."""
    return statistics.median_low(values)


@dataclasses.dataclass(eq=False)
class Pace:
    """The processes' numbers, exchanged in a thread, so that a step never waits.

    Attributes:
      tell: prints a line in the first process.
      post: shows this process's numbers to the others.
      posted: returns the numbers of all, by process.
      name: returns the name of a process.
    """

    tell: Callable[[str], None]
    post: Callable[[str, Any], None] = processes.post
    posted: Callable[[str], dict[int, Any]] = processes.posted
    name: Callable[[int], str] = processes.name
    _found: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    _thread: threading.Thread | None = None
    _slow: list[int] = dataclasses.field(default_factory=list)
    _named: set[int] = dataclasses.field(default_factory=set)

    def exchange(self, own: Mapping[str, float]) -> None:
        """Starts to exchange numbers, unless an earlier exchange has not ended."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(
            target=self._exchange, args=(dict(own),), daemon=True
        )
        self._thread.start()

    def numbers(self) -> dict[str, float]:
        """Returns numbers for the log from the last exchange that has ended.

        A process that is slow in `PATIENCE` calls in a row is named in one warning.
        """
        found = self._found
        if len(found) < 2:
            return {}
        steps = [one["step"] for one in found.values()]
        usual = median(steps)
        numbers = {"step_time_max_over_median": max(steps) / usual} if usual else {}
        slow = find_slow(found)
        self._slow = [*self._slow[-PATIENCE:], slow.process] if slow else []
        if slow is None:
            return numbers
        if self._slow[-PATIENCE:] == [slow.process] * PATIENCE:
            self._warn(slow)
        return numbers | {"slow_process": slow.process}

    def largest(self, own: Mapping[str, float]) -> dict[str, float]:
        """Returns the largest value of each number over all processes.

        Args:
          own: the numbers of this process, whose names count.
        """
        found = list(self._found.values())
        return {
            name: max([value, *(one[name] for one in found if name in one)])
            for name, value in own.items()
        }

    def _exchange(self, own: dict[str, float]) -> None:
        # The store of the coordinator may be gone, as at the end of a job.
        with contextlib.suppress(Exception):
            self.post(_CHANNEL, own)
            if processes.is_first():
                self._found = self.posted(_CHANNEL)

    def _warn(self, slow: Slow) -> None:
        if slow.process in self._named:
            return
        self._named.add(slow.process)
        self.tell(
            f"warning: {self.name(slow.process)} is slow and all others wait for it: it"
            f" {slow.why}; look at its host, or profile it: OUT/profile, SIGUSR1"
        )
