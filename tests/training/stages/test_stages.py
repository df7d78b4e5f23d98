"""Stages on a mesh: as on one device, resumed bit for bit, stopped when unsound."""

import copy
import dataclasses
import functools
import itertools
import json
import types

import bundles
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from anchor_jax import sharding
from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.training import run as run_command
from anchor_jax.training.checkpoints import Checkpoints
from anchor_jax.training.data.kinds import DataConfig
from anchor_jax.training.loop import Loop, train
from anchor_jax.training.monitor import Monitor
from anchor_jax.training.run import read_config
from anchor_jax.training.schedule import SequencePlan
from anchor_jax.training.stages import build, distillation_step
from anchor_jax.training.stages.base import Cursor
from anchor_jax.training.stages.build import LoraConfig, TrainConfig
from anchor_jax.training.stages.distillation import DistillationConfig
from anchor_jax.training.stages.regression import RegressionConfig
from anchor_jax.training.state import (
    Ema,
    Optimizer,
    checked,
    init_state,
    move_generator,
)
from anchor_jax.wan import lora

BATCH = 4
FRAMES = 6
FAST = Optimizer(learning_rate=1e-3, betas=(0.9, 0.99))
DISTILL = TrainConfig(
    steps=20,
    batch=BATCH,
    distillation=DistillationConfig(
        steps=(1000, 500), frames=FRAMES, length=12, switches=(6,), every=2
    ),
    optimizer=FAST,
    critic_optimizer=FAST,
    ema=Ema(0.5, 0),
)
REGRESS = dataclasses.replace(
    DISTILL,
    stage="regression",
    regression=RegressionConfig(forcing="teacher", block=3, blocks=2),
)

GUIDED = dataclasses.replace(
    REGRESS,
    regression=dataclasses.replace(REGRESS.regression, guidance=2.5),
)


def embeddings(number):
    return {
        name: np.asarray(tiny.embedding(10 * number + place, batch=BATCH))
        for place, name in enumerate(("prompt", "switch", "negative"))
    }


def clips(number):
    rng = np.random.default_rng((3, number))
    latents = rng.standard_normal((BATCH, FRAMES, 4, 4, 4)).astype(np.float32)
    prompt, negative = (
        np.asarray(tiny.embedding(seed, batch=BATCH)) for seed in (number, 99)
    )
    return {"latents": latents, "embedding": prompt[:, None], "negative": negative}


def make(config, mesh=(1, 1, 1, 1)):
    config = dataclasses.replace(config, mesh=mesh)
    kept = _prepared(config, build.make_mesh(config))
    return dataclasses.replace(
        kept,
        compiled=copy.copy(kept.compiled),
        state=jax.tree.map(jnp.copy, kept.state),
    )


@functools.cache
def _prepared(config, mesh):
    """Returns a stage whose programs all tests of this file share."""
    del mesh
    bundle = bundles.load()
    batches = clips if config.stage == "regression" else embeddings
    kept = build.prepare(config, bundle, batches, bundle)
    for name in ("_step", "_update_generator", "_update_critic"):
        getattr(kept.compiled, name, None)  # Made here, so that copies share them.
    return kept


def on_one_device(monkeypatch):
    """A mesh of the first device, though tests have four."""
    one = jax.make_mesh(
        (1, 1, 1, 1),
        sharding.MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 4,
        devices=jax.devices()[:1],
    )
    monkeypatch.setattr(sharding, "make_mesh", lambda shape, devices: one)


def steps(prepared, count, state=None, cursor=None):
    state, cursor = state or prepared.state, cursor or Cursor()
    watched = []
    for step in range(int(state.step), count):
        state, cursor, watch = prepared.compiled.advance(state, cursor, step)
        watched.append({name: float(value) for name, value in watch.items()})
    return state, cursor, watched


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(jax.device_get(state))]


def gradients(state):
    """Returns the gradients of the first step: all that Adam's first means hold."""
    means = (
        optax.tree.get(one, "mu")
        for one in (state.opt_generator, state.opt_fake_score)
        if one is not None
    )
    return jax.tree.map(lambda x: np.asarray(x) / (1 - FAST.betas[0]), list(means))


def within_a_sequence(prepared, other=None):
    """Returns its state after `FRAMES` frames of random numbers, and their place.

    Args:
      prepared: a stage.
      other: field of the rollout that holds other numbers.
    """
    state, policy = prepared.state, prepared.compiled.spec.setup.policy

    def draw(x, rng):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        drawn = jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        return jax.device_put(drawn, x.sharding)

    def fill(name):
        rng = np.random.default_rng(5 if name == other else 4)
        return jax.tree.map(lambda x: draw(x, rng), getattr(state.rollout, name))

    past = state.rollout.replace(
        **{name: fill(name) for name in ("cache", "recent", "previous")}
    )
    started = index = past.cache.index
    for _ in range(FRAMES // policy.block):
        _, index = policy.write(index)
    # Copied, since some share a buffer, which cannot be donated twice.
    index = jax.tree.map(
        lambda x, y: jax.device_put(np.array(x), y.sharding), index, started
    )
    past = past.replace(cache=past.cache.replace(index=index))
    return state.replace(rollout=past), Cursor(0, FRAMES)


# The generator's chunk is later or holds the switch; the critic's is the first.
LATER, SWITCHED = (
    dataclasses.replace(
        DISTILL,
        distillation=dataclasses.replace(
            DISTILL.distillation, length=9, switches=switches
        ),
    )
    for switches in ((), (6,))
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "field"),
    [(LATER, "cache"), (LATER, "previous"), (SWITCHED, "recent")],
)
def test_a_chunk_depends_on_what_its_sequence_holds(config, field, monkeypatch):
    on_one_device(monkeypatch)
    found = []
    for other in (None, field):
        prepared = make(config)
        state, _, _ = steps(prepared, 1, *within_a_sequence(prepared, other))
        found.append(gradients(state)[0])

    rises = jax.tree.map(lambda a, b: np.abs(a - b).max(), *found)
    assert max(jax.tree.leaves(rises)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [LATER, SWITCHED, REGRESS, GUIDED],
    ids=["later", "switched", "regress", "guided"],
)
def test_four_devices_do_what_one_does(config, monkeypatch):
    def step(prepared):
        started = within_a_sequence(prepared) if config in (LATER, SWITCHED) else ()
        return steps(prepared, 1, *started)

    many, _, (seen,) = step(make(config, (2, 2, 1, 1)))
    with monkeypatch.context() as patch:
        on_one_device(patch)
        one, _, (expected,) = step(make(config))

    kernel = many.generator["params"]["blocks"]["ffn_in"]["kernel"]
    assert len(kernel.sharding.device_set) == 4
    assert not kernel.sharding.is_fully_replicated
    assert seen.keys() == expected.keys()
    for name, value in seen.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (gradients(many), gradients(one))), strict=True
    ):
        close = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=close)
    chex.assert_trees_all_close(many.ema, one.ema, rtol=1e-7, atol=2e-4)


@pytest.mark.slow
def test_the_generator_moves_every_few_steps_of_the_critic(monkeypatch):
    on_one_device(monkeypatch)
    section = dataclasses.replace(DISTILL.distillation, length=FRAMES, switches=())
    prepared, taken = make(dataclasses.replace(DISTILL, distillation=section)), []
    stage, state, cursor = prepared.compiled, prepared.state, Cursor()
    stage.batches = lambda number: taken.append(number) or embeddings(number)

    def networks(state):
        return jax.device_get((state.generator, state.fake_score, state.updates))

    states = [networks(state)]
    span, batch, _ = stage._take(cursor)
    critic = stage._gradient("critic", distillation_step.shape_of(stage.spec, span))
    _, _, before = critic(jax.tree.map(jnp.copy, state), stage.frozen, batch)
    watched = []
    for step in range(3):
        state, cursor, watch = stage.advance(state, cursor, step)
        states.append(networks(state))
        watched.append(watch)

    def moves(network):
        return [
            any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), *pair)))
            for pair in itertools.pairwise(one[network] for one in states)
        ]

    assert moves(0) == [True, False, True] and moves(1) == [True] * 3
    assert [int(one[2]) for one in states] == [0, 1, 1, 2]
    assert ["generator_loss" in watch for watch in watched] == moves(0)
    # Both see the same prompts, and the critic the generator that did not move yet.
    assert taken == [0, 1, 2] and cursor == Cursor(3)
    assert float(before["critic_loss"]) == float(watched[0]["critic_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("start, switch", [(0, None), (9, None), (9, 12)])
def test_blocks_are_given_the_gradient_of_their_own_frames(start, switch, monkeypatch):
    on_one_device(monkeypatch)
    section = dataclasses.replace(
        DISTILL.distillation, frames=9, length=15, switches=(switch,) if switch else ()
    )
    prepared = make(dataclasses.replace(DISTILL, distillation=section))
    stage, given = prepared.compiled.spec, {}
    state, _ = within_a_sequence(prepared)

    def loss(clip, *others, **networks):
        given["prompt"] = networks["fake"][2]
        zero = jnp.float32(0)
        return types.SimpleNamespace(gradient=clip, loss=zero, gap=zero)

    def pull_back(trained, frozen, chunk, prompt, exit_level, gradient, *, setup):
        given.update(chunk=chunk, ours=gradient, pulled=prompt)
        return trained

    monkeypatch.setattr(distillation_step.losses, "distribution_matching", loss)
    monkeypatch.setattr(distillation_step.rollout, "pull_back", pull_back)
    batch = {**embeddings(0), "requested": jnp.int32(switch or 0)}
    span = stage.plan.chunk(start, switch)
    shape = distillation_step.shape_of(stage, span)
    distillation_step.generator_gradient(
        state, prepared.compiled.frozen, batch, spec=stage, shape=shape
    )

    frames = 3 if switch else span.new
    assert given["ours"].shape[1] == frames
    np.testing.assert_array_equal(given["ours"], given["chunk"].latents[:, -frames:])
    for name in ("prompt", "pulled"):
        expected = batch["switch" if switch else "prompt"]
        np.testing.assert_array_equal(given[name], expected)


@pytest.mark.slow
def test_unknown_words_and_cut_prompts_are_reported(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    monkeypatch.setattr(build, "open_source", lambda *given: embeddings)
    weights, printed = tmp_path / "weights", []
    bundles.save(weights)
    lines = f"{bundles.RED} xyzzy\n{bundles.BLUE}\n{bundles.BLUE} {bundles.RED}\n"
    (tmp_path / "a.txt").write_text(lines)
    config = dataclasses.replace(
        DISTILL,
        **dict.fromkeys(("weights", "teacher"), str(weights)),
        data=DataConfig("prompts", str(tmp_path / "a.txt")),
        out=str(tmp_path / "run"),
        sample_every=0,
    )

    run_command.open_training(config, printed.append).checkpoints.close()

    assert "warning: words that the model does not know: xyzzy" in printed
    (cut,) = [line for line in printed if "a.txt, line 3" in line]
    assert "6 of 9 tokens are read" in cut


@pytest.mark.parametrize(("every", "is_told"), [(2, True), (1, False)])
def test_chunks_that_the_generator_never_learns_from_are_reported(
    every, is_told, tmp_path, monkeypatch
):
    on_one_device(monkeypatch)
    monkeypatch.setattr(build, "open_source", lambda *given: embeddings)
    weights, printed = tmp_path / "weights", []
    bundles.save(weights)
    section = dataclasses.replace(DISTILL.distillation, every=every)
    config = dataclasses.replace(
        DISTILL,
        **dict.fromkeys(("weights", "teacher"), str(weights)),
        distillation=section,
        out=str(tmp_path / "run"),
        sample_every=0,
    )
    run_command.open_training(config, printed.append).checkpoints.close()

    if not is_told:
        assert not printed
        return
    (line,) = printed
    chunks = "only on the chunks that start at frames 0, never on those that start at"
    assert f"{chunks} 6, 9" in line
    assert "distillation.every + 1 = 3" in line


@pytest.mark.parametrize("name", ["train_dmd", "train_streaming"])
@pytest.mark.parametrize("scale", ["paper", "tiny"])
def test_shipped_configs_learn_from_every_chunk(name, scale):
    section = read_config(load_config(f"{name}:{scale}")).distillation
    plan = SequencePlan(section.frames, 3, section.length, section.switches)
    assert len(plan.visited(section.every)) == len(plan.chunks(None))


@pytest.mark.slow
def test_low_rank_updates_move_and_nothing_else(monkeypatch):
    on_one_device(monkeypatch)
    prepared = make(dataclasses.replace(DISTILL, lora=LoraConfig(rank=2)))
    before = leaves(prepared.compiled.frozen)

    state, _, _ = steps(prepared, 1)

    assert state.generator.keys() == state.fake_score.keys() == {"lora"}
    assert all(np.any(x) for x in leaves(state.generator))
    for ours, theirs in zip(leaves(prepared.compiled.frozen), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def run(config, folder, until, tell=lambda line: None):
    """Trains to a step as the command does, and returns the last state."""
    prepared = make(config)
    checkpoints = Checkpoints(folder, {"training": {}}, 2, tell)
    state, cursor = prepared.state, Cursor()
    found = checkpoints.restore(state, prepared.compiled.places)
    state, cursor = found or (state, cursor)
    monitor = Monitor(folder, until, int(state.step), 1, quiet=True)
    loop = Loop(until, save_every=2, log_every=1)
    try:
        return train(prepared.compiled, state, cursor, loop, checkpoints, monitor)
    finally:
        monitor.close()
        checkpoints.close()


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
def test_scores_that_are_not_finite_move_nothing(monkeypatch):
    on_one_device(monkeypatch)
    prepared = make(DISTILL)
    real = jax.tree.map(lambda x: x * jnp.nan, prepared.compiled.frozen["real_score"])
    prepared.compiled.frozen = {**prepared.compiled.frozen, "real_score": real}
    before = leaves((prepared.state.generator, prepared.state.fake_score))

    state, _, (watch,) = steps(prepared, 1)

    assert np.isnan(watch["score_gap"]) and watch["generator_loss"] == 0
    assert not bool(state.sound) and int(state.step) == 0
    after = leaves((state.generator, state.fake_score))
    for ours, theirs in zip(after, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


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


def test_a_wrong_gradient_stops_the_updates_of_all_networks():
    tx = optax.sgd(1.0)
    before = init_state(0, {"w": jnp.ones(2)}, tx, has_ema=False)
    good, bad = {"w": jnp.ones(2)}, {"w": jnp.array([1, jnp.nan])}

    sound = checked(before, good, jnp.float32(1))
    wrong = checked(sound, bad, jnp.float32(1))
    moved, _ = move_generator(sound, good, jnp.float32(1), tx, None)
    kept, _ = move_generator(wrong, good, jnp.float32(1), tx, None)

    assert bool(sound.sound) and int(moved.updates) == 1
    assert not bool(wrong.sound) and int(kept.updates) == 0
    np.testing.assert_array_equal(kept.generator["w"], 1)
    np.testing.assert_array_equal(moved.generator["w"], 0)


def test_the_mean_begins_at_a_step_of_the_trainer():
    ema, mean = Ema(0.5, start=3), jnp.float32(0)
    for update, step in enumerate((0, 2, 4, 6)):
        mean = ema.next(mean, jnp.float32(step), update, step)
        if step < 3:
            assert mean == step

    assert mean == ((2 + 4) / 2 + 6) / 2


def test_what_was_logged_beyond_the_checkpoint_is_logged_once(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 4, "lo')

    Monitor(tmp_path, 9, 2, 1, quiet=True).close()

    kept = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [1, 2]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"stage": "distil"}, "config.stage='distil'"),
        ({"rules": "papers"}, "config.rules='papers'"),
        ({"batch": 3, "mesh": (2, 2, 1, 1)}, "config.batch=3"),
        ({"mesh": (3, 1, 1, 1)}, "config.mesh"),
        (
            {"distillation": DistillationConfig("self_forcing", length=39)},
            "frames=21, length=39: the policy ends or restarts after 21 latent",
        ),
        (
            {"distillation": DistillationConfig("causvid", length=39)},
            "frames=21, length=39: the policy ends or restarts after 21 latent",
        ),
        (
            {"stage": "regression", "regression": RegressionConfig(window=12)},
            "config.regression: window=12",
        ),
        (
            {
                "stage": "regression",
                "regression": RegressionConfig("noise", True, guidance=2.5),
            },
            "config.regression: guidance needs a flow target",
        ),
        (
            {
                "stage": "regression",
                "regression": RegressionConfig(text=True, guidance=2.5),
            },
            "config.regression: guidance needs a flow target",
        ),
    ],
)
def test_incompatible_configs_are_refused(wrong, named):
    config = dataclasses.replace(DISTILL, **wrong)
    with pytest.raises(UserError, match=named):
        build.prepare(config, bundles.load(), embeddings, bundles.load())


def test_the_rank_of_updates_is_that_of_the_weights():
    bundle = bundles.load()
    updates = lora.init(bundle.variables["params"], 3, jax.random.key(0))
    variables = {**bundle.variables, "lora": updates}
    bundle = dataclasses.replace(bundle, load_variables=lambda: variables)
    config = dataclasses.replace(REGRESS, lora=LoraConfig(rank=2))

    with pytest.raises(UserError, match="config.lora.rank=2: .* updates of rank 3"):
        build.prepare(config, bundle, clips)


@pytest.mark.parametrize("field", ["latent_channels", "text_dim", "text_len"])
@pytest.mark.parametrize("name", ["teacher", "critic"])
def test_networks_of_other_prompts_or_latents_are_refused(name, field):
    bundle = bundles.load()
    model = dataclasses.replace(bundle.model, **{field: 5})
    given = {"teacher": bundle, name: dataclasses.replace(bundle, model=model)}
    config = dataclasses.replace(DISTILL, mesh=(4, 1, 1, 1))

    with pytest.raises(UserError, match=f"config.{name}: its {field} is 5"):
        build.prepare(config, bundle, embeddings, **given)


@pytest.mark.slow
@pytest.mark.parametrize("config", [DISTILL, GUIDED], ids=["distill", "guided"])
def test_stages_with_a_teacher_need_it(config):
    config = dataclasses.replace(config, mesh=(4, 1, 1, 1))
    with pytest.raises(UserError, match="config.teacher is missing"):
        build.prepare(config, bundles.load(), embeddings)
