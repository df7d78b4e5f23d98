"""Chunks for training: the sampler makes them, the chain rule is their gradient."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from anchor_jax.cache.policies import POLICIES, as_trained
from anchor_jax.streaming import stream
from anchor_jax.streaming.types import BlockNoise, StreamState
from anchor_jax.training import rollout
from anchor_jax.training.rollout import ChunkSwitch

BLOCKS = 2
SETUP = tiny.setup()


_roll = jax.jit(rollout.roll, static_argnames=("setup", "switch"))
_pull_back = jax.jit(rollout.pull_back, static_argnames="setup")


def chunk_noise(first, blocks, setup=SETUP):
    """The noise of consecutive blocks, with a leading axis."""
    each = [tiny.noise(first + number, setup) for number in range(blocks)]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


def roll(state, first, blocks, exit_level, setup=SETUP, prompts=(0,), at=None):
    switch = None
    if at is not None:
        switch = ChunkSwitch(at // 3 - first, setup.policy.recache(at))
    prompts = tuple(tiny.embedding(number) for number in prompts)
    noise = chunk_noise(first, blocks, setup)
    return _roll(
        tiny.variables(),
        state,
        prompts,
        noise,
        exit_level,
        setup=setup,
        switch=switch,
        requested=at or 0,
    )


def begin(setup=SETUP):
    return rollout.begin(setup, 1, 3 * BLOCKS)


def weights_of(shape):
    return jnp.asarray(np.random.default_rng(5).standard_normal(shape), jnp.float32)


def by_the_chain_rule(params, exit_level, at, setup=SETUP):
    """A weighted sum of a chunk's latents, written out: caches are constants."""
    variables = {"params": params}
    fixed = jax.lax.stop_gradient(variables)
    state = begin(setup)
    total = 0.0
    context = stream.project(fixed, tiny.embedding(0), setup=setup)
    state = StreamState(state.cache, context, state.recent)
    weights = weights_of((1, 3 * BLOCKS, 4, 4, 4))
    prompt, graded = 0, at is None
    for number in range(BLOCKS):
        if at == 3 * number:
            prompt, graded = 1, True
            context = stream.project(fixed, tiny.embedding(1), setup=setup)
            recache = setup.policy.recache(at)
            state, _ = stream.switch(
                fixed, state, context, at, setup=setup, recache=recache
            )
        noise = tiny.noise(number, setup)
        after, block, _ = stream.advance(fixed, state, noise, exit_level, setup=setup)
        live = stream.project(variables, tiny.embedding(prompt), setup=setup)
        noisy = jax.lax.stop_gradient(block.passes.noisy[exit_level])
        x0 = stream.estimate(
            variables, state.replace(context=live), noisy, exit_level, setup=setup
        )
        part = weights[:, 3 * number : 3 * number + 3]
        total += jnp.sum(part * x0) if graded else 0.0
        state = after
    return total


@pytest.mark.slow
@pytest.mark.parametrize("at", [None, 3], ids=["plain", "switch"])
def test_the_gradient_is_the_chain_rules(at):
    exit_level = jnp.int32(1)
    expected = jax.jit(jax.grad(by_the_chain_rule), static_argnums=2)(
        tiny.variables()["params"], exit_level, at
    )
    prompts = (0, 1) if at else (0,)

    _, chunk = roll(begin(), 0, BLOCKS, exit_level, prompts=prompts, at=at)
    weights = weights_of(chunk.latents.shape)
    weights = weights[:, at:]
    prompt = tiny.embedding(prompts[-1])
    found = _pull_back(
        tiny.variables(), {}, chunk, prompt, exit_level, weights, setup=SETUP
    )

    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    assert largest > 1e-3
    chex.assert_trees_all_close(
        found["params"], expected, rtol=1e-7, atol=1e-5 * largest
    )


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["nothing_saveable", "dots_saveable"])
def test_rematerialisation_changes_no_gradient(remat):
    model = dataclasses.replace(tiny.MODEL, remat=remat)
    other = dataclasses.replace(SETUP, model=model)
    exit_level = jnp.int32(0)
    _, chunk = roll(begin(), 0, 2, exit_level)
    weights = weights_of(chunk.latents.shape)

    given = (tiny.variables(), {}, chunk, tiny.embedding(0), exit_level, weights)
    plain = _pull_back(*given, setup=SETUP)
    saved = _pull_back(*given, setup=other)

    chex.assert_trees_all_close(saved, plain, rtol=1e-7, atol=1e-5)


@pytest.mark.slow
def test_nothing_flows_through_a_rollout():
    def total(variables):
        prompts = (tiny.embedding(0),)
        noise = chunk_noise(0, 2)
        state, chunk = rollout.roll(
            variables, begin(), prompts, noise, jnp.int32(1), setup=SETUP
        )
        leaves = jax.tree.leaves((chunk.latents, chunk.own, state.cache.slots))
        return sum(jnp.sum(x) for x in leaves)

    found = jax.grad(total)(tiny.variables())

    assert not any(np.any(x) for x in jax.tree.leaves(found))


@pytest.mark.slow
def test_blocks_without_a_cotangent_add_nothing():
    exit_level = jnp.int32(1)
    _, chunk = roll(begin(), 0, 2, exit_level)
    given = (tiny.variables(), {}, chunk, tiny.embedding(0), exit_level)

    found = _pull_back(*given, jnp.zeros_like(chunk.latents), setup=SETUP)

    assert not any(np.any(x) for x in jax.tree.leaves(found))


@pytest.mark.slow
def test_leaving_at_the_last_level_is_sampling():
    last = jnp.int32(len(SETUP.levels) - 1)

    state, first = roll(begin(), 0, 2, last)
    state, second = roll(state, 2, 2, last, prompts=(1,))
    _, third = roll(state, 4, 2, last, prompts=(1, 2), at=15)

    # The sampler's own stream, the prompt exchanged without a switch at frame 6.
    sampled, blocks = tiny.run(SETUP, 2)
    sampled = sampled.replace(context=tiny.context(1, SETUP))
    made = list(blocks)
    for number in range(2, 5):
        sampled, block = stream.step(
            tiny.variables(), sampled, tiny.noise(number, SETUP), setup=SETUP
        )
        made.append(block)
    sampled = tiny.switch(SETUP, sampled, 2, 15)
    for number in range(5, 6):
        sampled, block = stream.step(
            tiny.variables(), sampled, tiny.noise(number, SETUP), setup=SETUP
        )
        made.append(block)

    ours = np.concatenate([one.latents for one in (first, second, third)], axis=1)
    np.testing.assert_allclose(ours, tiny.latents(made), atol=2e-5)


@pytest.mark.slow
def test_an_earlier_exit_is_that_levels_estimate():
    _, chunk = roll(begin(), 0, 1, jnp.int32(0))

    _, blocks = tiny.run(SETUP, 1)

    np.testing.assert_allclose(chunk.latents, blocks[0].passes.x0[0], atol=1e-5)
    np.testing.assert_allclose(chunk.noisy[0], blocks[0].passes.noisy[0], atol=0)


@pytest.mark.slow
def test_the_trained_release_sees_a_sink_of_zeros_after_a_switch():
    setup = tiny.setup(as_trained(POLICIES["anchor_forcing"]))
    last = jnp.int32(0)
    state = begin(setup)
    for number in range(5):
        state, _ = roll(state, number, 1, last, setup)
    assert np.any(state.cache.slots.k[:, :, :3])

    state, chunk = roll(state, 5, 2, last, setup, prompts=(0, 1), at=15)

    assert not np.any(state.cache.slots.k[:, :, :3])
    assert not np.any(state.cache.slots.v[:, :, :3])
    assert chunk.recache.frames == 12 and np.all(chunk.plans.frames == 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "captured"),
    [(as_trained(POLICIES["anchor_forcing"]), 15), (POLICIES["anchor_forcing"], 18)],
    ids=["release", "paper"],
)
def test_a_switch_within_a_chunk_captures_its_block_or_the_chunks_first(
    policy, captured
):
    setup, last = tiny.setup(policy), jnp.int32(0)
    state = begin(setup)
    for number in range(5):
        state, _ = roll(state, number, 1, last, setup)
    alone, _ = roll(state, 5, 1, last, setup)

    after, chunk = roll(state, 5, 2, last, setup, prompts=(0, 1), at=18)

    ring = policy.sink + policy.local
    newest = np.argsort(np.asarray(alone.cache.index.frame)[policy.sink : ring])[-3:]
    first = np.asarray(alone.cache.slots.k)[:, :, policy.sink + newest]
    own = np.asarray(chunk.own.k)[0]
    expected = {15: first, 18: own}[captured]
    np.testing.assert_allclose(after.cache.slots.k[:, :, ring:], expected, atol=1e-6)
    assert np.abs(first - own).max() > 1e-2
    assert not after.cache.index.capture


@pytest.mark.slow
def test_a_noised_clean_pass_changes_what_is_remembered_alone():
    noisy = dataclasses.replace(SETUP, floor=0.3)
    noise = chunk_noise(0, 1)
    noise = BlockNoise(noise.initial, noise.fresh, jnp.ones_like(noise.initial))
    given = (tiny.variables(), begin(), (tiny.embedding(0),), noise, jnp.int32(1))

    plain, first = rollout.roll(*given, setup=SETUP)
    other, second = rollout.roll(*given, setup=noisy)

    np.testing.assert_allclose(first.latents, second.latents, atol=1e-6)
    assert not np.allclose(plain.cache.slots.k, other.cache.slots.k)
    np.testing.assert_allclose(plain.recent, other.recent, atol=1e-6)


def test_the_window_is_the_new_frames_after_a_renewed_one():
    previous = jnp.arange(21.0).reshape(1, 21, 1, 1, 1)
    new = 21 + jnp.arange(18.0).reshape(1, 18, 1, 1, 1)
    seen = []

    def renew(latents):
        seen.append(latents[0, :, 0, 0, 0])
        return -jnp.ones((1, 1, 1, 1, 1))

    clip, mask = rollout.window(previous, new, renew)

    np.testing.assert_array_equal(clip[0, :, 0, 0, 0], [-1, *range(19, 39)])
    np.testing.assert_array_equal(mask, [False] * 3 + [True] * 18)
    np.testing.assert_array_equal(seen[0], range(19))


@pytest.mark.slow
def test_a_first_chunk_is_its_own_window():
    latents = jnp.ones((1, 21, 1, 1, 1))

    clip, mask = rollout.window(0 * latents, latents, renew=None)

    assert clip is latents and mask.all()
