"""Losses: one function of arrays and a `Score` for each equation.

Noise and timesteps are arguments; the caller draws them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from anchor_jax import flow
from anchor_jax.wan.attention import ContextKV, bidirectional
from anchor_jax.wan.dit import WanDit
from anchor_jax.wan.spec import ModelConfig


@dataclasses.dataclass(frozen=True)
class Tables:
    """The rule for noise levels: exactly sigma = t / 1000.

    Source: training/README.md, "D12"; rules `paper`.
    """

    def noising(self, timestep: jax.Array) -> jax.Array:
        """Returns the noise level that latents are noised to."""
        return timestep / flow.TRAIN_STEPS

    def scoring(self, timestep: jax.Array) -> jax.Array:
        """Returns the noise level at which a score's flow is read as x0."""
        return timestep / flow.TRAIN_STEPS


@dataclasses.dataclass(frozen=True)
class ReleaseTables(Tables):
    """Noise levels from 1000-entry tables; the scores' table has another shift.

    Source: training/README.md, "D12"; rules `release`.
    """

    shift: float = 5.0
    score_shift: float = 8.0

    def noising(self, timestep: jax.Array) -> jax.Array:
        return flow.lookup_sigma(timestep, self.shift)

    def scoring(self, timestep: jax.Array) -> jax.Array:
        return flow.lookup_sigma(timestep, self.score_shift)


@dataclasses.dataclass(frozen=True)
class Score:
    """A bidirectional network that estimates the clean clips of noisy ones; static."""

    model: ModelConfig
    tables: Tables = Tables()
    kernel: Any = None

    def project(self, variables, embedding: jax.Array) -> ContextKV:
        """Returns the keys and values of prompts [batch, text, text_dim]."""
        network = WanDit(self.model, self.kernel)
        return network.apply(variables, embedding, method="project")

    def x0(self, variables, noisy, timestep, context: ContextKV) -> jax.Array:
        """Returns clean clips [batch, frame, height, width, channel].

        Args:
          variables: the network's collections.
          noisy: clips at one level each.
          timestep: [batch], 1000 sigma.
          context: prompts from `project`.
        """
        frames = noisy.shape[1]
        predicted, _ = WanDit(self.model, self.kernel).apply(
            variables,
            noisy,
            jnp.broadcast_to(timestep[:, None], noisy.shape[:2]),
            context,
            bidirectional(frames),
            jnp.arange(frames),
        )
        return flow.x0_from_flow(predicted, noisy, self.tables.scoring(timestep))


@struct.dataclass
class Distillation:
    """The generator's loss on clips, with the intermediate results.

    `gradient` is the gradient of the loss with respect to the latents. `gap` is the
    mean magnitude of the difference of the two scores before it is normalised.
    """

    loss: jax.Array
    gradient: jax.Array
    gap: jax.Array
    noisy: jax.Array
    fake: jax.Array
    real_with: jax.Array
    real_without: jax.Array
    real: jax.Array
    difference: jax.Array
    normalizer: jax.Array
    direction: jax.Array


def distribution_matching(
    latents: jax.Array,
    noise: jax.Array,
    timestep: jax.Array,
    mask: jax.Array,
    *,
    fake: tuple[Score, Any, jax.Array],
    real: tuple[Score, Any, jax.Array, jax.Array],
    guidance: float = 3.0,
) -> Distillation:
    """Returns the distribution-matching loss and its gradient at the latents.

    The gradient of a clip is (fake - real) / mean |x - real| on the frames of the
    mask, over the number of their elements; the loss is half its mean square before
    that, so that its gradient is this one.

    Args:
      latents: generated clips [batch, frame, height, width, channel].
      noise: like `latents`.
      timestep: [batch], from `flow.dmd_timestep`.
      mask: [frame] whether a frame has a loss.
      fake: (critic, its variables, embeddings of the prompts).
      real: (teacher, its variables, embeddings of prompts, of negative prompts).
      guidance: real = with + guidance (with - without).

    Source: DMD (arXiv:2311.18828) equation 7; training/README.md, "Distribution
    matching", "D23".
    """
    latents, noise = jax.lax.stop_gradient((latents, noise))
    sigma = fake[0].tables.noising(timestep)
    noisy = flow.add_noise(latents, noise, sigma)
    fake_x0 = _x0(fake[0], fake[1], noisy, timestep, fake[2])
    twice = jnp.concatenate([noisy, noisy])
    both = jnp.concatenate([timestep, timestep])
    embeddings = jnp.concatenate([real[2], real[3]])
    real_with, real_without = jnp.split(
        _x0(real[0], real[1], twice, both, embeddings), 2
    )
    real_x0 = real_with + guidance * (real_with - real_without)
    difference = fake_x0 - real_x0
    normalizer = jnp.mean(jnp.abs(latents - real_x0), axis=(1, 2, 3, 4))
    direction = jnp.nan_to_num(difference / flow.spread(normalizer, difference))
    weight = _frame_weights(mask, latents)
    return Distillation(
        loss=0.5 * jnp.sum(weight * jnp.square(direction)),
        gradient=weight * direction,
        gap=jnp.mean(jnp.abs(difference)),
        noisy=noisy,
        fake=fake_x0,
        real_with=real_with,
        real_without=real_without,
        real=real_x0,
        difference=difference,
        normalizer=normalizer,
        direction=direction,
    )


def score_flow(
    variables,
    score: Score,
    latents: jax.Array,
    noise: jax.Array,
    timestep: jax.Array,
    embedding: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Returns the critic's loss on generated clips: its flow compared with noise - x.

    Args:
      variables: the critic's collections, differentiable.
      score: network of the critic.
      latents: generated clips, as constants.
      noise: like `latents`.
      timestep: [batch], from `flow.dmd_timestep`.
      embedding: embeddings of the prompts.
      mask: [frame] whether a frame has a loss.

    Source: DMD2 (arXiv:2405.14867) section 3; training/README.md, "Critic".
    """
    latents = jax.lax.stop_gradient(latents)
    sigma = score.tables.noising(timestep)
    noisy = flow.add_noise(latents, noise, sigma)
    x0 = _x0(score, variables, noisy, timestep, embedding)
    predicted = flow.flow_from_x0(x0, noisy, sigma)
    return jnp.sum(
        _frame_weights(mask, latents) * jnp.square(predicted - (noise - latents))
    )


def clean_regression(
    x0: jax.Array, target: jax.Array, timestep: jax.Array, weight=None
) -> jax.Array:
    """Returns the mean squared distance to clean latents over the noisy frames.

    Args:
      x0: predictions [batch, frame, height, width, channel].
      target: clean latents of the shape of `x0`.
      timestep: [batch, frame]. Frames at 0 are left out.
      weight: [batch, frame], weights of the other frames. None weights all equally.

    Source: CausVid (arXiv:2412.07772) equation 6; training/README.md, "Endpoint
    regression".
    """
    error = jnp.mean(jnp.square(x0 - target), axis=(2, 3, 4))
    counted = timestep != 0
    return weighted_mean(error, counted if weight is None else counted * weight)


def flow_matching(predicted, target, weight=None) -> jax.Array:
    """Returns the mean squared distance of a flow to its target.

    Args:
      predicted: [batch, frame, height, width, channel].
      target: flow of the same shape: noise - x of data, or a teacher's flow.
      weight: [batch, frame], weights of the frames. None weights all equally.

    Source: flow matching (arXiv:2210.02747); training/README.md, "Flow matching".
    """
    error = jnp.mean(jnp.square(predicted - target), axis=(2, 3, 4))
    return jnp.mean(error) if weight is None else weighted_mean(error, weight)


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns the weighted mean, or 0 if all weights are 0."""
    weight = jnp.asarray(weight, jnp.float32)
    return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight), 1e-9)


def _x0(score: Score, variables, noisy, timestep, embedding) -> jax.Array:
    context = score.project(variables, embedding)
    x0 = score.x0(variables, noisy, timestep, context)
    return x0.astype(jnp.float32)


def _frame_weights(mask: jax.Array, like: jax.Array) -> jax.Array:
    """Returns 1 / (number of elements in the mask) on frames of the mask, else 0."""
    mask = jnp.asarray(mask, jnp.float32)
    count = jnp.sum(mask) * like[:, 0].size
    return (mask / count)[None, :, None, None, None]
