"""Losses by identity; recorded numbers are in tests/verify."""

import dataclasses
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from anchor_jax import flow
from anchor_jax.training import losses
from anchor_jax.training.losses import ReleaseTables, Score, Tables

SCORE = Score(tiny.MODEL)
TIMES = jnp.array([700.0, 100.0])


def draw(seed):
    shape = (2, 6, 4, 4, 4)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def other_weights():
    return {"params": tiny.params(seed=1)}


def prompts(number):
    return tiny.embedding(number, batch=2)


def match(latents, mask=None, real=None, guidance=3.0, fake=None):
    mask = np.ones(6, bool) if mask is None else mask
    fake, real = fake or tiny.variables(), real or other_weights()
    return _match(latents, mask, fake, real, guidance)


@jax.jit
def _match(latents, mask, fake, real, guidance):
    return losses.distribution_matching(
        latents,
        draw(1),
        TIMES,
        mask,
        fake=(SCORE, fake, prompts(0)),
        real=(SCORE, real, prompts(0), prompts(1)),
        guidance=guidance,
    )


@pytest.mark.slow
def test_equal_scores_have_no_gradient():
    found = match(draw(0), real=tiny.variables(), guidance=0.0)

    assert found.loss < 1e-10 and np.abs(found.gradient).max() < 1e-7


@pytest.mark.slow
def test_the_gradient_is_that_of_the_loss():
    """Half the mean square of x - stop(x - direction)."""
    latents, mask = draw(0), np.arange(6) >= 3
    found = match(latents, mask)

    def loss(x):
        target = latents - found.direction
        return 0.5 * jnp.mean(jnp.square(x - target)[:, 3:])

    value, gradient = jax.value_and_grad(loss)(latents)
    np.testing.assert_allclose(found.loss, value, rtol=1e-6)
    np.testing.assert_allclose(found.gradient, gradient, atol=1e-9)


def test_the_generator_moves_from_the_critic_to_the_teacher():
    found = match(draw(0))

    distance = np.abs(draw(0) - found.real).mean(axis=(1, 2, 3, 4), keepdims=True)
    expected = (found.fake - found.real) / distance / draw(0).size
    np.testing.assert_allclose(found.gradient, expected, atol=1e-8)
    assert np.abs(expected).max() > 1e-4


def test_no_gradient_flows_through_the_scores():
    assert not np.any(jax.grad(lambda x: match(x).loss)(draw(0)))


def test_masked_frames_have_exactly_no_gradient():
    found = match(draw(0), np.arange(6) >= 3)

    assert not np.any(found.gradient[:, :3]) and np.any(found.gradient[:, 3:])


def test_guidance_goes_beyond_the_prompt():
    found = match(draw(0))

    beyond = found.real_with + 3 * (found.real_with - found.real_without)
    np.testing.assert_allclose(found.real, beyond, atol=1e-5)
    mean = np.abs(draw(0) - found.real).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(found.normalizer, mean, rtol=1e-6)


@pytest.mark.slow
def test_a_normalizer_of_zero_gives_no_gradient():
    noisy = flow.add_noise(draw(0), draw(1), TIMES / 1000)
    context = SCORE.project(tiny.variables(), prompts(0))
    real = SCORE.x0(tiny.variables(), noisy, TIMES, context)
    zero = dataclasses.replace(SCORE)

    found = losses.distribution_matching(
        real * 0 + draw(0),
        draw(1),
        TIMES,
        np.ones(6, bool),
        fake=(zero, tiny.variables(), prompts(0)),
        real=(zero, tiny.variables(), prompts(0), prompts(0)),
        guidance=0.0,
    )

    chex.assert_tree_all_finite(found)


@pytest.mark.slow
def test_the_critics_loss_is_flow_matching_of_what_was_generated():
    latents, noise = draw(0), draw(1)
    noisy = flow.add_noise(latents, noise, TIMES / 1000)
    context = SCORE.project(tiny.variables(), prompts(0))
    x0 = SCORE.x0(tiny.variables(), noisy, TIMES, context)
    predicted = flow.flow_from_x0(x0, noisy, TIMES / 1000)

    found = losses.score_flow(
        tiny.variables(), SCORE, latents, noise, TIMES, prompts(0), np.ones(6, bool)
    )

    expected = losses.flow_matching(predicted, noise - latents)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_critics_loss_leaves_masked_frames_out():
    latents, mask = draw(0), np.arange(6) >= 3

    def loss(latents):
        given = (draw(1), TIMES, prompts(0), mask)
        return losses.score_flow(tiny.variables(), SCORE, latents, *given)

    # What is generated is data: no gradient goes into it.
    assert not np.any(jax.grad(loss)(latents))


def test_only_the_release_reads_scores_by_another_table():
    timestep = jnp.array([20.0, 500.0, 980.0])

    np.testing.assert_allclose(Tables().noising(timestep), timestep / 1000)
    np.testing.assert_allclose(Tables().scoring(timestep), timestep / 1000)
    release = ReleaseTables()
    ratio = release.scoring(timestep) / release.noising(timestep)
    assert abs(ratio[0] - 1.19) < 0.03 and abs(ratio[1:] - 1).max() < 0.02


def test_clean_frames_are_left_out_of_the_regression():
    x0, target = draw(0), draw(1)
    timestep = jnp.where(jnp.arange(6) < 2, 0.0, 500.0)[None].repeat(2, axis=0)

    found = losses.clean_regression(x0, target, timestep)

    np.testing.assert_allclose(found, jnp.mean((x0 - target)[:, 2:] ** 2), rtol=1e-6)


def test_a_mean_of_nothing_is_zero():
    assert losses.weighted_mean(jnp.ones(3), jnp.zeros(3)) == 0


def test_losses_are_those_that_agreed_with_the_official_recordings():
    """Numbers of the day on which `anchor-jax verify` passed the recorded cases."""
    found = match(draw(0), np.arange(6) >= 3)
    given = (draw(0), draw(1), TIMES, prompts(0), np.ones(6, bool))

    np.testing.assert_allclose(found.loss, 0.82142389, rtol=1e-5)
    np.testing.assert_allclose(found.gap, 0.59918219, rtol=1e-5)
    np.testing.assert_allclose(np.abs(found.gradient).sum(), 0.99139857, rtol=1e-5)
    critic = losses.score_flow(tiny.variables(), SCORE, *given)
    np.testing.assert_allclose(critic, 4.3950921, rtol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: raw(losses.flow_matching)(x, y),
        lambda x, y: raw(losses.clean_regression)(x, y, jnp.ones((2, 6))),
        lambda x, y: raw(losses.score_flow)(
            tiny.variables(), SCORE, x, y, TIMES, prompts(0), np.ones(6, bool)
        ),
        lambda x, y: raw(losses.distribution_matching)(
            x, y, TIMES, np.ones(6, bool), fake=(SCORE,), real=(SCORE,)
        ),
        lambda x, y: raw(losses.weighted_mean)(x, y),
    ],
    ids=["flow", "regression", "critic", "distillation", "mean"],
)
def test_no_loss_stretches_an_array_to_the_shape_of_another(call):
    with pytest.raises(AssertionError, match="assert_equal_shape"):
        call(draw(0), draw(1)[:, :1])


def raw(loss):
    """A loss as programs call it: without the checks of `array_checks`."""
    return inspect.unwrap(loss)
