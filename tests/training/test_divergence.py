"""Ruined weights: not saved, distinguished from a bad batch, and the recovery."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anchor_jax import io
from anchor_jax.errors import UserError
from anchor_jax.training.checkpoints import Checkpoints, NotSaved
from anchor_jax.training.loop import Loop, train
from anchor_jax.training.monitor import Monitor
from anchor_jax.training.stages.base import Cursor
from anchor_jax.training.state import (
    Ema,
    Optimizer,
    init_state,
    move_generator,
    moved,
)

TX = Optimizer(learning_rate=0.1, betas=(0.9, 0.99)).transform(10)
EMA = Ema(0.5, 0)


@dataclasses.dataclass
class Line:
    """A stage as small as can be: generator and critic are two numbers each."""

    bad: frozenset = frozenset()
    places: object = None

    def updates(self, step):
        return "both"

    def batches(self, number):
        return {"x": np.float32(np.nan if number in self.bad else 1 + number % 3)}

    def advance(self, state, cursor, step):
        del step
        state, watch = step_of(state, self.batches(cursor.number)["x"])
        return state, Cursor(cursor.number + 1), watch


@jax.jit
def step_of(state, x):
    def loss(tree, x):
        return jnp.sum(jnp.square(tree["params"]["w"] * x - 1))

    value, gradient = jax.value_and_grad(loss)(state.generator, x)
    state, norm = move_generator(state, gradient, value, TX, EMA)
    critic, critic_gradient = jax.value_and_grad(loss)(state.fake_score, x)
    fake_score, opt, _, sound = moved(
        TX, critic_gradient, state.opt_fake_score, state.fake_score, critic, state.sound
    )
    state = state.replace(fake_score=fake_score, opt_fake_score=opt, sound=sound)
    watch = {"loss": value, "critic_loss": critic, "gradient_norm": norm}
    return state.replace(step=state.step + sound), watch


def begin():
    tree = {"params": {"w": jnp.array([0.5, -0.5])}}
    return init_state(0, tree, TX, has_ema=True, fake_score=tree, fake_score_tx=TX)


def attempt(folder, until, change=lambda state: state, bad=()):
    """Trains as the command does; returns the message of an error and the state."""
    state, cursor = begin(), Cursor()
    stage = Line(frozenset(bad), jax.tree.map(lambda x: x.sharding, state))
    checkpoints = Checkpoints(folder, {}, 3)
    state, cursor = checkpoints.restore(state, stage.places) or (state, cursor)
    monitor = Monitor(folder, until, int(state.step), 1, quiet=True)
    try:
        loop = Loop(until, save_every=2)
        return "", train(stage, change(state), cursor, loop, checkpoints, monitor)
    except UserError as error:
        return str(error), None
    finally:
        checkpoints.close()


def scaled(name, factor, step=None):
    """Multiplies a tree of a state, and changes its step."""

    def change(state):
        tree = jax.tree.map(
            lambda x: x * factor if jnp.issubdtype(x.dtype, jnp.floating) else x,
            getattr(state, name),
        )
        state = state.replace(**{name: tree})
        return state if step is None else state.replace(step=jnp.int32(step))

    return change


@pytest.mark.slow
@pytest.mark.parametrize("factor", ["nan", "inf", "1e30"])
def test_ruined_weights_are_not_saved_and_the_last_good_ones_are_found(
    tmp_path, factor
):
    whole = attempt(tmp_path / "whole", 6)[1]
    attempt(tmp_path / "run", 4)

    message, _ = attempt(tmp_path / "run", 6, scaled("generator", float(factor)))

    assert "step 4: " in message and "training has diverged" in message
    assert f"last good checkpoint is {tmp_path / 'run' / '4'}" in message
    assert "reduce optimizer.learning_rate" in message and "\n" not in message
    assert ("the generator's weights" in message) == (factor != "1e30")
    assert not list((tmp_path / "run").glob("failed-*"))
    assert not (tmp_path / "run" / "skipped.json").exists()
    # The same command resumes as if nothing had happened.
    chex.assert_trees_all_equal(attempt(tmp_path / "run", 6)[1], whole)


@pytest.mark.slow
def test_ruined_checkpoints_are_set_aside(tmp_path):
    attempt(tmp_path, 2)
    # As an earlier version left them: saved, and useless.
    state, checkpoints = begin(), Checkpoints(tmp_path, {}, 3)
    for step, factor in ((4, 1e30), (6, float("nan"))):
        checkpoints.save(scaled("generator", factor, step)(state), Cursor(step))
        checkpoints.wait()
    checkpoints.close()

    message, _ = attempt(tmp_path, 8)

    aside = f"{tmp_path / 'diverged-6'}, {tmp_path / 'diverged-4'}"
    assert f"Ruined checkpoints were moved to {aside}." in message
    assert f"last good checkpoint is {tmp_path / '2'}" in message
    assert int(attempt(tmp_path, 4)[1].step) == 4


@pytest.mark.slow
def test_checkpoints_that_cannot_be_read_stay(tmp_path, monkeypatch):
    whole = attempt(tmp_path / "whole", 6)[1]
    attempt(tmp_path / "run", 4)
    with monkeypatch.context() as patched:
        patched.setattr(
            Checkpoints,
            "newest_first",
            lambda self, state, places: iter([(4, None), (2, None)]),
        )
        message, _ = attempt(tmp_path / "run", 6, scaled("generator", float("nan")))

    assert "could not be read and were not moved: 4, 2." in message
    assert "start again" in message and "No checkpoint is good" not in message
    chex.assert_trees_all_equal(attempt(tmp_path / "run", 6)[1], whole)


def test_a_training_that_diverges_before_its_first_checkpoint_starts_again(tmp_path):
    message, _ = attempt(tmp_path, 4, scaled("generator", 1e30, step=1))

    assert "No checkpoint is good. Rerun this command to start again" in message
    assert not [x for x in tmp_path.iterdir() if x.name.isdecimal()]


def test_weights_that_a_training_begins_with_may_be_the_reason(tmp_path):
    for _ in range(3):
        message, _ = attempt(tmp_path, 4, scaled("generator", float("nan")))

        assert "No step has been made" in message and "config.weights" in message
        assert not (tmp_path / "skipped.json").exists()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("ema", "the generator's mean"),
        ("opt_generator", "the generator's optimizer"),
        ("fake_score", "the critic's weights"),
        ("opt_fake_score", "the critic's optimizer"),
    ],
)
def test_non_finite_state_is_named_and_not_saved(tmp_path, name, shown):
    attempt(tmp_path, 2)

    message, _ = attempt(tmp_path, 4, scaled(name, float("nan")))

    assert shown in message and "This state was not saved" in message
    assert f"last good checkpoint is {tmp_path / '2'}" in message
    assert not (tmp_path / "4").exists()


@pytest.mark.slow
@pytest.mark.parametrize("bad", [{3}, {3, 4}, {0}])
def test_bad_batches_are_left_out_and_good_weights_kept(tmp_path, bad):
    for place in sorted(bad):
        message, _ = attempt(tmp_path, 6, bad=bad)
        assert "Other batches give finite values" in message
        step = place if place < 4 else 3
        assert f"State before it: {tmp_path / str(step)}. Batch: " in message
    message, state = attempt(tmp_path, 6, bad=bad)

    assert not message and int(state.step) == 6
    assert json.loads((tmp_path / "skipped.json").read_text()) == sorted(bad)


@pytest.mark.slow
def test_trying_other_batches_moves_nothing(tmp_path):
    attempt(tmp_path / "run", 6, bad={3})
    again = attempt(tmp_path / "run", 6, bad={3})[1]

    # Without the batch from the start.
    class Without(Line):
        def batches(self, number):
            return super().batches(number + (number >= 3))

    state = begin()
    stage, cursor = Without(), Cursor()
    for step in range(6):
        state, cursor, _ = stage.advance(state, cursor, step)
    chex.assert_trees_all_equal(again.generator, state.generator)
    chex.assert_trees_all_equal(again.opt_fake_score, state.opt_fake_score)


def test_an_error_between_steps_saves_no_ruined_state(tmp_path):
    def fail(state, step):
        raise OSError("disk full")

    state = scaled("ema", float("nan"))(begin())
    stage = Line(places=jax.tree.map(lambda x: x.sharding, state))
    checkpoints = Checkpoints(tmp_path, {})
    monitor = Monitor(tmp_path, 9, 0, 1, quiet=True)
    loop = Loop(9, save_every=9, sample_every=1)
    with pytest.raises(OSError, match="disk full"):
        train(stage, state, Cursor(), loop, checkpoints, monitor, fail)
    checkpoints.close()

    assert not (tmp_path / "1").exists()


def test_a_batch_is_skipped_once(tmp_path):
    checkpoints = Checkpoints(tmp_path, {})
    for _ in range(3):
        checkpoints.skip(4, 5)

    assert checkpoints.skipped() == [4, 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"step": 3},
        {"step": "2"},
        {"updates": -1},
        {"updates": 1e99},
        {"rng": [1]},
        {"cursor": {"number": "2", "start": 0}},
        {"cursor": {"number": 2, "start": 0, "more": 0}},
        {"cursor": 5},
        5,
    ],
)
def test_a_checkpoint_with_damaged_integers_is_left_out(tmp_path, change):
    attempt(tmp_path, 2)
    path = tmp_path / "2" / "data" / "metadata"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(5 if change == 5 else {**stored, **change}))

    with pytest.raises(
        UserError,
        match=r"the checkpoints \[2\], but this config can resume none .*damaged",
    ):
        attempt_restore(tmp_path)


def attempt_restore(folder):
    state = begin()
    checkpoints = Checkpoints(folder, {})
    try:
        checkpoints.restore(state, jax.tree.map(lambda x: x.sharding, state))
    finally:
        checkpoints.close()


def test_an_unfinished_checkpoint_is_removed_at_exit(tmp_path):
    checkpoints, seen = Checkpoints(tmp_path, {}), []

    class Slow:
        def all_steps(self):
            return []

        def wait_until_finished(self):
            seen.append({part.name: ours for part, ours in io._unfinished.items()})

        def save(self, step, **given):
            pass

    checkpoints.manager = Slow()
    for step in (1, 2):
        checkpoints.save(begin().replace(step=jnp.int32(step)), Cursor(step))

    assert seen == [{}, {"1.orbax-checkpoint-tmp": False}]
    checkpoints.wait()
    assert not io._unfinished


def test_after_a_checkpoint_that_was_not_saved_no_other_is_tried(tmp_path, monkeypatch):
    steps = []

    def fail(self, state, cursor, means=None):
        steps.append(int(state.step))
        raise NotSaved("no room")

    monkeypatch.setattr(Checkpoints, "save", fail)
    assert attempt(tmp_path, 6)[0] == "no room"
    assert steps == [2]


@pytest.mark.parametrize("place", ["wait", "close", "save"])
def test_a_disk_that_is_full_is_reported_and_no_half_checkpoint_left(tmp_path, place):
    checkpoints, part = Checkpoints(tmp_path, {}), tmp_path / "2.orbax-checkpoint-tmp"

    class Full:
        def all_steps(self):
            return []

        def wait_until_finished(self):
            if part.exists():
                raise ValueError("Failed: No space left [os_error_code='28']\n" * 99)

        close = wait_until_finished

        def save(self, step, **given):
            part.mkdir()
            if place == "save":
                self.wait_until_finished()

    checkpoints.manager = Full()
    with pytest.raises(
        UserError,
        match=r"^.{,400} free disk space.* rerun this command to resume from the",
    ):  # noqa: PT012
        checkpoints.save(begin().replace(step=jnp.int32(2)), Cursor(2))
        getattr(checkpoints, place)()
    checkpoints._part.close()
    assert not part.exists()
