"""The training loop: runs steps, logs, saves checkpoints, and stops cleanly."""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from anchor_jax import interrupts, processes
from anchor_jax.errors import Stopped, UserError
from anchor_jax.io import replacing
from anchor_jax.training import divergence
from anchor_jax.training.checkpoints import Checkpoints, NotSaved
from anchor_jax.training.monitor import Monitor
from anchor_jax.training.stages.base import CompiledStage, Cursor
from anchor_jax.training.state import TrainState
from anchor_jax.training.watch.observer import Watch
from anchor_jax.training.watch.times import SAMPLING

_LAG = 2
"""Steps in flight whose metrics are not fetched yet, so that the device stays busy."""
_STOPPING = (
    "stopping after this step, with a checkpoint if saving takes no longer than the"
    " steps since the last checkpoint; press Ctrl-C again to stop at once"
)
_SAVING = 3.5
"""Minimum seconds to wait for the last checkpoint."""
_TOGETHER = 60.0
"""Further seconds with several processes, which agree on a step and all save it."""
_TORN = (
    "Stopped without a checkpoint, because the processes did not agree on a step in"
    " time. Rerun this command to resume from the previous one."
)


@dataclasses.dataclass(frozen=True)
class Loop:
    """The length of a training and its intervals, in steps.

    If `sample_every` is 0 no sample videos are made. Otherwise the last step has sample
    videos too.
    """

    steps: int
    save_every: int = 250
    log_every: int = 10
    sample_every: int = 0

    def is_saved(self, done: int) -> bool:
        """Returns whether a checkpoint is saved after `done` steps."""
        return done % self.save_every == 0 or done == self.steps

    def is_sampled(self, done: int) -> bool:
        """Returns whether sample videos are made after `done` steps."""
        every = self.sample_every
        return every > 0 and (done % every == 0 or done == self.steps)


def train(
    stage: CompiledStage,
    state: TrainState,
    cursor: Cursor,
    loop: Loop,
    checkpoints: Checkpoints,
    monitor: Monitor,
    sample: Callable[[TrainState, int], None] | None = None,
    watch: Watch | None = None,
) -> TrainState:
    """Runs a stage from a state to its last step and returns the last state.

    If the loop ends early, it saves a checkpoint of the last complete step, unless the
    failure came within a step. A request to stop takes effect after the current step,
    which is the same in all processes.

    Args:
      stage: compiled steps with their data.
      state: the first state; it is donated.
      cursor: the data position that belongs to the state.
      loop: length and intervals.
      checkpoints: where states are saved.
      monitor: receives the metrics of each step.
      sample: makes sample videos of a state at a step.
      watch: watches the steps. None watches nothing.

    Raises:
      UserError: A loss or gradient was not finite. If other batches give finite values,
        the update was discarded, and the state before it and the batch are saved.
        Otherwise the weights are ruined, and the newest good checkpoint is searched.
      Stopped: It stopped on request before the first step, or several processes did
        not agree on a step to stop at.
    """
    watch = watch or Watch.nothing(checkpoints.folder)
    waiting, work = collections.deque(), _Work(checkpoints)
    done, now = int(state.step), lambda: (state, cursor)
    with interrupts.listening():
        interrupts.check()
        with work.patient(), _saving_on_error(checkpoints, now):
            for step in range(done, loop.steps):
                if not processes.may_start(step):
                    break
                before = cursor
                with watch.step(step, (stage.updates(step), cursor.start)):
                    state, cursor, metrics = stage.advance(state, cursor, step)
                work.step_started()
                waiting.append((step, _taken(before, cursor), metrics))
                _settle(waiting, _LAG, watch, state, stage, checkpoints, monitor)
                done = step + 1
                if loop.is_saved(done):
                    _settle(waiting, 0, watch, state, stage, checkpoints, monitor)
                    with watch.saving(done):
                        _save(state, cursor, stage, checkpoints, monitor)
                    work.saved()
                _show(sample, loop, state, done, watch, monitor)
        with work.last_save(), watch.saving(done):
            _settle(waiting, 0, watch, state, stage, checkpoints, monitor)
            _save(state, cursor, stage, checkpoints, monitor)
            checkpoints.wait()
    return state


@dataclasses.dataclass(eq=False)
class _Work:
    """Tracks the age of steps that are in no checkpoint yet.

    After a request to stop, a command-line process does not wait for work that takes
    longer than the steps that would be lost: the compilation of the first step, or a
    checkpoint of few steps on a slow disk.

    Attributes:
      checkpoints: the checkpoints of the training.
      started: start times of the steps after the last checkpoint on disk, and of the
        steps after the checkpoint that is being written.
    """

    checkpoints: Checkpoints
    started: list[float | None] = dataclasses.field(default_factory=lambda: [None])

    def step_started(self) -> None:
        """Records that a step has started and that its program is compiled."""
        self.started[-1] = self.started[-1] or time.monotonic()

    def saved(self) -> None:
        """Records that a new checkpoint is being written; the previous one is done."""
        self.started = [self.started[-1], None]

    def since(self) -> float:
        """Returns the start time of the work that would be lost, or now if none."""
        began = self.started[0 if self.checkpoints.is_saving() else -1]
        return began - self._margin() if began else time.monotonic()

    def _margin(self) -> float:
        return _TOGETHER if processes.count() > 1 else 0.0

    def patient(self) -> contextlib.AbstractContextManager:
        """The steps, which wait for a checkpoint no longer than for what it saves."""
        return interrupts.patient(_STOPPING, self.since)

    def last_save(self) -> contextlib.AbstractContextManager:
        """The last checkpoint, which may take a little longer.

        Raises:
          Stopped: The processes did not agree on its step.
        """
        if not processes.leave_steps():
            raise Stopped(_TORN)
        began = self.since()
        return interrupts.patient("", lambda: began, max(_SAVING, self._margin()))


def _show(
    sample, loop: Loop, state: TrainState, done: int, watch: Watch, monitor: Monitor
) -> None:
    """Makes sample videos if it is time; a request to stop cancels them.

    Several processes start together, because all gather the weights. The request has
    perhaps not reached all. The first process then stops within its videos.
    """
    if not sample or not loop.is_sampled(done):
        return
    with watch.busy(SAMPLING), monitor.paused(), contextlib.suppress(Stopped):
        if processes.count() == 1:
            interrupts.check()
        sample(state, done)


def _save(state: TrainState, cursor: Cursor, stage, checkpoints, monitor) -> None:
    """Starts saving a state; raises Diverged if it is not finite."""
    wrong = divergence.wrong_networks(state)
    if wrong:
        _raise_diverged("the state cannot be saved", wrong, state, stage, checkpoints)
    checkpoints.save(state, cursor, monitor.means())


def _raise_diverged(shown: str, wrong, state: TrainState, stage, checkpoints) -> None:
    step = int(state.step)
    back = divergence.go_back(stage, state, checkpoints)
    raise divergence.Diverged(
        divergence.report(step, shown, wrong, back, checkpoints.folder)
    )


@contextlib.contextmanager
def _saving_on_error(
    checkpoints: Checkpoints, now: Callable[[], tuple[TrainState, Cursor]]
) -> Iterator[None]:
    """Saves the state and cursor of `now` if an error occurs between two steps."""
    try:
        yield
    except (divergence.Diverged, NotSaved):
        raise
    except Exception:
        state, cursor = now()
        is_whole = not any(x.is_deleted() for x in jax.tree.leaves(state))
        # A save waits for all processes, but the others may not have failed.
        is_alone = processes.count() == 1
        if is_whole and is_alone and not divergence.wrong_networks(state):
            checkpoints.save(state, cursor)
            checkpoints.wait()
        raise


def _taken(before: Cursor, after: Cursor) -> range:
    """Returns the numbers of the batches, or sequences, that a step read."""
    return range(before.number, after.number + (after.start > 0))


def _settle(waiting, most: int, *others) -> None:
    """Notes the oldest steps until at most `most` are in flight."""
    while len(waiting) > most:
        _note(waiting.popleft(), *others)


def _note(
    entry, watch: Watch, state: TrainState, stage, checkpoints, monitor: Monitor
) -> None:
    """Fetches and logs the metrics of a step; stops if one is not finite."""
    step, taken, metrics = entry
    with watch.fetching(step):
        numbers = {name: float(np.asarray(value)) for name, value in metrics.items()}
    bad = {name: value for name, value in numbers.items() if not np.isfinite(value)}
    if not bad:
        monitor.note(step, numbers)
        return
    shown = ", ".join(f"{name}={value}" for name, value in bad.items())
    skipped = checkpoints.skipped()
    state, are_others_good = divergence.try_others(stage, state, taken, skipped)
    if not are_others_good:
        shown += ", and most other batches give non-finite values too"
        wrong = divergence.wrong_networks(state)
        _raise_diverged(shown, wrong, state, stage, checkpoints)
    own = f"-{processes.index()}" if processes.count() > 1 else ""
    place = checkpoints.folder / f"failed-{step}{own}.npz"
    write_batches(stage, taken, place)
    # Continue with the next batch, or the next sequence.
    checkpoints.skip(*taken)
    checkpoints.save(state, Cursor(taken[-1] + 1))
    checkpoints.wait()
    raise UserError(
        f"step {step}: {shown}. Other batches give finite values, so the weights are"
        " good. The update was discarded. State before it:"
        f" {checkpoints.folder / str(step)}. Batch: {place}. Inspect the batch, then"
        " rerun this command to continue after it, if needed with a lower"
        " optimizer.learning_rate or optimizer.clip"
    )


def write_batches(stage: Any, taken: Sequence[int], place: pathlib.Path) -> None:
    """Writes the arrays of a step's batch; several batches get numeric prefixes."""
    arrays = {}
    for number in taken:
        prefix = f"{number}." if len(taken) > 1 else ""
        for name, value in stage.batches(number).items():
            arrays[prefix + name] = np.asarray(value)
    with replacing(place) as part, part.open("wb") as file:
        np.savez(file, **arrays)
