"""Runs: resumed bit for bit, stopped when a loss is not finite."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
import tiny
from stage_runs import (
    DISTILL,
    REGRESS,
    clips,
    embeddings,
    leaves,
    make,
    on_one_device,
    run,
    steps,
)

from anchor_jax.errors import UserError
from anchor_jax.training.checkpoints import Checkpoints
from anchor_jax.training.loop import Loop, train
from anchor_jax.training.monitor import Monitor
from anchor_jax.training.stages.base import Cursor


@pytest.mark.slow
def test_a_run_in_parts_is_a_run_in_one(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    whole = run(DISTILL, tmp_path / "whole", 5)

    run(DISTILL, tmp_path / "parts", 3)
    parts = run(DISTILL, tmp_path / "parts", 5)

    chex.assert_trees_all_equal(parts, whole)


@pytest.mark.slow
def test_the_best_checkpoints_stay_beside_the_last(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    prepared = make(REGRESS)

    def opened():
        return Checkpoints(tmp_path, {}, 1, keep_best=1, best_of="loss")

    checkpoints = opened()
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), 1):
        state = prepared.state.replace(step=jax.numpy.int32(step))
        checkpoints.save(state, Cursor(step), {"loss": loss, "other": 0.0})
    checkpoints.wait()
    checkpoints.close()

    again = opened()
    assert sorted(again.manager.all_steps()) == [2, 4]
    assert again.best() == (2, 1.0)
    state, cursor = again.restore(prepared.state, prepared.compiled.places)
    assert (int(state.step), cursor) == (4, Cursor(4))
    last = prepared.state.replace(step=jax.numpy.int32(5))
    again.save(last, Cursor(5), {"loss": 5.0})
    again.wait()
    assert sorted(again.manager.all_steps()) == [2, 5]
    again.close()


def test_means_are_of_the_steps_since_a_save(tmp_path):
    monitor = Monitor(tmp_path, 9, 0, 10, quiet=True)
    monitor.note(0, {"loss": 1.0})
    monitor.note(1, {"loss": 2.0, "score_gap": 5.0})
    first = monitor.means()
    monitor.note(2, {"loss": 7.0})

    assert first == {"loss": 1.5, "score_gap": 5.0}
    assert monitor.means() == {"loss": 7.0}
    monitor.close()


@pytest.mark.slow
def test_a_torn_checkpoint_is_left_out(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    whole = run(REGRESS, tmp_path / "whole", 4)
    run(REGRESS, tmp_path / "torn", 4)
    for place in (tmp_path / "torn" / "4" / "generator").rglob("*"):
        if place.is_file():
            place.write_bytes(place.read_bytes()[:40])
    printed = []

    again = run(REGRESS, tmp_path / "torn", 4, printed.append)

    assert len(printed) == 1 and "torn-4" in printed[0]
    chex.assert_trees_all_equal(again, whole)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_with_state_and_batch(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    prepared = make(REGRESS)
    good = steps(make(REGRESS), 2)[0]

    def broken(number):
        batch = clips(number)
        batch["latents"][0, 0] = np.nan if number == 2 else batch["latents"][0, 0]
        return batch

    prepared.compiled.batches = broken
    checkpoints = Checkpoints(tmp_path, {}, 2)
    monitor = Monitor(tmp_path, 9, 0, 1, quiet=True)
    with pytest.raises(UserError, match="step 2: .*loss=nan.*failed-2.npz"):
        train(
            prepared.compiled,
            prepared.state,
            Cursor(),
            Loop(9, save_every=5),
            checkpoints,
            monitor,
        )
    checkpoints.close()

    assert np.isnan(np.load(tmp_path / "failed-2.npz")["latents"]).any()
    again = make(REGRESS)
    state, cursor = Checkpoints(tmp_path, {}, 2).restore(
        again.state, again.compiled.places
    )
    assert (int(state.step), cursor) == (2, Cursor(3))
    chex.assert_trees_all_equal(state.generator, good.generator)


@pytest.mark.slow
def test_a_step_between_two_sequences_leaves_out_both(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    # Two chunks a sequence: the third step ends one, and begins the next.
    section = dataclasses.replace(DISTILL.distillation, length=9)
    prepared = make(dataclasses.replace(DISTILL, distillation=section))

    def broken(number):
        return {
            name: value + np.float32("nan" if number == 2 else 0)
            for name, value in embeddings(number).items()
        }

    prepared.compiled.batches = broken
    checkpoints = Checkpoints(tmp_path, {}, 2)
    monitor = Monitor(tmp_path, 9, 0, 1, quiet=True)
    with pytest.raises(UserError, match="step 2: critic_loss=nan"):
        loop = Loop(9, save_every=5)
        train(prepared.compiled, prepared.state, Cursor(), loop, checkpoints, monitor)
    checkpoints.close()

    written = np.load(tmp_path / "failed-2.npz")
    assert (
        np.isnan(written["2.prompt"]).any() and not np.isnan(written["1.prompt"]).any()
    )
    assert json.loads((tmp_path / "skipped.json").read_text()) == [1, 2]
    data = json.loads((tmp_path / "2" / "data" / "metadata").read_text())
    assert data["cursor"] == {"number": 3, "start": 0}


@pytest.mark.slow
@pytest.mark.parametrize("every, bad", [(2, {2}), (5, {2, 3})])
def test_batches_that_are_not_finite_are_left_out(tmp_path, monkeypatch, every, bad):
    on_one_device(monkeypatch)
    failed = 0
    while failed <= len(bad):
        prepared = make(REGRESS)

        def broken(number):
            batch = clips(number)
            batch["latents"] = batch["latents"] + np.float32(
                "nan" if number in bad else 0
            )
            return batch

        prepared.compiled.batches = broken
        checkpoints = Checkpoints(tmp_path, {}, 2)
        found = checkpoints.restore(prepared.state, prepared.compiled.places)
        state, cursor = found or (prepared.state, Cursor())
        monitor = Monitor(tmp_path, 6, int(state.step), 1, quiet=True)
        loop = Loop(6, save_every=every)
        try:
            state = train(prepared.compiled, state, cursor, loop, checkpoints, monitor)
            break
        except UserError:
            failed += 1
        finally:
            checkpoints.close()

    assert failed == len(bad) and int(state.step) == 6


@pytest.mark.slow
def test_an_error_between_steps_loses_none(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    prepared = make(REGRESS)
    checkpoints = Checkpoints(tmp_path, {}, 2)
    monitor = Monitor(tmp_path, 9, 0, 1, quiet=True)

    def fail(state, step):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        train(
            prepared.compiled,
            prepared.state,
            Cursor(),
            Loop(9, save_every=9, sample_every=3),
            checkpoints,
            monitor,
            fail,
        )
    checkpoints.close()

    again = make(REGRESS)
    state, cursor = Checkpoints(tmp_path, {}, 2).restore(
        again.state, again.compiled.places
    )
    assert (int(state.step), cursor) == (3, Cursor(3))


@pytest.mark.slow
def test_a_checkpoint_of_the_first_cache_layout_is_resumed(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    prepared = make(DISTILL)
    state, cursor, _ = steps(prepared, 1)
    expected = leaves(state)
    cache, heads = state.rollout.cache, tiny.MODEL.num_heads

    def apart(x):
        return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)

    slots, prior = jax.tree.map(apart, (cache.slots, cache.prior))
    old = state.rollout.replace(cache=cache.replace(slots=slots, prior=prior))
    checkpoints = Checkpoints(tmp_path, {}, 2)
    checkpoints.save(state.replace(rollout=old), cursor)
    checkpoints.close()

    found, _ = Checkpoints(tmp_path, {}, 2).restore(state, prepared.compiled.places)

    for ours, theirs in zip(leaves(found), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_nothing_is_set_aside_where_nothing_can_be_restored(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    run(REGRESS, tmp_path, 4)
    prepared = make(REGRESS)

    def fail(self, *arguments):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_restore", fail)
        for _ in range(2):
            with pytest.raises(
                UserError, match="resume none of them.*RESOURCE_EXHAUSTED"
            ):
                Checkpoints(tmp_path, {}, 2).restore(
                    prepared.state, prepared.compiled.places
                )

    state, _ = Checkpoints(tmp_path, {}, 2).restore(
        prepared.state, prepared.compiled.places
    )
    assert int(state.step) == 4


def test_what_was_logged_beyond_the_checkpoint_is_logged_once(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 4, "lo')

    Monitor(tmp_path, 9, 2, 1, quiet=True).close()

    kept = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 4, 1, 1), (1, 1, 1, 1)])
def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path, monkeypatch, mesh):
    saved = make(REGRESS, mesh=(2, 2, 1, 1))
    other = jax.tree.map(lambda x: x if x.dtype == bool else x + 1, saved.state)
    other = other.replace(step=jax.numpy.int32(7))
    checkpoints = Checkpoints(tmp_path, {}, 2)
    checkpoints.save(other, Cursor(3))
    checkpoints.close()
    if mesh == (1, 1, 1, 1):
        on_one_device(monkeypatch)
    prepared = make(REGRESS, mesh=mesh)

    state, cursor = Checkpoints(tmp_path, {}, 2).restore(
        prepared.state, prepared.compiled.places
    )

    assert cursor == Cursor(3)
    wanted = other.replace(sound=state.sound)  # not saved
    for ours, theirs in zip(leaves(state), leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    places = jax.tree.map(lambda x: x.sharding, state)
    chex.assert_trees_all_equal(places, prepared.compiled.places)
