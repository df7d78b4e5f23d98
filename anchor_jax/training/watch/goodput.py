"""Goodput: the share of a run's wall time that its steps took, over all its starts."""

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from anchor_jax import processes
from anchor_jax.io import Place, write_json
from anchor_jax.training import files
from anchor_jax.training.watch.times import (
    COMPILING,
    DATA,
    DEVICE,
    HOST,
    PROFILING,
    SAMPLING,
    SAVING,
    STARTING,
    Times,
)

STEPS, LOST, STOPPED = "steps", "lost", "stopped"
OVERHEADS = (
    *(STARTING, COMPILING, DATA, SAVING, SAMPLING, PROFILING),
    *(LOST, STOPPED),
)
"""Causes of wall time that no step of the run took."""

EVERY = 15.0
"""Least seconds between two writes of the record, beside those at checkpoints."""

_MOST_POINTS = 200


@dataclasses.dataclass(eq=False)
class Goodput:
    """The wall time of a run by cause, which a small file keeps between starts.

    Attributes:
      folder: the run's folder.
      times: the seconds since this start.
      first: the step at which this start resumes.
      clock: returns the seconds of a calendar, which survive a restart.
    """

    folder: Place
    times: Times
    first: int
    clock: Callable[[], float] = time.time

    def __post_init__(self):
        found = files.read_goodput(self.folder)
        self.points = [(self.first, 0.0)]
        self.before: dict[str, float] = {}
        self._written = -EVERY
        if found is not None:
            self.points = [(int(step), done) for step, done in found["points"]]
            self.before = found["seconds"]
            self._lose_steps()
            gap = self.clock() - sum(self.times.seconds().values()) - found["at"]
            self.before[STOPPED] = self.before.get(STOPPED, 0.0) + max(0.0, gap)

    def totals(self) -> dict[str, float]:
        """Returns the seconds of all starts by cause; `STEPS` is productive."""
        now = self.times.seconds()
        now[STEPS] = now.pop(HOST, 0.0) + now.pop(DEVICE, 0.0)
        return {
            name: self.before.get(name, 0.0) + now.get(name, 0.0)
            for name in (STEPS, *OVERHEADS)
        }

    def numbers(self) -> dict[str, float]:
        """Returns goodput, and the shares of the overheads; their sum is 1."""
        totals = self.totals()
        wall = sum(totals.values()) or 1.0
        shares = {f"share_{name}": totals[name] / wall for name in OVERHEADS}
        return {"goodput": totals[STEPS] / wall, **shares}

    def note(self, step: int, is_saved: bool = False) -> None:
        """Records the time of the steps up to one; the first process writes it.

        Args:
          step: number of finished steps.
          is_saved: whether a checkpoint is made of them.
        """
        totals = self.totals()
        while self.points and self.points[-1][0] >= step:
            self.points.pop()
        self.points.append((step, totals[STEPS]))
        if len(self.points) > _MOST_POINTS:
            self.points[1:-1] = self.points[1:-1:2]
        wall = sum(totals.values())
        is_due = is_saved or wall - self._written >= EVERY
        if is_due and processes.is_first():
            self._written = wall
            record = {"at": self.clock(), "seconds": totals, "points": self.points}
            write_json(self.folder / files.GOODPUT, record)

    def _lose_steps(self) -> None:
        """Moves the time of steps that are made again to `LOST`."""
        steps, seconds = zip(*self.points, strict=True)
        kept = float(np.interp(self.first, steps, seconds))
        lost = max(0.0, self.before.get(STEPS, 0.0) - kept)
        self.before[STEPS] = self.before.get(STEPS, 0.0) - lost
        self.before[LOST] = self.before.get(LOST, 0.0) + lost
        self.points = [one for one in self.points if one[0] < self.first]
        self.points.append((self.first, kept))
