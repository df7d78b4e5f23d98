"""The stream as a whole, on a tiny random model: what may matter, what must not."""

import dataclasses
import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from anchor_jax import trees
from anchor_jax.cache import store
from anchor_jax.cache.memory import lay_out
from anchor_jax.cache.policies import Flush, Keep, Policy, Recache, RecachePass
from anchor_jax.cache.positions import Absolute, Relative
from anchor_jax.flow import few_step_levels
from anchor_jax.streaming import stream
from anchor_jax.streaming.loop import DpmPlusPlus, Euler, Renoise, UniPC
from anchor_jax.streaming.types import PromptChange
from anchor_jax.wan.attention import LayersKV, Prefix, Spans, block_causal
from anchor_jax.wan.dit import WanDit
from anchor_jax.wan.rope import rotary, rotate

PAPER, RELEASE = tiny.setup("anchor_forcing"), tiny.setup("anchor_forcing_release")
PLAIN = tiny.setup("tri_region_no_junction")
FLUSH = tiny.setup(
    Policy(sink=1, window=12, positions=Relative(range=12), on_switch=Flush())
)
JUNCTION, RING = slice(9, 12), slice(3, 9)


@functools.partial(jax.jit, static_argnames="visible_static")
def network(x, timestep, context, query, own, visible=None, past=None, *,
            visible_static=None):  # fmt: skip
    """The network by itself; keys at `own`, past keys already rotated."""
    times = jnp.full(x.shape[:2], timestep, jnp.float32)
    visible = visible_static or visible
    model = WanDit(tiny.MODEL)
    if past is not None and isinstance(visible, Prefix):
        past = lay_out(model.attention, tiny.MODEL.head_dim, past, x.shape[1])
    return model.apply(tiny.variables(), x, times, context, visible, query, own, past)


def rotated(stored, positions):
    """Stored keys at the given positions."""
    by = rotary(jnp.asarray(positions), (2, 2), tiny.MODEL.head_dim, 100.0)
    return LayersKV(k=rotate(stored.k, by), v=stored.v)


def slots(cache, which):
    return jax.tree.map(lambda x: x[:, :, which], cache.slots)


def held(state):
    """Keys and values by latent frame, of sink and ring."""
    frames = np.asarray(state.cache.index.frame)[:9].tolist()
    return {
        frame: np.stack([state.cache.slots.k[:, :, i], state.cache.slots.v[:, :, i]])
        for i, frame in enumerate(frames)
        if frame >= 0
    }


def step(settings, state, number, **changes):
    """The next block from a copy of the state, which stays usable."""
    noise = dataclasses.replace(tiny.noise(number, settings), **changes)
    return stream.step(tiny.variables(), tiny.copy(state), noise, setup=settings)


def far(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def shapes(tree):
    """Shapes, types and weak types: what a compiled program is looked up by."""
    return jax.tree.map(lambda x: str(jax.typeof(x)) + str(x.weak_type), tree)


@functools.cache
def standing(settings, blocks, switches=()):
    """A state after some blocks; only ever copied."""
    return tiny.run(settings, blocks, switches)[0]


@pytest.mark.slow
def test_one_program_serves_200_blocks_with_20_switches(monkeypatch):
    settings = dataclasses.replace(PAPER, levels=few_step_levels((1000,), 5.0))
    before = stream.step._cache_size(), stream.switch._cache_size()
    switches = [7, 8, 12, *range(40, 560, 30)][:20]
    tiny.trace_at_most(monkeypatch, advance=1, _recache=3)

    state, _ = tiny.run(settings, 200, switches)

    assert int(state.cache.index.switches) == 20
    assert int(state.cache.index.start) == 600
    assert stream.step._cache_size() - before[0] == 1
    # Re-caches of 9 and 12 frames with the sink, and of the window without.
    assert stream.switch._cache_size() - before[1] == 3


@pytest.mark.slow
def test_equal_policies_share_a_program(monkeypatch):
    tiny.run(PAPER, 1)
    before = stream.step._cache_size()

    again = tiny.setup(dataclasses.replace(PAPER.policy, window=12))
    tiny.trace_at_most(monkeypatch, advance=0)
    tiny.run(again, 1)

    assert stream.step._cache_size() == before


@pytest.mark.slow
def test_a_warm_cache_of_programs_hides_no_trace(monkeypatch):
    other = dataclasses.replace(PAPER, levels=few_step_levels((987,), 5.0))
    tiny.trace_at_most(monkeypatch, advance=0)

    with pytest.raises(AssertionError, match="traced > 0 times"):
        tiny.run(other, 1)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PAPER, RELEASE], ids=["paper", "release"])
def test_state_keeps_its_shapes_through_steps_and_switches(settings):
    state = stream.start(tiny.context(0, settings), setup=settings)
    fresh = shapes(state)

    state, _ = stream.step(
        tiny.variables(), state, tiny.noise(0, settings), setup=settings
    )

    assert shapes(state) == fresh
    assert shapes(tiny.switch(settings, state, 1, 2)) == fresh


def test_a_block_that_changes_the_states_types_is_refused(monkeypatch):
    def commit(stored, own, plan):
        return trees.cast(stored, jnp.bfloat16)

    given = (tiny.variables(), standing(PAPER, 1), tiny.noise(1, PAPER))
    monkeypatch.setattr(store, "commit", commit)

    with pytest.raises(AssertionError, match="types: bfloat16 != float32"):
        jax.eval_shape(functools.partial(stream.advance, setup=PAPER), *given)


def test_keys_without_a_slot_are_refused():
    cache = standing(PAPER, 1).cache
    plan, _ = PAPER.policy.write(cache.index)

    with pytest.raises(AssertionError, match="assert_shape"):
        store.commit(cache.slots, store.take(cache.slots, 0, 4), plan)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PAPER, RELEASE], ids=["paper", "release"])
def test_state_is_donated_without_complaint(settings):
    state = stream.start(tiny.context(0, settings), setup=settings)
    given = state

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(4):
            state = tiny.switch(settings, state, number, 3 * number)
            state, _ = stream.step(
                tiny.variables(), state, tiny.noise(number, settings), setup=settings
            )

    assert given.cache.slots.k.is_deleted() and given.recent.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.slow
def test_later_blocks_depend_on_earlier_ones_but_no_gradient_flows():
    def last(initial):
        state = stream.start(tiny.context(0, PAPER), setup=PAPER)
        noise = dataclasses.replace(tiny.noise(0, PAPER), initial=initial)
        state, _ = stream.step(tiny.variables(), state, noise, setup=PAPER)
        noise = tiny.noise(1, PAPER)
        _, block = stream.step(tiny.variables(), state, noise, setup=PAPER)
        return jnp.sum(block.latents**2)

    initial = tiny.noise(0, PAPER).initial
    through_cache = jax.jit(jax.grad(last))(initial)

    assert abs(last(initial) - last(initial + 0.1)) > 1e-3
    assert np.all(np.asarray(through_cache) == 0)


def test_every_earlier_block_in_the_window_reaches_a_later_one():
    base = tiny.latents(tiny.run(PAPER, 6)[1])
    state = stream.start(tiny.context(0, PAPER), setup=PAPER)
    made = []
    for number in range(6):
        changes = {}
        if number == 2:
            changes = {"initial": tiny.noise(number, PAPER).initial + 0.5}
        state, block = step(PAPER, state, number, **changes)
        made.append(block)

    difference = np.abs(tiny.latents(made) - base).max(axis=(0, 2, 3, 4))
    assert np.all(difference[:6] == 0)
    assert np.all(difference[6:] > 1e-4)


MOMENTS = {
    "first block": (PAPER, 0, ()),
    "only a sink": (PAPER, 1, ()),
    "half a ring": (PAPER, 2, ()),
    "full": (PAPER, 5, ()),
    "after an early recache": (PAPER, 3, (8,)),
    "junction captured, unseen": (PAPER, 6, (13,)),
    "junction seen": (PAPER, 9, (13,)),
    "release, gap": (RELEASE, 8, (15,)),
    "release, seen": (RELEASE, 9, (15,)),
    "release, prior": (RELEASE, 6, (9, 12, 15)),
    "flushed": (FLUSH, 8, (20,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_only_what_is_visible_matters(moment):
    settings, blocks, switches = MOMENTS[moment]
    policy, number = settings.policy, blocks
    state = standing(settings, blocks, switches)
    _, block = step(settings, state, number)
    plan = block.plan
    ring_end = policy.sink + policy.local
    seen = int(plan.frames) - policy.block
    visible = set(range(seen - policy.junction_frames * int(plan.junction)))
    if plan.junction and not plan.prior:
        visible |= set(range(ring_end, policy.slots))
    sizes = {
        "first block": 0,
        "only a sink": 3,
        "half a ring": 6,
        "junction seen": 12,
        "release, seen": 12,
        "flushed": 6,
    }
    assert len(visible) == sizes.get(moment, 9)

    def change(which, amount):
        place = jnp.asarray(sorted(which), jnp.int32)
        poked = jax.tree.map(lambda x: x.at[:, :, place].add(amount), state.cache.slots)
        cache = state.cache.replace(slots=poked)
        if policy.keeps_prior and not plan.prior:
            prior = jax.tree.map(lambda x: x + 1e3, state.cache.prior)
            cache = cache.replace(prior=prior)
        return step(settings, state.replace(cache=cache), number)[1]

    hidden = set(range(policy.slots)) - visible
    assert far(change(hidden, 1e3).latents, block.latents) == 0
    assert far(change(hidden, 1e3).committed, block.committed) == 0
    for slot in visible:
        assert far(change({slot}, 0.5).latents, block.latents) > 1e-5, slot


@pytest.mark.slow
def test_prior_junction_is_seen_from_the_third_switch_on():
    state = standing(RELEASE, 6, (9, 12, 15))
    _, block = step(RELEASE, state, 6)
    assert bool(block.plan.prior) and int(block.plan.frames) == 15

    prior = jax.tree.map(lambda x: x + 0.5, state.cache.prior)
    poked = state.replace(cache=state.cache.replace(prior=prior))

    assert far(step(RELEASE, poked, 6)[1].latents, block.latents) > 1e-4


@pytest.mark.slow
def test_prior_junction_comes_directly_after_a_half_full_ring():
    state = tiny.switch(RELEASE, tiny.copy(standing(RELEASE, 2, (0, 3))), 3, 6)
    _, block = step(RELEASE, state, 2)
    assert bool(block.plan.prior) and int(block.plan.frames) == 12

    def change(prior, empty):
        moved = jax.tree.map(lambda x: x + prior, state.cache.prior)
        poked = jax.tree.map(lambda x: x.at[:, :, 6:9].add(empty), state.cache.slots)
        cache = state.cache.replace(prior=moved, slots=poked)
        return step(RELEASE, state.replace(cache=cache), 2)[1].latents

    assert far(change(0.0, 1e3), block.latents) == 0
    assert far(change(0.5, 0.0), block.latents) > 1e-4


def test_recache_from_the_first_frame_sees_the_junction_but_not_the_old_sink():
    state = standing(PAPER, 4, (0,))

    def again(which):
        poked = jax.tree.map(lambda x: x.at[:, :, which].add(0.5), state.cache.slots)
        cache = state.cache.replace(slots=poked)
        after = tiny.switch(PAPER, tiny.copy(state.replace(cache=cache)), 5, 12)
        return slots(after.cache, slice(0, 9)).v

    base = again(slice(0, 0))

    assert far(again(slice(0, 3)), base) == 0
    assert far(again(JUNCTION), base) > 1e-4


def test_invisible_frames_do_not_matter_to_a_recache():
    for switches, sees_junction in (((), False), ((13,), True)):
        state = standing(PAPER, 11, switches)
        assert (0 < int(state.cache.index.switches)) == sees_junction
        again = tiny.switch(PAPER, tiny.copy(state), 5, 33)

        def change(which, state=state):
            poked = jax.tree.map(
                lambda x: x.at[:, :, which].add(1e3), state.cache.slots
            )
            cache = state.cache.replace(slots=poked)
            return tiny.switch(PAPER, tiny.copy(state.replace(cache=cache)), 5, 33)

        ring = change(RING)
        assert far(slots(ring.cache, RING).k, slots(again.cache, RING).k) == 0
        junction = change(JUNCTION)
        moved = far(slots(junction.cache, RING).v, slots(again.cache, RING).v)
        assert (moved > 1e-4) == sees_junction
        sink = change(slice(0, 3))
        assert far(slots(sink.cache, RING).v, slots(again.cache, RING).v) > 1e-4


@pytest.mark.slow
def test_block_by_block_equals_one_block_causal_pass():
    settings = tiny.setup(Policy(sink=0, window=12, positions=Absolute()))

    _, blocks = tiny.run(settings, 4)

    position = jnp.arange(12)
    whole, _ = network(
        jnp.asarray(tiny.latents(blocks)),
        0.0,
        tiny.context(0, settings),
        position,
        position,
        visible_static=block_causal((3,) * 4),
    )
    committed = np.concatenate([block.committed for block in blocks], axis=1)
    np.testing.assert_allclose(committed, whole, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_first_21_frames_are_those_of_absolute_rope():
    absolute = tiny.latents(tiny.run(tiny.setup("longlive"), 8)[1])
    ours = tiny.latents(tiny.run(PLAIN, 8)[1])

    np.testing.assert_allclose(ours[:, :21], absolute[:, :21], rtol=0, atol=1e-5)
    assert far(ours[:, 21:], absolute[:, 21:]) > 1e-3


@pytest.mark.slow
def test_a_window_without_sink_knows_no_absolute_position():
    def latents(positions):
        policy = Policy(sink=0, window=12, positions=positions)
        return tiny.latents(tiny.run(tiny.setup(policy), 12)[1])

    np.testing.assert_allclose(
        latents(Relative(range=12)), latents(Absolute()), rtol=0, atol=1e-4
    )


def stacked(states):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


SESSIONS = [(PAPER, 1, ()), (PAPER, 4, (8,)), (PAPER, 9, (13,))]


@pytest.mark.slow
def test_independent_sessions_step_together_under_vmap():
    states = [standing(*session) for session in SESSIONS]
    noises = [tiny.noise(session[1], PAPER) for session in SESSIONS]
    together = jax.vmap(
        functools.partial(stream.step, setup=PAPER), in_axes=(None, 0, 0)
    )

    state, blocks = together(tiny.variables(), stacked(states), stacked(noises))

    assert blocks.plan.frames.tolist() == [6, 12, 15]
    for i, alone in enumerate(states):
        after, block = step(PAPER, alone, SESSIONS[i][1])
        ours = jax.tree.map(lambda x, i=i: x[i], (state, blocks.latents))
        np.testing.assert_allclose(ours[1], block.latents, rtol=0, atol=2e-5)
        chex.assert_trees_all_close(ours[0], after, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_switch_acts_on_one_session_of_a_batch_by_dynamic_index():
    states = [standing(*session) for session in SESSIONS]
    recache = PAPER.policy.recache(27)
    context = tiny.context(4, PAPER)

    after = stream.switch_slot(
        tiny.variables(),
        stacked(states),
        jnp.int32(2),
        context,
        27,
        setup=PAPER,
        recache=recache,
    )

    expected = [*states[:2], tiny.switch(PAPER, tiny.copy(states[2]), 4, 27)]
    chex.assert_trees_all_close(after, stacked(expected), rtol=0, atol=2e-5)
    assert far(after.cache.slots.v[2], states[2].cache.slots.v) > 1e-3


@pytest.mark.slow
def test_recache_of_9_frames_equals_the_official_one_of_12():
    state = standing(PLAIN, 6)
    before, context = held(state), tiny.context(1, PLAIN)
    recent = np.asarray(state.recent)[:, np.arange(6, 18) % 12]
    sink = slots(state.cache, slice(0, 3))

    after = held(tiny.switch(PLAIN, tiny.copy(state), 1, 18))

    # All 12 query, but the first 3 are not stored and no keys.
    _, own = network(
        jnp.asarray(recent),
        0.0,
        context,
        jnp.arange(6, 18),
        jnp.arange(6, 18),
        past=rotated(sink, [0, 1, 2]),
        visible_static=Spans(((0, 12, ((3, 15),)),)),
    )
    assert after.keys() == before.keys() == {0, 1, 2, *range(12, 18)}
    for frame in range(3):
        np.testing.assert_array_equal(after[frame], before[frame])
    for frame in range(12, 18):
        expected = np.stack([own.k[:, :, frame - 6], own.v[:, :, frame - 6]])
        np.testing.assert_allclose(after[frame], expected, rtol=0, atol=2e-5)
        assert far(after[frame], before[frame]) > 1e-2


@pytest.mark.slow
def test_early_recache_rewrites_the_sink():
    state = standing(PLAIN, 4)

    before, after = held(state), held(tiny.switch(PLAIN, tiny.copy(state), 1, 12))

    assert after.keys() == before.keys()
    assert all(far(after[frame], before[frame]) > 1e-2 for frame in after)


@pytest.mark.slow
def test_rewritten_sink_holds_the_oldest_frames_of_the_window():
    rewrite = tiny.setup(Policy(on_switch=Recache(rewrite_sink=True)))

    # Both policies have the same state.
    after = tiny.switch(rewrite, tiny.copy(standing(PLAIN, 6)), 1, 18)

    assert sorted(held(after)) == [6, 7, 8, *range(12, 18)]
    assert after.cache.index.frame[:3].tolist() == [6, 7, 8]
    assert all(np.abs(stored).max() > 1e-2 for stored in held(after).values())


def test_without_recache_only_the_prompt_changes():
    keep = tiny.setup("no_recache")
    state = standing(PAPER, 5)

    after = tiny.switch(keep, tiny.copy(state), 1, 15)

    np.testing.assert_array_equal(after.cache.slots.k, state.cache.slots.k)
    np.testing.assert_array_equal(after.context.k, tiny.context(1, keep).k)
    assert bool(after.cache.index.capture)


@pytest.mark.slow
def test_flush_keeps_keys_and_values_as_they_are():
    state = standing(FLUSH, 7)

    after = tiny.switch(FLUSH, tiny.copy(state), 1, 21)

    index, before = after.cache.index, state.cache.index.frame.tolist()
    assert index.frame[:3].tolist() == [0, 19, 20] and int(index.filled) == 2
    for slot, frame in enumerate([0, 19, 20]):
        np.testing.assert_array_equal(
            after.cache.slots.k[:, :, slot],
            state.cache.slots.k[:, :, before.index(frame)],
        )


@pytest.mark.slow
def test_junction_is_the_clean_pass_of_the_block_after_the_switch():
    state = tiny.switch(PAPER, tiny.copy(standing(PAPER, 5)), 1, 14)
    sink, ring = slots(state.cache, slice(0, 3)), slots(state.cache, RING)
    order = np.argsort(np.asarray(state.cache.index.frame)[3:9])
    ring = jax.tree.map(lambda x: x[:, :, order], ring)

    state, block = step(PAPER, state, 5)

    past = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], axis=2),
        rotated(sink, [0, 1, 2]),
        rotated(ring, np.arange(9, 15)),
    )
    position = jnp.arange(15, 18)
    _, own = network(
        block.latents, 0.0, state.context, position, position,
        Prefix(jnp.int32(12)), past,
    )  # fmt: skip
    junction = slots(state.cache, JUNCTION)
    np.testing.assert_allclose(junction.k, own.k, rtol=0, atol=2e-5)
    np.testing.assert_allclose(junction.v, own.v, rtol=0, atol=2e-5)
    assert state.cache.index.frame[JUNCTION].tolist() == [15, 16, 17]
    for number in range(6, 12):
        state, _ = step(PAPER, state, number)
    np.testing.assert_array_equal(slots(state.cache, JUNCTION).k, junction.k)


def test_release_captures_every_pass_so_that_prior_is_the_last_noisy_one():
    state = stream.start(tiny.context(0, RELEASE), setup=RELEASE)
    state = tiny.switch(RELEASE, state, 1, 0)

    state, block = step(RELEASE, state, 0)

    position = jnp.arange(3)
    for latents, timestep, kept in (
        (block.passes.noisy[-1], RELEASE.levels.timestep[-1], state.cache.prior),
        (block.latents, 0.0, slots(state.cache, JUNCTION)),
    ):
        _, own = network(
            latents, timestep, state.context, position, position, Prefix(jnp.int32(3))
        )
        np.testing.assert_allclose(kept.k, own.k, rtol=0, atol=2e-5)
        np.testing.assert_allclose(kept.v, own.v, rtol=0, atol=2e-5)
    assert far(state.cache.prior.v, slots(state.cache, JUNCTION).v) > 1e-3


def test_both_rules_agree_until_the_third_switch_off_the_block_grid():
    switches = (13, 28)

    paper = tiny.latents(tiny.run(PAPER, 15, switches)[1])

    release = tiny.latents(tiny.run(RELEASE, 15, switches)[1])
    # The second re-cache falls when only the paper's rule shows the junction.
    np.testing.assert_allclose(paper[:, :30], release[:, :30], rtol=0, atol=2e-5)
    later = tiny.latents(tiny.run(PAPER, 9, (12,))[1])
    gap = tiny.latents(tiny.run(RELEASE, 9, (12,))[1])
    np.testing.assert_allclose(later[:, :21], gap[:, :21], rtol=0, atol=2e-5)
    assert far(later[:, 21:24], gap[:, 21:24]) > 1e-4


@pytest.mark.parametrize("settings", [PAPER, RELEASE], ids=["paper", "release"])
def test_a_saved_stream_continues_bit_for_bit(settings):
    switches = (9, 12, 15)
    whole = tiny.latents(tiny.run(settings, 9, switches)[1])
    state = standing(settings, 6, switches)

    saved = jax.tree.map(np.asarray, state)
    loaded = jax.tree.map(jnp.asarray, saved)
    rest = tiny.latents(tiny.run(settings, 3, state=loaded)[1])

    np.testing.assert_array_equal(rest, whole[:, 18:])


@pytest.mark.slow
def test_resume_equals_running_the_clip_again_from_its_start():
    blocks, frames = 3, 9
    state, made = tiny.run(PLAIN, blocks)
    expected = tiny.switch(PLAIN, state, 0, frames, RecachePass(frames, sink=True))

    fresh = stream.start(tiny.context(0, PLAIN), setup=PLAIN)
    clip = jnp.asarray(tiny.latents(made))
    ours = stream.resume(tiny.variables(), fresh, clip, setup=PLAIN)

    np.testing.assert_allclose(ours.recent, expected.recent, rtol=0, atol=0)
    np.testing.assert_array_equal(ours.cache.index.frame, expected.cache.index.frame)
    np.testing.assert_allclose(
        ours.cache.slots.k, expected.cache.slots.k, rtol=0, atol=2e-5
    )
    after, block = step(PLAIN, ours, blocks)
    np.testing.assert_allclose(
        block.latents, step(PLAIN, expected, blocks)[1].latents, rtol=0, atol=2e-5
    )
    assert int(after.cache.index.start) == frames + 3


@pytest.mark.parametrize("frames", [0, 4, 15])
def test_resume_refuses_a_clip_that_does_not_fit(frames):
    state = stream.start(tiny.context(0, PLAIN), setup=PLAIN)

    with pytest.raises(ValueError, match=f"got {frames} latent frames"):
        stream.resume(
            tiny.variables(), state, jnp.zeros((1, frames, 4, 4, 4)), setup=PLAIN
        )


def test_recent_latents_are_the_newest_of_the_window():
    state, blocks = tiny.run(PAPER, 6, (9,))

    newest = tiny.latents(blocks)[:, 6:18]
    np.testing.assert_array_equal(state.recent[:, np.arange(6, 18) % 12], newest)


def batched(settings, blocks, contexts, seeds):
    context = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *contexts)
    state = stream.start(context, setup=settings)
    made = []
    for number in range(blocks):
        noises = [tiny.noise(number, settings, seed=seed) for seed in seeds]
        noise = stream.BlockNoise(
            jnp.concatenate([noise.initial for noise in noises]),
            jnp.concatenate([noise.fresh for noise in noises], axis=1),
        )
        state, block = stream.step(tiny.variables(), state, noise, setup=settings)
        made.append(block)
    return state, made


@pytest.mark.slow
def test_two_videos_in_a_batch_equal_two_runs():
    contexts = [tiny.context(prompt, PAPER) for prompt in (0, 3)]

    _, both = batched(PAPER, 5, contexts, seeds=(0, 7))

    for row, (context, seed) in enumerate(zip(contexts, (0, 7), strict=True)):
        state = stream.start(context, setup=PAPER)
        alone = tiny.run(PAPER, 5, seed=seed, state=state)[1]
        np.testing.assert_allclose(
            tiny.latents(both)[row], tiny.latents(alone)[0], rtol=0, atol=2e-5
        )


@pytest.mark.slow
def test_guidance_equals_two_calls_mixed():
    settings = dataclasses.replace(PAPER, guidance=3.0)
    contexts = [tiny.context(prompt, PAPER) for prompt in (0, 1)]

    state, (block,) = batched(settings, 1, contexts, seeds=(0,))

    levels, position = settings.levels.timestep, jnp.arange(3)
    said = [block.passes.noisy[i] for i in range(len(levels))]
    flows = [block.passes.flow[i] for i in range(len(levels))]
    for noisy, timestep, flow in zip(
        [*said, block.latents], [*levels, 0.0], [*flows, block.committed], strict=True
    ):
        calls = [
            network(noisy, timestep, context, position, position, Prefix(jnp.int32(3)))
            for context in contexts
        ]
        (with_prompt, own), (without, own_without) = calls
        mixed = without + 3 * (with_prompt - without)
        np.testing.assert_allclose(flow, mixed, rtol=0, atol=5e-5)
    both = np.concatenate([own.k, own_without.k], axis=1)
    np.testing.assert_allclose(
        slots(state.cache, slice(0, 3)).k, both, rtol=0, atol=2e-5
    )
    assert state.recent.shape[0] == 1


def test_guidance_needs_a_negative_prompt_for_every_prompt():
    settings = dataclasses.replace(PAPER, guidance=3.0)

    with pytest.raises(ValueError, match="context batch 1 must be a multiple of 2"):
        stream.start(tiny.context(0, PAPER), setup=settings)


def test_noise_is_a_function_of_key_and_frame():
    key = jax.random.key(0)
    like = jnp.zeros((2, 1))

    def draw(start, rng=key):
        return stream.draw_noise(rng, start, like, setup=PAPER)

    base = draw(6)
    assert base.initial.shape == (2, 3, 4, 4, 4)
    assert base.fresh.shape == (1, 2, 3, 4, 4, 4)
    np.testing.assert_array_equal(base.initial, draw(6).initial)
    assert far(base.initial, draw(9).initial) > 1
    assert far(base.initial, draw(6, jax.random.key(1)).initial) > 1
    assert far(base.initial, base.fresh[0]) > 1
    assert far(base.initial[0], base.initial[1]) > 1


def test_the_hosts_loop_switches_before_its_block():
    key, changes = jax.random.key(3), {6: PromptChange(tiny.context(1, PAPER))}
    state = stream.start(tiny.context(0, PAPER), setup=PAPER)

    given = (tiny.variables(), tiny.copy(state), key, range(0, 12, 3), changes)
    looped = [latents for _, latents, _ in stream.run(*given, setup=PAPER)]

    for number, latents in enumerate(looped):
        if number == 2:
            state = tiny.switch(PAPER, state, 1, 6)
        noise = stream.draw_noise(key, 3 * number, jnp.zeros(1), setup=PAPER)
        state, block = stream.step(tiny.variables(), state, noise, setup=PAPER)
        np.testing.assert_allclose(latents, block.latents, rtol=0, atol=2e-5)
    assert len(looped) == 4


@pytest.mark.slow
def test_a_single_bidirectional_window_needs_no_memory():
    policy = Policy(block=6, sink=0, window=6, positions=Absolute(), on_switch=Keep())
    settings = tiny.setup(policy)
    state = stream.start(tiny.context(0, settings), setup=settings)

    after, base = step(settings, state, 0)

    assert after.cache.slots.k.shape[2] == 0 and after.recent.shape[1] == 0
    initial = tiny.noise(0, settings).initial
    for frame in (0, 5):
        moved = step(settings, state, 0, initial=initial.at[:, frame].add(1.0))[1]
        reached = np.abs(moved.latents - base.latents).max(axis=(0, 2, 3, 4))
        assert np.all(reached > 1e-4)


def test_a_context_of_another_batch_is_refused():
    state = standing(PAPER, 2)
    context = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=1), tiny.context(1, PAPER))

    with pytest.raises(ValueError, match="one prompt for every video"):
        stream.switch(tiny.variables(), state, context, 6, setup=PAPER, recache=None)
    with (
        pytest.warns(FutureWarning, match="rerun= is now called recache="),
        pytest.raises(ValueError, match="project one prompt for every video"),
    ):
        stream.switch(tiny.variables(), state, context, 6, setup=PAPER, rerun=None)


def test_a_policy_without_memory_cannot_continue_a_clip():
    policy = Policy(block=6, sink=0, window=6, positions=Absolute(), on_switch=Keep())
    setup = tiny.setup(policy)
    state = stream.start(tiny.context(0, setup), setup=setup)

    with pytest.raises(ValueError, match="stores no past frames"):
        latents = jnp.zeros((1, 6, 4, 4, 4))
        stream.resume(tiny.variables(), state, latents, setup=setup)


def test_a_videos_noise_does_not_depend_on_how_many_are_made():
    rng = jax.random.key(3)

    alone = stream.draw_noise(rng, 6, jnp.zeros(1), setup=PAPER)
    beside = stream.draw_noise(rng, 6, jnp.zeros(4), setup=PAPER)

    np.testing.assert_array_equal(alone.initial[0], beside.initial[0])
    np.testing.assert_array_equal(alone.fresh[:, 0], beside.fresh[:, 0])
    assert not np.array_equal(beside.initial[0], beside.initial[1])


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Renoise(), Euler(), UniPC(), DpmPlusPlus()])
def test_bfloat16_streams_run_with_every_solver(solver):
    model = dataclasses.replace(tiny.MODEL, dtype="bfloat16")
    setup = tiny.setup(model=model, solver=solver)
    state = stream.start(tiny.context(0, setup), setup=setup)
    for start in (0, 3):
        noise = stream.draw_noise(jax.random.key(0), start, jnp.zeros(1), setup=setup)
        state, block = stream.step(tiny.variables(), state, noise, setup=setup)

    assert block.latents.dtype == solver.dtype("bfloat16")
    assert state.cache.slots.k.dtype == jnp.bfloat16
    chex.assert_tree_all_finite(block)
