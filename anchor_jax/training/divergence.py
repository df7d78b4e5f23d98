"""Tells a bad batch from ruined weights, and finds the way back to good ones."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from anchor_jax.errors import UserError
from anchor_jax.training.checkpoints import Checkpoints, present
from anchor_jax.training.programs import Cursor, Stage
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
    """The weights of a training are ruined; its state must not be saved."""


def wrong_networks(state: TrainState) -> tuple[str, ...]:
    """Returns the names of what a state holds that is not finite."""
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
    stage: Stage, state: TrainState, taken: Sequence[int], skipped: Iterable[int]
) -> tuple[TrainState, bool]:
    """Returns the state, and whether most batches near some give finite numbers.

    Nothing moves, since the state counts as unsound meanwhile.

    Args:
      stage: compiled steps with their data.
      state: donated.
      taken: numbers of batches, or sequences, that are not tried.
      skipped: others that are not.
    """
    leave_out = {*skipped}
    numbers = [
        number
        for number in range(max(0, taken[0] - _TRIED), taken[-1] + 1 + _TRIED)
        if number not in taken and number not in leave_out
    ]
    unsound = jax.device_put(np.array(False), stage.places.sound)
    state, step, finite = state.replace(sound=unsound), int(state.step), 0
    for number in numbers:
        state, _, watch = stage.advance(state, Cursor(number), step)
        finite += all(np.isfinite(np.asarray(one)) for one in watch.values())
    return state, 2 * finite >= len(numbers)


@dataclasses.dataclass(frozen=True)
class WayBack:
    """Where a training that diverged can go on.

    Attributes:
      step: of the newest good checkpoint, or None.
      aside: where ruined ones are now, the newest first.
      unread: steps of those that could not be read, and are where they were.
    """

    step: int | None
    aside: tuple[pathlib.Path, ...]
    unread: tuple[int, ...]


def go_back(stage: Stage, state: TrainState, checkpoints: Checkpoints) -> WayBack:
    """Sets ruined checkpoints aside, the newest first, until one is good.

    A good one is finite, and so are the numbers of most batches with it. One that
    cannot be read stays: memory or a disk may have failed, and not the training.

    Args:
      stage: compiled steps with their data.
      state: a ruined one, whose memory is freed.
      checkpoints: of the training.
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


def _is_good(stage: Stage, state: TrainState, cursor: Cursor, skipped) -> bool:
    """Returns whether a training can go on from a state, whose memory is freed."""
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
    """Returns the message about a training that diverged.

    Args:
      step: at which it was found.
      shown: what was found.
      wrong: what is not finite.
      back: where it can go on.
      folder: of the training.
    """
    return " ".join(_sentences(step, shown, wrong, back, folder))


def _sentences(step, shown, wrong, back: WayBack, folder) -> Iterator[str]:
    yield f"step {step}: {shown}."
    if back.aside:
        yield f"Ruined checkpoints were moved to {', '.join(map(str, back.aside))}."
    if back.unread:
        steps = ", ".join(map(str, back.unread))
        yield f"These checkpoints could not be read, and stay where they are: {steps}."
    if not step:
        yield (
            "No step has been made, so the weights that the training begins with, or"
            " its data, are the reason: look at config.weights and config.data."
        )
        return
    state = (
        f"not finite are {', '.join(wrong)}"
        if wrong
        else "its weights are finite, but too large"
    )
    yield f"The training has diverged: {state}, and they are not saved."
    if back.step is None and back.unread:
        yield (
            "No other one is good: give the same command again, which may read them, or"
            " move them away to begin anew with config.weights."
        )
    elif back.step is None:
        yield (
            "No checkpoint is good, so the same command begins anew with"
            " config.weights."
        )
    else:
        yield (
            f"The last good checkpoint is {folder / str(back.step)}, which was tried:"
            " the same command goes on from there."
        )
    yield (
        "The same settings may diverge again: lower optimizer.learning_rate, for"
        " distillation critic_optimizer.learning_rate too, or optimizer.clip."
    )
