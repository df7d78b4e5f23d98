"""Steps on a mesh: as on one device, with the right gradients, stopped when unsound."""

import dataclasses
import itertools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stage_runs import (
    DISTILL,
    FRAMES,
    GUIDED,
    REGRESS,
    embeddings,
    gradients,
    leaves,
    make,
    on_one_device,
    steps,
)

from anchor_jax.training.stages import distillation_step
from anchor_jax.training.stages.base import Cursor
from anchor_jax.training.stages.build import LoraConfig
from anchor_jax.training.state import (
    Ema,
    checked,
    init_state,
    move_generator,
)


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
LOW_RANK = dataclasses.replace(LATER, lora=LoraConfig(rank=4))
# Each sequence is one chunk.
SHORT = dataclasses.replace(
    DISTILL,
    distillation=dataclasses.replace(DISTILL.distillation, length=FRAMES, switches=()),
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
    ("config", "mesh"),
    [
        (LATER, (2, 2, 1, 1)),
        (SWITCHED, (2, 1, 2, 1)),
        (REGRESS, (1, 2, 1, 2)),
        (GUIDED, (1, 2, 2, 1)),
        (LOW_RANK, (1, 2, 1, 2)),
    ],
    ids=["later", "switched", "regress", "guided", "lora"],
)
def test_four_devices_do_what_one_does(config, mesh, monkeypatch):
    def step(prepared):
        is_regression = config.stage == "regression"
        return steps(
            prepared, 1, *(() if is_regression else within_a_sequence(prepared))
        )

    many, _, (seen,) = step(make(config, mesh))
    with monkeypatch.context() as patch:
        on_one_device(patch)
        one, _, (expected,) = step(make(config))

    kernel = jax.tree.leaves(many.generator)[-1]
    assert len(kernel.sharding.device_set) == 4
    assert mesh == (2, 1, 2, 1) or not kernel.sharding.is_fully_replicated
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
@pytest.mark.parametrize("config", [LATER, REGRESS], ids=["later", "regress"])
def test_parts_of_a_batch_do_what_the_batch_does(config):
    def step(count):
        one = make(dataclasses.replace(config, microbatches=count), (2, 1, 1, 2))
        is_regression = config.stage == "regression"
        return steps(one, 1, *(() if is_regression else within_a_sequence(one)))

    parts, _, (seen,) = step(2)
    whole, _, (expected,) = step(1)

    assert seen == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (gradients(parts), gradients(whole))), strict=True
    ):
        close = 1e-5 * np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=close)
    if parts.rollout is not None:
        chex.assert_trees_all_close(parts.rollout, whole.rollout, atol=1e-5)


@pytest.mark.slow
def test_the_generator_moves_every_few_steps_of_the_critic(monkeypatch):
    on_one_device(monkeypatch)
    prepared, taken = make(SHORT), []
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
def test_low_rank_updates_move_and_nothing_else(monkeypatch):
    on_one_device(monkeypatch)
    prepared = make(LOW_RANK)
    before = leaves(prepared.compiled.frozen)

    state, _, _ = steps(prepared, 1, *within_a_sequence(prepared))

    assert state.generator.keys() == state.fake_score.keys() == {"lora"}
    assert all(np.any(x) for x in leaves(state.generator))
    for ours, theirs in zip(leaves(prepared.compiled.frozen), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_scores_that_are_not_finite_move_nothing(monkeypatch):
    on_one_device(monkeypatch)
    prepared = make(SHORT)
    real = jax.tree.map(lambda x: x * jnp.nan, prepared.compiled.frozen["real_score"])
    prepared.compiled.frozen = {**prepared.compiled.frozen, "real_score": real}
    before = leaves((prepared.state.generator, prepared.state.fake_score))

    state, _, (watch,) = steps(prepared, 1)

    assert np.isnan(watch["score_gap"]) and watch["generator_loss"] == 0
    assert not bool(state.sound) and int(state.step) == 0
    after = leaves((state.generator, state.fake_score))
    for ours, theirs in zip(after, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


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
