"""Regression: the flow of data, and guidance from a frozen network."""

import dataclasses
import functools

import bundles
import chex
import jax
import jax.numpy as jnp
import numpy as np
import ported
import pytest
import tiny

from anchor_jax import flow, sharding
from anchor_jax.training.stages.regression_step import RegressionSpec

BLOCKS = (3, 3)
LAYOUTS = {
    "none": {},
    "noise": {"blocks": BLOCKS, "forcing": "noise"},
    "teacher": {"blocks": BLOCKS, "forcing": "teacher"},
}


@pytest.fixture(params=LAYOUTS)
def plain(request):
    """A regression without a teacher."""
    return RegressionSpec(model=tiny.MODEL, **LAYOUTS[request.param])


def guided(plain, guidance, **changes):
    return dataclasses.replace(plain, teacher=plain.model, guidance=guidance, **changes)


def batch():
    rng = np.random.default_rng(5)
    prompts = [np.asarray(tiny.embedding(seed, batch=2)) for seed in (1, 2, 3)]
    return {
        "latents": rng.standard_normal((2, 6, 4, 4, 4)).astype(np.float32),
        "embedding": np.stack(prompts[:2], axis=1),
        "negative": prompts[2],
    }


def blocks_prompts(plain, given):
    """With a prompt for each block; a clip has one."""
    if not plain.blocks:
        return {**given, "embedding": given["embedding"][:, :1]}
    return {**given, "which": np.asarray([[0, 1], [1, 0]])}


# Compiled as a whole: one operation after another takes three times as long.
@functools.partial(jax.jit, static_argnums=0)
def compiled_loss(stage, student, teacher, given):
    return stage.loss(student, given, jax.random.key(7), teacher)


def loss(*arguments):
    return float(compiled_loss(*arguments))


@functools.partial(jax.jit, static_argnums=0)
def predict(stage, *arguments):
    return stage.predict(*arguments)


@functools.partial(jax.jit, static_argnums=0)
def predict_guided(stage, *arguments):
    return stage.guided(*arguments)


@pytest.mark.slow
def test_without_a_teacher_the_target_is_the_flow_of_the_data(plain):
    given, key = blocks_prompts(plain, batch()), jax.random.key(7)
    levels, second = jax.random.split(key)
    latents = given["latents"]
    sigma = plain._levels(levels, latents)
    noise = jax.random.normal(second, latents.shape)

    found = loss(plain, tiny.variables(), None, given)

    share = np.asarray(sigma)[:, :, None, None, None]
    noisy = (1 - share) * latents + share * noise
    predicted = predict(plain, tiny.variables(), given, noisy, sigma)
    error = np.square(predicted - (noise - latents)).mean()
    np.testing.assert_allclose(found, error, rtol=1e-5)


@pytest.mark.slow
def test_guidance_goes_from_no_prompt_through_the_prompt(plain):
    given = blocks_prompts(plain, batch())
    teacher = tiny.variables()
    noise = np.asarray(jax.random.normal(jax.random.key(3), given["latents"].shape))
    sigma = np.full((2, 6), 0.6, np.float32)
    noisy = flow.add_noise(given["latents"], noise, sigma)
    negative = {**given, "embedding": np.repeat(given["negative"][:, None], 2, axis=1)}
    if not plain.blocks:
        negative["embedding"] = negative["embedding"][:, :1]

    found = predict_guided(guided(plain, 2.5), teacher, given, noisy, sigma)

    with_prompt = predict(plain, teacher, given, noisy, sigma)
    without = predict(plain, teacher, negative, noisy, sigma)
    assert np.abs(with_prompt - without).max() > 1e-3
    np.testing.assert_allclose(found, 2.5 * with_prompt - 1.5 * without, atol=1e-5)


@pytest.mark.slow
def test_a_network_is_its_own_teacher_without_guidance(plain):
    given = blocks_prompts(plain, batch())
    same = tiny.variables()

    assert loss(guided(plain, 1.0), same, same, given) < 1e-12
    once, twice = (loss(guided(plain, g), same, same, given) for g in (2.0, 3.0))
    assert once > 1e-6
    np.testing.assert_allclose(twice, 4 * once, rtol=1e-4)


@pytest.mark.slow
def test_the_teacher_is_held_to_its_own_sizes(plain):
    given = blocks_prompts(plain, batch())
    wide = dataclasses.replace(tiny.MODEL, ffn_dim=2 * tiny.MODEL.ffn_dim)
    stage = dataclasses.replace(guided(plain, 2.0), teacher=wide)
    teacher = {"params": tiny.params(wide)}

    assert np.isfinite(loss(stage, tiny.variables(), teacher, given))


@pytest.mark.slow
def test_no_gradient_reaches_the_teacher(plain):
    given = blocks_prompts(plain, batch())
    stage, variables = guided(plain, 2.0), tiny.variables()

    gradient = jax.jit(jax.grad(compiled_loss, argnums=(1, 2)), static_argnums=0)
    ours, theirs = gradient(stage, variables, variables, given)

    assert any(np.any(x) for x in jax.tree.leaves(ours))
    assert not any(np.any(x) for x in jax.tree.leaves(theirs))


@pytest.mark.slow
def test_devices_train_the_text_encoder_like_one():
    spec = RegressionSpec(model=tiny.MODEL, text=bundles.TEXT)
    rng = np.random.default_rng(3)
    params = {"text": ported.draw_items()["text_encoder"]}
    ids = rng.integers(0, bundles.TEXT.vocab, (4, 1, bundles.TEXT.text_len))
    given = {"ids": ids, "mask": np.ones(ids.shape, bool)}
    weights = rng.standard_normal((*ids.shape, bundles.TEXT.dim)).astype(np.float32)

    def gradient():
        def loss(params):
            return jnp.sum(spec._embedding(params, given) * weights)

        return jax.jit(jax.grad(loss))

    expected = gradient()(params)
    mesh = sharding.make_mesh((1, 2, 1, 2))
    places = sharding.shardings(params["text"], sharding.TRAINED_TEXT, mesh)
    with jax.set_mesh(mesh):
        found = gradient()({"text": jax.device_put(params["text"], places)})

    kernel = found["text"]["blocks"]["attn"]["q"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
