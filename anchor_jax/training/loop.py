"""The loop over training steps: resumes, watches, saves, and stops cleanly."""

import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from anchor_jax import interrupts
from anchor_jax.errors import Stopped, UserError
from anchor_jax.io import replacing
from anchor_jax.training import divergence
from anchor_jax.training.checkpoints import Checkpoints, NotSaved
from anchor_jax.training.monitor import Monitor
from anchor_jax.training.programs import Cursor, Stage
from anchor_jax.training.state import TrainState

_LAG = 2
"""Steps whose numbers are not waited for, so that the device always has work."""
_STOPPING = (
    "stopping after this step, with a checkpoint if that takes no longer than the steps"
    " since the last one; press Ctrl-C again to end at once"
)
_SAVING = 3.5
"""Seconds that a last checkpoint is waited for, however few steps it holds."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """How long a training runs and how often it does what; in steps.

    `sample_every` 0 makes no sample videos; otherwise the last step has some too.
    """

    steps: int
    save_every: int = 250
    log_every: int = 10
    sample_every: int = 0

    def is_sampled(self, done: int) -> bool:
        """Returns whether so many steps are followed by sample videos."""
        every = self.sample_every
        return every > 0 and (done % every == 0 or done == self.steps)


def train(
    stage: Stage,
    state: TrainState,
    cursor: Cursor,
    loop: Loop,
    checkpoints: Checkpoints,
    monitor: Monitor,
    sample: Callable[[TrainState, int], None] | None = None,
) -> TrainState:
    """Runs a stage from a state to its last step and returns the last state.

    Whatever ends it early, a checkpoint of the last whole step is left, unless another
    step was under way. A request to stop ends it after a step. In a process of the
    command line nothing is waited for that takes longer than the steps that would be
    lost: the first step's compilation, or a checkpoint of few steps on a slow disk.

    Args:
      stage: compiled steps with their data.
      state: donated.
      cursor: that belongs to the state.
      loop: lengths.
      checkpoints: where states go.
      monitor: is told of every step.
      sample: makes sample videos of a state at a step.

    Raises:
      UserError: A loss or gradient was not finite. If other batches have finite ones,
        the state before it is saved, and the batch; else the weights are ruined, and
        the newest good checkpoint is found.
      Stopped: It was asked to before its first step.
    """
    waiting, work = collections.deque(), _Work(checkpoints)
    first = step = int(state.step)
    keeping = _saving_on_error(checkpoints, lambda: (state, cursor))
    with interrupts.listening():
        interrupts.check()
        with interrupts.patient(_STOPPING, work.since), keeping:
            for step in range(first, loop.steps):
                if interrupts.asked():
                    break
                before = cursor
                state, cursor, watch = stage.advance(state, cursor, step)
                work.go_on()
                waiting.append((step, _taken(before, cursor), watch))
                if len(waiting) > _LAG:
                    _note(waiting.popleft(), state, stage, checkpoints, monitor)
                done = step + 1
                if done % loop.save_every == 0 or done == loop.steps:
                    _drain(waiting, state, stage, checkpoints, monitor)
                    _save(state, cursor, stage, checkpoints, monitor)
                    work.saved()
                if sample and loop.is_sampled(done):
                    _show(sample, state, done, monitor)
        began = work.since()
        with interrupts.patient("", lambda: began, _SAVING):
            _drain(waiting, state, stage, checkpoints, monitor)
            _save(state, cursor, stage, checkpoints, monitor)
            checkpoints.wait()
    return state


@dataclasses.dataclass(eq=False)
class _Work:
    """Steps that no checkpoint holds yet.

    Attributes:
      checkpoints: that they go to.
      begun: when steps began: those after the last checkpoint on disk, and those
        after the one that is being written.
    """

    checkpoints: Checkpoints
    begun: list[float | None] = dataclasses.field(default_factory=lambda: [None])

    def go_on(self) -> None:
        """Notes that a step is under way, whose program is compiled."""
        self.begun[-1] = self.begun[-1] or time.monotonic()

    def saved(self) -> None:
        """Notes that a checkpoint has begun, for which the one before was finished."""
        self.begun = [self.begun[-1], None]

    def since(self) -> float:
        """Returns when the work began that would be lost; now, if there is none."""
        begun = self.begun[0 if self.checkpoints.is_saving() else -1]
        return begun or time.monotonic()


def _show(sample, state: TrainState, done: int, monitor: Monitor) -> None:
    """Makes sample videos; a request to stop leaves them out."""
    with monitor.paused(), contextlib.suppress(Stopped):
        interrupts.check()
        sample(state, done)


def _save(state: TrainState, cursor: Cursor, stage, checkpoints, monitor) -> None:
    """Begins to save a state, unless it is ruined."""
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
    """Saves the state and cursor of `now` when something fails between two steps."""
    try:
        yield
    except (divergence.Diverged, NotSaved):
        raise
    except Exception:
        state, cursor = now()
        is_whole = not any(x.is_deleted() for x in jax.tree.leaves(state))
        # A save waits for all processes, which may not have failed.
        is_alone = jax.process_count() == 1
        if is_whole and is_alone and not divergence.wrong_networks(state):
            checkpoints.save(state, cursor)
            checkpoints.wait()
        raise


def _taken(before: Cursor, after: Cursor) -> range:
    """Returns the numbers of the batches, or sequences, that a step took from."""
    return range(before.number, after.number + (after.start > 0))


def _drain(waiting, *others) -> None:
    while waiting:
        _note(waiting.popleft(), *others)


def _note(entry, state: TrainState, stage, checkpoints, monitor: Monitor) -> None:
    """Tells of a step, whose numbers are waited for, and stops at a bad one."""
    step, taken, watch = entry
    numbers = {name: float(np.asarray(value)) for name, value in watch.items()}
    bad = {name: value for name, value in numbers.items() if not np.isfinite(value)}
    if not bad:
        monitor.note(step, numbers)
        return
    shown = ", ".join(f"{name}={value}" for name, value in bad.items())
    skipped = checkpoints.skipped()
    state, are_others_good = divergence.try_others(stage, state, taken, skipped)
    if not are_others_good:
        shown += ", and so it is for most other batches"
        wrong = divergence.wrong_networks(state)
        _raise_diverged(shown, wrong, state, stage, checkpoints)
    own = f"-{jax.process_index()}" if jax.process_count() > 1 else ""
    place = checkpoints.folder / f"failed-{step}{own}.npz"
    write_batches(stage, taken, place)
    # What comes next is another batch, or another sequence.
    checkpoints.skip(*taken)
    checkpoints.save(state, Cursor(taken[-1] + 1))
    checkpoints.wait()
    raise UserError(
        f"step {step}: {shown}. Other batches were tried and are finite, so the weights"
        f" are good: they are saved as {checkpoints.folder / str(step)}, the batch as"
        f" {place}. Look at the batch; the same command goes on after it,"
        " perhaps with a lower optimizer.learning_rate or optimizer.clip"
    )


def write_batches(stage: Any, taken: Sequence[int], place: pathlib.Path) -> None:
    """Writes the arrays of a step's batch; of several, their numbers before them."""
    arrays = {}
    for number in taken:
        prefix = f"{number}." if len(taken) > 1 else ""
        for name, value in stage.batches(number).items():
            arrays[prefix + name] = np.asarray(value)
    with replacing(place) as part, part.open("wb") as file:
        np.savez(file, **arrays)
