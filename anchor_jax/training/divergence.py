"""Distinguishes a bad batch from ruined weights, and finds a good checkpoint."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from anchor_jax.errors import UserError
from anchor_jax.training import placement
from anchor_jax.training.checkpoints import Checkpoints, present
from anchor_jax.training.stages.base import CompiledStage, Cursor
from anchor_jax.training.state import TrainState

_TRIED = 3  # batches before and after the one that failed
_NAMES = {
    "generator": "the generator's weights",
    "opt_generator": "the generator's optimizer",
    "ema": "the generator's mean",
    "fake_score": "the critic's weights",
    "opt_fake_score": "the critic's optimizer",
}


class Diverged(UserError):
    """The weights of a training are ruined. Its state must not be saved."""


def wrong_networks(state: TrainState) -> tuple[str, ...]:
    """Returns the names of the parts of a state that have non-finite values."""
    trees = {name: getattr(state, name) for name in present(state) if name in _NAMES}
    finite = _are_finite(trees)
    return tuple(_NAMES[name] for name in trees if not np.asarray(finite[name]))


@jax.jit
def _are_finite(trees):
    return {
        name: functools.reduce(
            jnp.logical_and,
            (jnp.isfinite(x).all() for x in jax.tree.leaves(tree)),
            jnp.array(True),
        )
        for name, tree in trees.items()
    }


def try_others(
    stage: CompiledStage,
    state: TrainState,
    taken: Sequence[int],
    skipped: Iterable[int],
) -> tuple[TrainState, bool]:
    """Returns the state, and whether most neighbouring batches give finite values.

    The state is marked as unsound during the trials, so that it is not updated.

    Args:
      stage: compiled steps with their data.
      state: the state; it is donated.
      taken: numbers of the failed batches, or sequences, which are not tried.
      skipped: further numbers that are not tried.
    """
    leave_out = {*skipped}
    numbers = [
        number
        for number in range(max(0, taken[0] - _TRIED), taken[-1] + 1 + _TRIED)
        if number not in taken and number not in leave_out
    ]
    unsound = placement.put(np.array(False), stage.places.sound)
    state, step, finite = state.replace(sound=unsound), int(state.step), 0
    for number in numbers:
        state, _, metrics = stage.advance(state, Cursor(number), step)
        finite += all(np.isfinite(np.asarray(one)) for one in metrics.values())
    return state, 2 * finite >= len(numbers)


@dataclasses.dataclass(frozen=True)
class WayBack:
    """The point at which a diverged training can resume.

    Attributes:
      step: step of the newest good checkpoint, or None.
      aside: new paths of ruined checkpoints, newest first.
      unread: steps of checkpoints that could not be read and were not moved.
    """

    step: int | None
    aside: tuple[pathlib.Path, ...]
    unread: tuple[int, ...]


def go_back(
    stage: CompiledStage, state: TrainState, checkpoints: Checkpoints
) -> WayBack:
    """Moves ruined checkpoints aside, newest first, until one is good.

    A checkpoint is good if its weights are finite and most batches give finite values
    with them. A checkpoint that cannot be read stays, because memory or a disk may have
    failed rather than the training.

    Args:
      stage: compiled steps with their data.
      state: a ruined state; its memory is freed.
      checkpoints: the training's checkpoints.
    """
    checkpoints.wait()
    _free(state)
    ruined, unread, good = [], [], None
    for step, read in checkpoints.newest_first(state, stage.places):
        if read is None:
            unread.append(step)
        elif _is_good(stage, *read, checkpoints.skipped()):
            good = step
            break
        else:
            ruined.append(checkpoints.set_aside(step, "diverged"))
    return WayBack(good, tuple(ruined), tuple(unread))


def _is_good(stage: CompiledStage, state: TrainState, cursor: Cursor, skipped) -> bool:
    """Returns whether a training can resume from a state; frees its memory."""
    good = not wrong_networks(state)
    if good:
        around = range(cursor.number, cursor.number + 1)
        state, good = try_others(stage, state, around, skipped)
    _free(state)
    return good


def _free(state: TrainState) -> None:
    for leaf in jax.tree.leaves(state):
        leaf.delete()


def report(
    step: int, shown: str, wrong: Sequence[str], back: WayBack, folder: pathlib.Path
) -> str:
    """Returns the message about a diverged training.

    Args:
      step: the step at which the divergence was detected.
      shown: the values that were detected.
      wrong: names of the non-finite parts of the state.
      back: where the training can resume.
      folder: the training's folder.
    """
    return " ".join(_sentences(step, shown, wrong, back, folder))


def _sentences(step, shown, wrong, back: WayBack, folder) -> Iterator[str]:
    yield f"step {step}: {shown}."
    if back.aside:
        yield f"Ruined checkpoints were moved to {', '.join(map(str, back.aside))}."
    if back.unread:
        steps = ", ".join(map(str, back.unread))
        yield f"These checkpoints could not be read and were not moved: {steps}."
    if not step:
        yield (
            "No step has been made, so the cause is in the initial weights or the data:"
            " check config.weights and config.data."
        )
        return
    state = (
        f"non-finite values in {', '.join(wrong)}"
        if wrong
        else "its weights are finite, but too large"
    )
    yield f"The training has diverged: {state}. This state was not saved."
    if back.step is None and back.unread:
        yield (
            "No other checkpoint is good. Rerun this command to try to read them"
            " again, or move them away to start again from config.weights."
        )
    elif back.step is None:
        yield (
            "No checkpoint is good. Rerun this command to start again from"
            " config.weights."
        )
    else:
        yield (
            f"The last good checkpoint is {folder / str(back.step)}; it was tested."
            " Rerun this command to resume from it."
        )
    yield (
        "The same settings may diverge again: reduce optimizer.learning_rate (for"
        " distillation also critic_optimizer.learning_rate) or optimizer.clip."
    )
