"""Losses: one function of arrays and a `Score` for each equation.

Noise and timesteps are arguments; the caller draws them.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Num

from anchor_jax import flow, sharding
from anchor_jax.axes import Array, Embedding, Latents, Variables
from anchor_jax.wan.attention import ContextKV, bidirectional
from anchor_jax.wan.dit import WanDit
from anchor_jax.wan.spec import ModelConfig

Scalar = Float[Array, ""]
Times = Float[Array, "*axes"]
FrameWeights = Num[Array, "batch frame"] | Bool[Array, "batch frame"]
FrameMask = Num[Array, " frame"] | Bool[Array, " frame"]


@dataclasses.dataclass(frozen=True)
class Tables:
    """The rule for noise levels: exactly sigma = t / 1000.

    Source: training/README.md, "D12"; rules `paper`.
    """

    def noising(self, timestep: Times) -> Times:
        """Returns the noise level that latents are noised to."""
        return timestep / flow.TRAIN_STEPS

    def scoring(self, timestep: Times) -> Times:
        """Returns the noise level at which a score's flow is read as x0."""
        return timestep / flow.TRAIN_STEPS


@dataclasses.dataclass(frozen=True)
class ReleaseTables(Tables):
    """Noise levels from 1000-entry tables; the scores' table has another shift.

    Source: training/README.md, "D12"; rules `release`.
    """

    shift: float = 5.0
    score_shift: float = 8.0

    def noising(self, timestep: Times) -> Times:
        return flow.lookup_sigma(timestep, self.shift)

    def scoring(self, timestep: Times) -> Times:
        return flow.lookup_sigma(timestep, self.score_shift)


@dataclasses.dataclass(frozen=True)
class Score:
    """A bidirectional network that estimates the clean clips of noisy ones; static."""

    model: ModelConfig
    tables: Tables = Tables()
    kernel: Any = None

    def project(self, variables: Variables, embedding: Embedding) -> ContextKV:
        """Returns the keys and values of prompts."""
        network = WanDit(self.model, self.kernel)
        return network.apply(variables, embedding, method="project")

    def x0(
        self,
        variables: Variables,
        noisy: Latents,
        timestep: Float[Array, " batch"],
        context: ContextKV,
    ) -> Latents:
        """Returns clean clips.

        Args:
          variables: the network's collections.
          noisy: clips at one level each.
          timestep: 1000 sigma.
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

    loss: Scalar
    gradient: Latents
    gap: Scalar
    noisy: Latents
    fake: Latents
    real_with: Latents
    real_without: Latents
    real: Latents
    difference: Latents
    normalizer: Float[Array, " batch"]
    direction: Latents


def distribution_matching(
    latents: Latents,
    noise: Latents,
    timestep: Float[Array, " batch"],
    mask: FrameMask,
    *,
    fake: tuple[Score, Variables, Embedding],
    real: tuple[Score, Variables, Embedding, Embedding],
    guidance: float = 3.0,
) -> Distillation:
    """Returns the distribution-matching loss and its gradient at the latents.

    The gradient of a clip is (fake - real) / mean |x - real| on the frames of the
    mask, over the number of their elements; the loss is half its mean square before
    that, so that its gradient is this one.

    Args:
      latents: generated clips.
      noise: noise of the clips.
      timestep: from `flow.dmd_timestep`.
      mask: whether a frame has a loss.
      fake: (critic, its variables, embeddings of the prompts).
      real: (teacher, its variables, embeddings of prompts, of negative prompts).
      guidance: real = with + guidance (with - without).

    Source: DMD (arXiv:2311.18828) equation 7; training/README.md, "Distribution
    matching", "D23".
    """
    chex.assert_equal_shape([latents, noise])
    latents, noise = jax.lax.stop_gradient((latents, noise))
    sigma = fake[0].tables.noising(timestep)
    noisy = flow.add_noise(latents, noise, sigma)
    fake_x0 = _x0(fake[0], fake[1], noisy, timestep, fake[2])
    real_with, real_without = _both(real[0], real[1], noisy, timestep, real[2:])
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
    variables: Variables,
    score: Score,
    latents: Latents,
    noise: Latents,
    timestep: Float[Array, " batch"],
    embedding: Embedding,
    mask: FrameMask,
) -> Scalar:
    """Returns the critic's loss on generated clips: its flow compared with noise - x.

    Args:
      variables: the critic's collections, differentiable.
      score: network of the critic.
      latents: generated clips, as constants.
      noise: noise of the clips.
      timestep: from `flow.dmd_timestep`.
      embedding: embeddings of the prompts.
      mask: whether a frame has a loss.

    Source: DMD2 (arXiv:2405.14867) section 3; training/README.md, "Critic".
    """
    chex.assert_equal_shape([latents, noise])
    latents = jax.lax.stop_gradient(latents)
    sigma = score.tables.noising(timestep)
    noisy = flow.add_noise(latents, noise, sigma)
    x0 = _x0(score, variables, noisy, timestep, embedding)
    predicted = flow.flow_from_x0(x0, noisy, sigma)
    return jnp.sum(
        _frame_weights(mask, latents) * jnp.square(predicted - (noise - latents))
    )


def clean_regression(
    x0: Latents,
    target: Latents,
    timestep: Num[Array, "batch frame"],
    weight: FrameWeights | None = None,
    total: Scalar | None = None,
) -> Scalar:
    """Returns the mean squared distance to clean latents over the noisy frames.

    Args:
      x0: predictions.
      target: clean latents.
      timestep: frames at 0 are left out.
      weight: weights of the other frames. None weights all equally.
      total: as for `weighted_mean`, with weight 0 of frames at 0.

    Source: CausVid (arXiv:2412.07772) equation 6; training/README.md, "Endpoint
    regression".
    """
    chex.assert_equal_shape([x0, target])
    error = jnp.mean(jnp.square(x0 - target), axis=(2, 3, 4))
    counted = timestep != 0
    weight = counted if weight is None else counted * weight
    return weighted_mean(error, weight, total)


def flow_matching(
    predicted: Latents,
    target: Latents,
    weight: FrameWeights | None = None,
    total: Scalar | None = None,
) -> Scalar:
    """Returns the mean squared distance of a flow to its target.

    Args:
      predicted: predicted flow.
      target: noise - x of data, or a teacher's flow.
      weight: weights of the frames. None weights all equally.
      total: as for `weighted_mean`.

    Source: flow matching (arXiv:2210.02747); training/README.md, "Flow matching".
    """
    chex.assert_equal_shape([predicted, target])
    error = jnp.mean(jnp.square(predicted - target), axis=(2, 3, 4))
    return jnp.mean(error) if weight is None else weighted_mean(error, weight, total)


def weighted_mean(
    values: Float[Array, "*axes"],
    weight: Num[Array, "*axes"] | Bool[Array, "*axes"],
    total: Scalar | None = None,
) -> Scalar:
    """Returns the weighted mean, or 0 if all weights are 0.

    Args:
      values: the values.
      weight: their weights.
      total: divisor in place of the sum of the weights. The mean weight of a batch's
        parts makes the mean of their losses that of the whole batch.
    """
    chex.assert_equal_shape([values, weight])
    weight = jnp.asarray(weight, jnp.float32)
    total = jnp.sum(weight) if total is None else total
    return jnp.sum(values * weight) / jnp.maximum(total, 1e-9)


def _x0(score: Score, variables, noisy, timestep, embedding) -> jax.Array:
    videos = P(sharding.split_videos(noisy.shape[0]))

    def one_device(variables, noisy, timestep, embedding):
        context = score.project(variables, embedding)
        return score.x0(variables, noisy, timestep, context).astype(jnp.float32)

    run = sharding.spread(one_device, variables, (videos,) * 3, videos)
    return run(variables, noisy, timestep, embedding)


def _both(score: Score, variables, noisy, timestep, embeddings):
    """Returns the clean clips under two prompts each, from one pass."""
    videos = P(sharding.split_videos(noisy.shape[0]))

    def one_device(variables, noisy, timestep, embeddings):
        context = score.project(variables, jnp.concatenate(embeddings))
        twice, both = (jnp.concatenate([x, x]) for x in (noisy, timestep))
        x0 = score.x0(variables, twice, both, context).astype(jnp.float32)
        return tuple(jnp.split(x0, 2))

    run = sharding.spread(one_device, variables, (videos,) * 3, (videos, videos))
    return run(variables, noisy, timestep, tuple(embeddings))


def _frame_weights(mask: jax.Array, like: jax.Array) -> jax.Array:
    """Returns 1 / (number of elements in the mask) on frames of the mask, else 0."""
    mask = jnp.asarray(mask, jnp.float32)
    count = jnp.sum(mask) * like[:, 0].size
    return (mask / count)[None, :, None, None, None]
