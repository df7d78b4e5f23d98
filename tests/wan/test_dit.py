"""The transformer: counts, layers in a loop, LoRA, prompts, who sees whom."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from anchor_jax.cache.memory import lay_out
from anchor_jax.wan import dit
from anchor_jax.wan.attention import (
    ContextKV,
    LayersKV,
    Prefix,
    bidirectional,
    block_causal,
    teacher_forcing,
)
from anchor_jax.wan.dit import WanDit
from anchor_jax.wan.kernels import Plain, attend
from anchor_jax.wan.spec import WAN_1_3B, WAN_14B, LatentGrid, ModelConfig


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "config, parameters, tensors",
    [(WAN_1_3B, 1_418_996_800, 825), (WAN_14B, 14_288_491_584, 1095)],
    ids=["1.3B", "14B"],
)
def test_networks_have_the_official_sizes(config, parameters, tensors):
    shapes = jax.eval_shape(lambda: dit.init_params(config, jax.random.key(0)))

    assert count(shapes) == parameters
    flat = traverse_util.flatten_dict(shapes)
    stacked = [path for path in flat if path[0] in ("blocks", "context")]
    others = len(flat) - len(stacked)
    assert others + len(stacked) * config.num_layers == tensors
    assert all(flat[path].shape[0] == config.num_layers for path in stacked)


def latents(frames, seed=0):
    rng = np.random.default_rng([3, seed])
    return jnp.asarray(rng.standard_normal((1, frames, 4, 4, 4)), jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def forward(variables, x, times, context, visible, position, past, config):
    model = dit.WanDit(config)
    return model.apply(variables, x, times, context, visible, position, position, past)


def apply(variables, x, context, visible, config=tiny.MODEL, past=None, **at):
    """The flow and own keys and values; frames at their own numbers, half noise."""
    position = jnp.asarray(at.get("position", np.arange(x.shape[1])), jnp.int32)
    times = jnp.broadcast_to(jnp.asarray(at.get("times", 500.0)), x.shape[:2])
    return forward(variables, x, times, context, visible, position, past, config)


@functools.partial(jax.jit, static_argnames="config")
def projected(variables, words, config):
    return dit.WanDit(config).apply(variables, words, method="project")


def project(words, variables=None, config=tiny.MODEL):
    return projected(variables or tiny.variables(), words, config)


@functools.cache
def loss_and_gradient(config):
    x, words = latents(3), tiny.embedding(0)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        variables = {"params": params}
        context = project(words, variables, config)
        flow, _ = apply(variables, x, context, bidirectional(3), config)
        return jnp.mean(jnp.square(flow - x))

    return loss(tiny.variables()["params"])


@pytest.mark.slow
def test_loop_over_layers_equals_layers_in_a_row():
    x, context = latents(3), project(tiny.embedding(0))
    row = dataclasses.replace(tiny.MODEL, unroll=2)

    scanned = apply(tiny.variables(), x, context, bidirectional(3))
    unrolled = apply(tiny.variables(), x, context, bidirectional(3), row)

    chex.assert_trees_all_close(scanned, unrolled, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_rematerialisation_changes_nothing():
    kept = loss_and_gradient(tiny.MODEL)
    again = loss_and_gradient(dataclasses.replace(tiny.MODEL, remat="dots_saveable"))

    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(kept[1]))
    chex.assert_trees_all_close(kept, again, rtol=1e-4, atol=1e-6)


def test_layers_differ_and_both_count():
    x, context = latents(3), project(tiny.embedding(0))
    flow, own = apply(tiny.variables(), x, context, bidirectional(3))
    swapped = jax.tree.map(lambda leaf: leaf, tiny.variables())
    swapped["params"]["blocks"] = jax.tree.map(
        lambda leaf: leaf[::-1], swapped["params"]["blocks"]
    )

    other, own_other = apply(swapped, x, context, bidirectional(3))

    assert np.abs(flow - other).max() > 1e-3
    assert own.k.shape == (2, 1, 3, 4, 48)
    assert np.abs(own.k[0] - own_other.k[0]).max() > 1e-3


def lora_like(params, rank, seed=1, up_scale=1.0):
    """A low-rank pair for every kernel of the blocks."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, kernel in traverse_util.flatten_dict(params).items():
        if path[0] != "blocks" or path[-1] != "kernel":
            continue
        lead, fan_in, fan_out = kernel.shape
        down = rng.standard_normal((lead, fan_in, rank)) / np.sqrt(fan_in)
        up = up_scale * rng.standard_normal((lead, rank, fan_out))
        flat[(*path[:-1], "a")] = jnp.asarray(down, jnp.float32)
        flat[(*path[:-1], "b")] = jnp.asarray(up, jnp.float32)
    return traverse_util.unflatten_dict(flat)


@pytest.mark.slow
def test_lora_of_zero_changes_nothing():
    x, context = latents(3), project(tiny.embedding(0))
    base = tiny.variables()
    zero = {**base, "lora": lora_like(base["params"], 2, up_scale=0.0)}

    expected = apply(base, x, context, bidirectional(3))[0]
    ours = apply(zero, x, context, bidirectional(3))[0]

    np.testing.assert_array_equal(ours, expected)


def test_lora_equals_its_merged_weights():
    x, context = latents(3), project(tiny.embedding(0))
    base = tiny.variables()
    lora = lora_like(base["params"], 2, up_scale=0.3)
    flat, updates = (
        traverse_util.flatten_dict(tree) for tree in (base["params"], lora)
    )
    merged = dict(flat)
    for path in flat:
        if (*path[:-1], "a") in updates and path[-1] == "kernel":
            down, up = updates[(*path[:-1], "a")], updates[(*path[:-1], "b")]
            merged[path] = flat[path] + down @ up
    merged = {"params": traverse_util.unflatten_dict(merged)}

    ours = apply({**base, "lora": lora}, x, context, bidirectional(3))[0]

    expected = apply(merged, x, context, bidirectional(3))[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    plain = apply(base, x, context, bidirectional(3))[0]
    assert np.abs(ours - plain).max() > 1e-2


@pytest.mark.slow
def test_padded_text_takes_part():
    x, words = latents(3), tiny.embedding(0)
    context = project(words)
    whole = apply(tiny.variables(), x, context, bidirectional(3))[0]

    cut = jax.tree.map(lambda leaf: leaf[..., :4, :], context)
    without = apply(tiny.variables(), x, cut, bidirectional(3))[0]

    assert not np.any(words[:, 4:])
    np.testing.assert_array_equal(context.k[..., 4, :], context.k[..., 5, :])
    assert np.abs(context.k[..., 4, :]).max() > 1e-2
    assert np.abs(whole - without).max() > 1e-3


@pytest.mark.slow
def test_several_prompts_per_video_equal_separate_calls():
    x = jnp.concatenate([latents(3, seed) for seed in range(2)], axis=1)
    x = jnp.concatenate([x, latents(6, 5)])
    alone = [project(tiny.embedding(prompt)) for prompt in range(4)]
    # Frames see only themselves, so that nothing else passes from half to half.
    together = ContextKV(
        *(
            jnp.concatenate(parts, 1)
            for parts in zip(*[(one.k, one.v) for one in alone], strict=True)
        )
    )
    variables = tiny.variables()

    ours = apply(variables, x, together, block_causal((3, 3), window=3))[0]

    for video in range(2):
        for half in range(2):
            part = x[video : video + 1, 3 * half : 3 * half + 3]
            context, position = alone[2 * video + half], 3 * half + np.arange(3)
            expected, _ = apply(
                variables, part, context, bidirectional(3), position=position
            )
            np.testing.assert_allclose(
                ours[video, 3 * half : 3 * half + 3], expected[0], rtol=0, atol=2e-5
            )


def test_unpatchify_has_the_channel_fastest():
    rows, columns, channels = 2, 3, 5
    y = np.arange(rows * columns * 4 * channels, dtype=np.float32)
    y = y.reshape(1, 1, rows * columns, 4 * channels)

    ours = np.asarray(dit.unpatchify(jnp.asarray(y), (rows, columns), (1, 2, 2)))

    assert ours.shape == (1, 1, 4, 6, channels)
    for h, w, p, q, c in np.ndindex(rows, columns, 2, 2, channels):
        expected = y[0, 0, h * columns + w, (p * 2 + q) * channels + c]
        assert ours[0, 0, 2 * h + p, 2 * w + q, c] == expected


@pytest.mark.slow
def test_every_frame_has_its_own_timestep():
    x, context = latents(3), project(tiny.embedding(0))
    alone = block_causal((1, 1, 1), window=1)

    def flow(times):
        times = jnp.asarray([times], jnp.float32)
        return apply(tiny.variables(), x, context, alone, times=times)[0]

    base, other = flow([1000, 500, 0]), flow([1000, 700, 0])

    np.testing.assert_array_equal(base[:, [0, 2]], other[:, [0, 2]])
    assert np.abs(base[:, 1] - other[:, 1]).max() > 1e-3


def dense(seen, *qkv):
    """The reference: a whole mask of query frames by key frames, in float64."""
    q, k, v = (np.asarray(x, np.float64).reshape(*x.shape[:-1], 2, 8) for x in qkv)
    scores = np.einsum("bfthd,bgshd->bhftgs", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.asarray(seen)[None, None, :, None, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=(-2, -1), keepdims=True))
    weights /= weights.sum(axis=(-2, -1), keepdims=True)
    return np.einsum("bhftgs,bgshd->bfthd", weights, v).reshape(qkv[0].shape)


ATTENTION = functools.partial(attend, Plain(), 8)


def block_of(frame, blocks):
    return int(np.searchsorted(np.cumsum(blocks), frame, side="right"))


def sees_causal(query, key, blocks, window=None):
    end = sum(blocks[: block_of(query, blocks) + 1])
    recent = window is None or key >= end - window
    return key < end and recent


def sees_teacher_forcing(query, key, blocks):
    frames = sum(blocks)
    clean_key, at = key < frames, block_of(query % frames, blocks)
    block = block_of(key % frames, blocks)
    if query < frames:
        return clean_key and block <= at
    return block < at if clean_key else block == at


def mask(frames, sees, *args):
    return [[sees(q, k, *args) for k in range(frames)] for q in range(frames)]


@pytest.mark.parametrize(
    "spans, frames, expected",
    [
        (bidirectional(5), 5, mask(5, lambda q, k: True)),
        (block_causal((3, 3, 3)), 9, mask(9, sees_causal, (3, 3, 3))),
        (block_causal((1, 3, 3)), 7, mask(7, sees_causal, (1, 3, 3))),
        (block_causal((3, 3, 3), 5), 9, mask(9, sees_causal, (3, 3, 3), 5)),
        (block_causal((2, 1, 4), 4), 7, mask(7, sees_causal, (2, 1, 4), 4)),
        (teacher_forcing((3, 3)), 12, mask(12, sees_teacher_forcing, (3, 3))),
        (teacher_forcing((1, 2, 2)), 10, mask(10, sees_teacher_forcing, (1, 2, 2))),
    ],
    ids=["all", "causal", "first alone", "window", "odd window", "teacher", "odd"],
)
def test_spans_equal_a_dense_mask(spans, frames, expected):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, frames, 3, 16)), jnp.float32)
        for _ in range(3)
    )

    ours = jax.jit(functools.partial(spans.attend, ATTENTION))(q, k, v)

    np.testing.assert_allclose(ours, dense(expected, q, k, v), rtol=0, atol=2e-6)


def test_prefix_equals_a_dense_mask():
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, f, 3, 16)), jnp.float32) for f in (3, 7, 7)
    )
    seen = jax.jit(lambda frames: Prefix(frames).attend(ATTENTION, q, k, v))

    for frames in range(1, 8):
        expected = dense(mask(7, lambda q, k, n: k < n, frames)[:3], q, k, v)
        np.testing.assert_allclose(seen(jnp.int32(frames)), expected, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_later_blocks_reach_no_earlier_one():
    x, context = latents(6), project(tiny.embedding(0))
    causal = block_causal((2, 2, 2))
    base = apply(tiny.variables(), x, context, causal)[0]

    for block in range(3):
        other = x.at[:, 2 * block + 1].add(1.0)
        flow = apply(tiny.variables(), other, context, causal)[0]
        reached = np.abs(flow - base).max(axis=(0, 2, 3, 4))
        assert np.all(reached[: 2 * block] == 0)
        assert np.all(reached[2 * block :] > 1e-4)


@pytest.mark.slow
def test_past_keys_count_as_given_and_own_keys_are_returned_unrotated():
    x, context = latents(3), project(tiny.embedding(0))
    variables = tiny.variables()
    _, own = apply(variables, x, context, bidirectional(3))
    later = 7 + np.arange(3)

    flow, other = apply(variables, x, context, bidirectional(3), position=later)

    np.testing.assert_allclose(own.k[0], other.k[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        flow, apply(variables, x, context, bidirectional(3))[0], rtol=0, atol=2e-5
    )
    past = LayersKV(k=own.k[:, :, :1], v=own.v[:, :, :1])
    past = lay_out(WanDit(tiny.MODEL).attention, tiny.MODEL.head_dim, past, 3)
    unseen = apply(variables, x, context, Prefix(jnp.int32(3)), past=past)[0]
    seen = apply(variables, x, context, Prefix(jnp.int32(4)), past=past)[0]
    np.testing.assert_allclose(unseen, flow, rtol=0, atol=2e-5)
    assert np.abs(seen - unseen).max() > 1e-3


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dim": 50, "num_heads": 4}, "must be a multiple of num_heads=4"),
        ({"dim": 6, "num_heads": 2}, "must be even"),
        ({"patch": (2, 2, 2)}, "must not span latent frames"),
    ],
)
def test_impossible_sizes_are_refused_with_a_reason(changes, reason):
    with pytest.raises(ValueError, match=reason):
        ModelConfig(**changes)


def test_latent_size_must_divide_by_the_patch():
    assert LatentGrid().tokens((1, 2, 2)) == (30, 52)
    with pytest.raises(ValueError, match="multiples of 16 and 16"):
        LatentGrid(5, 4).tokens((1, 2, 2))
