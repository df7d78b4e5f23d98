"""Every attention kernel against the plain one."""

import functools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from anchor_jax import parallel, sharding
from anchor_jax.cache.memory import lay_out
from anchor_jax.errors import UserError
from anchor_jax.wan.attention import LayersKV, Prefix
from anchor_jax.wan.kernels import (
    KERNELS,
    Cudnn,
    Heads,
    Plain,
    Splash,
    attend,
    choose,
    named,
)

HEADS = Heads(least=0)
SPLASH = Splash(interpret=True, most_queries=256, most_keys=256)
# Kernels with the settings under which a CPU shows what they do.
HERE = {"heads": HEADS, "splash": SPLASH}
ELSEWHERE = {"cudnn": "needs a GPU"}
CHECKED = [
    pytest.param(HERE.get(name, kernel), id=name)
    for name, kernel in KERNELS.items()
    if name not in {"plain", *ELSEWHERE}
]


def head_of(kernel):
    """Returns the smallest of two sizes of a head that a kernel serves."""
    return 128 if kernel.refuses("float32", 8) else 8


def arrays(frames, past, tokens=4, heads=2, dim=8, layers=None, seed=0):
    rng = np.random.default_rng(seed)

    def draw(count):
        shape = (2, count, tokens, heads * dim)
        shape = shape if layers is None else (layers, *shape)
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return [draw(frames) for _ in range(3)], LayersKV(draw(past), draw(past))


def attended(kernel, qkv, past, frames, dim=8):
    layers = jax.tree.map(lambda x: x[None], past)
    laid_out = lay_out(kernel, dim, layers, qkv[0].shape[1])
    attention = functools.partial(attend, kernel, dim)
    remembered = jax.tree.map(lambda x: x[0], laid_out)
    return Prefix(frames).attend(attention, *qkv, remembered)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", CHECKED)
@pytest.mark.parametrize("frames, past", [(3, 12), (9, 6), (2, 5), (3, 0)])
def test_a_kernel_sees_what_plain_sees_at_every_length(kernel, frames, past):
    dim = head_of(kernel)
    qkv, remembered = arrays(frames, past, dim=dim)
    ours = jax.jit(lambda n: attended(kernel, qkv, remembered, n, dim))
    plain = jax.jit(lambda n: attended(Plain(), qkv, remembered, n, dim))

    for seen in range(frames, frames + past + 1):
        seen = jnp.int32(seen)
        close = 2e-6 * (dim / 8) ** 0.5
        np.testing.assert_allclose(ours(seen), plain(seen), rtol=0, atol=close)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", CHECKED)
def test_a_kernel_has_the_gradient_of_plain(kernel):
    dim = head_of(kernel)
    qkv, remembered = arrays(3, 6, dim=dim)

    def loss(kernel, qkv, past):
        return jnp.sum(jnp.square(attended(kernel, qkv, past, jnp.int32(6), dim)))

    ours = jax.jit(jax.grad(lambda *x: loss(kernel, *x), (0, 1)))(qkv, remembered)
    plain = jax.jit(jax.grad(lambda *x: loss(Plain(), *x), (0, 1)))(qkv, remembered)

    chex.assert_trees_all_close(ours, plain, rtol=0, atol=2e-5 * (dim / 8) ** 0.5)
    assert np.abs(jax.tree.leaves(ours)[0]).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kernel", CHECKED)
def test_without_a_past_all_keys_are_seen(kernel):
    (q, _, _), _ = arrays(3, 0, dim=128)
    (_, k, v), _ = arrays(5, 0, dim=128, seed=1)
    q, k, v = (x.reshape(2, -1, 2 * 128) for x in (q, k, v))

    ours = jax.jit(functools.partial(kernel.attend, 128))(q, k, v)

    np.testing.assert_allclose(ours, Plain().attend(128, q, k, v), rtol=0, atol=5e-6)


@pytest.mark.slow
def test_splash_pads_and_hides_what_is_not_visible():
    qkv, remembered = arrays(3, 6, tokens=50, dim=128)
    ours = jax.jit(lambda n: attended(SPLASH, qkv, remembered, n, 128))

    for seen in (3, 6, 9):
        expected = attended(Plain(), qkv, remembered, jnp.int32(seen), 128)
        np.testing.assert_allclose(ours(jnp.int32(seen)), expected, rtol=0, atol=5e-6)


@pytest.mark.slow
def test_splash_has_the_gradient_of_plain():
    qkv, remembered = arrays(2, 2, tokens=40, dim=128)

    def loss(kernel, qkv):
        return jnp.sum(jnp.square(attended(kernel, qkv, remembered, jnp.int32(4), 128)))

    ours = jax.jit(jax.grad(lambda x: loss(SPLASH, x)))(qkv)
    plain = jax.jit(jax.grad(lambda x: loss(Plain(), x)))(qkv)

    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", CHECKED)
def test_a_kernel_under_vmap_equals_one_by_one(kernel):
    dim = head_of(kernel)
    qkv, remembered = arrays(3, 6, dim=dim)
    seen = jnp.asarray([3, 6, 9])

    together = jax.vmap(lambda n: attended(kernel, qkv, remembered, n, dim))(seen)

    for one, n in zip(together, seen, strict=True):
        apart = attended(kernel, qkv, remembered, n, dim)
        np.testing.assert_allclose(one, apart, rtol=0, atol=2e-6 * (dim / 8) ** 0.5)


@pytest.mark.parametrize(
    "platform, dtype, dim, expected",
    [
        ("cpu", "float32", 32, Heads),
        ("tpu", "bfloat16", 128, Splash),
        ("tpu", "bfloat16", 32, Plain),
        ("gpu", "bfloat16", 128, Cudnn),
        ("gpu", "float32", 128, Plain),
        ("gpu", "bfloat16", 20, Plain),
        ("another", "bfloat16", 128, Plain),
    ],
)
def test_each_machine_gets_the_fastest_kernel_that_can_serve(
    platform, dtype, dim, expected
):
    assert type(choose(platform, dtype, dim)) is expected


def test_configs_do_not_list_kernels():
    configs = pathlib.Path(__file__).parents[2] / "configs"
    text = "".join(path.read_text() for path in configs.glob("*.py"))

    assert "attention" in text
    for line in text.splitlines():
        if "attention" in line:
            assert len(KERNELS.keys() & set(re.findall(r"\w+", line))) <= 1, line


def test_kernels_that_are_not_checked_here_exist():
    assert {*HERE, *ELSEWHERE} <= KERNELS.keys()


def test_a_named_kernel_is_taken_or_refused_with_a_reason():
    assert named("auto", "float32", 32) is None
    assert named("plain", "float32", 32) is KERNELS["plain"]
    with pytest.raises(UserError, match="'cudnn': it computes in bfloat16"):
        named("cudnn", "float32", 128)
    with pytest.raises(UserError, match="'splash': a head of 32"):
        named("splash", "bfloat16", 32)
    with pytest.raises(UserError, match="did you mean 'heads'"):
        named("head", "float32", 32)


@pytest.mark.slow
def test_heads_is_finite_where_hidden_keys_score_far_above_the_visible():
    (q, k, v), past = arrays(3, 12)
    q, k = jnp.ones_like(q), jnp.full_like(k, -50.0)
    low = jnp.zeros_like(past.k).at[:, :2].set(-50.0)

    def total(v, kernel):
        seen = jnp.int32(3 + 2)
        return jnp.sum(attended(kernel, (q, k, v), LayersKV(low, past.v), seen))

    ours, theirs = (jax.value_and_grad(total)(v, one) for one in (HEADS, Plain()))

    assert np.isfinite(ours[0])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", CHECKED)
def test_devices_attend_to_their_own_videos_and_heads(kernel):
    dim = head_of(kernel)
    qkv, remembered = arrays(3, 6, tokens=43, dim=dim)

    def loss(qkv, on_mesh=False):
        def attend(qkv, past):
            return attended(kernel, qkv, past, jnp.int32(6), dim)

        if on_mesh:
            split = P(sharding.VIDEOS, None, None, "tensor")
            attend = parallel.each_device(attend, (split, split), split)
        out = attend(qkv, remembered)
        return jnp.sum(jnp.square(out)), out

    step = jax.value_and_grad(loss, has_aux=True)
    (_, alone), expected = jax.jit(step)(qkv)
    with jax.set_mesh(sharding.make_mesh((1, 2, 1, 2))):
        (_, together), gradient = jax.jit(step, static_argnums=1)(qkv, True)

    spec = together.sharding.shard_shape(together.shape)
    assert spec[0] == 1 and spec[-1] == dim, "a video and a head a device"
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)
    for ours, theirs in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
