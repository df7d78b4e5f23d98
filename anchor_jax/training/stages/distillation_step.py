"""Steps of distillation: generator and critic, on rollouts of the generator.

Pure functions of state, frozen weights and batch; `CompiledDistillation`
compiles them for a mesh.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from anchor_jax import flow, sharding
from anchor_jax.streaming.types import BlockNoise, StreamSetup
from anchor_jax.training import losses, microbatches, rollout
from anchor_jax.training.losses import Score
from anchor_jax.training.rollout import ChunkSwitch, Rollout
from anchor_jax.training.schedule import ChunkSpan, SequencePlan
from anchor_jax.training.state import (
    Ema,
    TrainState,
    checked,
    move_generator,
    moved,
)

GENERATOR, CRITIC = 1, 2
"""Purposes of random numbers, one for each role's rollout."""


@dataclasses.dataclass(frozen=True)
class DistillationSpec:
    """The static settings of a distillation.

    Attributes:
      setup: setup of the generator's stream.
      critic: network of the fake score.
      teacher: network of the real score.
      codec: VAE that encodes the first frame of the loss's clip again.
      plan: how sequences are cut into chunks.
      guidance: real = with + guidance (with - without).
      shift: shift of the loss's noise levels towards noise.
      batch: number of videos.
      microbatches: number of parts of the batch, computed one after another.

    Source: training/README.md, "The losses, exactly", "Sequences and chunks".
    """

    setup: StreamSetup
    critic: Score
    teacher: Score
    codec: Any
    plan: SequencePlan
    guidance: float = 3.0
    shift: float = 5.0
    batch: int = 1
    microbatches: int = 1


@dataclasses.dataclass(frozen=True)
class ChunkShape:
    """The static shape of a chunk. Few shapes exist, so few programs are compiled."""

    blocks: int
    is_first: bool
    prompt: int
    switch: ChunkSwitch | None


def shape_of(spec: DistillationSpec, span: ChunkSpan) -> ChunkShape:
    """Returns the shape of a chunk."""
    block = spec.setup.policy.block
    switch = None
    if span.switch_at is not None:
        number = (span.switch_at - span.start) // block
        switch = ChunkSwitch(number, spec.setup.policy.recache(span.switch_at))
    return ChunkShape(span.new // block, span.start == 0, span.prompt, switch)


def generator_gradient(
    state: TrainState, frozen, batch, *, spec: DistillationSpec, shape: ChunkShape
):
    """Returns the state after a chunk, the generator's gradient, and metrics.

    Args:
      state: the state. `rollout` advances, and `sound` also covers this loss and
        gradient: if one gradient of a step is not finite, neither is used.
      frozen: weights without a gradient: collections of `generator`, `fake_score` and
        `real_score`, and the parameters of `codec`.
      batch: embeddings `prompt`, `switch` and `negative` [batch, text, text_dim], and
        `requested`, the latent frame of the sequence's prompt switch.
      spec: static settings.
      shape: static shape of the chunk.
    """
    videos, exit_level = _draw(state, batch, spec, shape, GENERATOR)
    fake = {**frozen["fake_score"], **state.fake_score}

    def gradient(part: Videos):
        after, clip, mask, chunk, prompts = _next_chunk(
            state, frozen, part, exit_level, batch["requested"], spec, shape
        )
        found = losses.distribution_matching(
            clip,
            part.noise,
            part.timestep,
            mask,
            fake=(spec.critic, fake, prompts[-1]),
            real=(spec.teacher, frozen["real_score"], prompts[-1], part.negative),
            guidance=spec.guidance,
        )
        frames = chunk.noisy.shape[0] * chunk.noisy.shape[2]
        pulled = rollout.pull_back(
            state.generator,
            frozen["generator"],
            chunk,
            prompts[-1],
            exit_level,
            found.gradient[:, clip.shape[1] - frames :],
            setup=spec.setup,
        )
        return pulled, after, {"generator_loss": found.loss, "score_gap": found.gap}

    found, after, metrics = _over_parts(gradient, videos, spec)
    metrics |= {"exit_level": exit_level, "loss_timestep": jnp.mean(videos.timestep)}
    state = state.replace(rollout=after)
    # The gap shows scores that are not finite; the direction treats them as 0.
    loss = metrics["generator_loss"] + metrics["score_gap"]
    return checked(state, found, loss), found, metrics


def critic_gradient(
    state: TrainState, frozen, batch, *, spec: DistillationSpec, shape: ChunkShape
):
    """Returns the state after a chunk, the critic's gradient, and metrics.

    Args:
      state: as for `generator_gradient`.
      frozen: as for `generator_gradient`.
      batch: as for `generator_gradient`.
      spec: static settings.
      shape: static shape of the chunk.
    """
    videos, exit_level = _draw(state, batch, spec, shape, CRITIC)

    def gradient(part: Videos):
        after, clip, mask, _, prompts = _next_chunk(
            state, frozen, part, exit_level, batch["requested"], spec, shape
        )

        def loss(trainable):
            variables = {**frozen["fake_score"], **trainable}
            return losses.score_flow(
                variables,
                spec.critic,
                clip,
                part.noise,
                part.timestep,
                prompts[-1],
                mask,
            )

        value, found = jax.value_and_grad(loss)(state.fake_score)
        return found, after, {"critic_loss": value}

    found, after, metrics = _over_parts(gradient, videos, spec)
    state = state.replace(rollout=after)
    metrics |= {"critic_exit_level": exit_level}
    return checked(state, found, metrics["critic_loss"]), found, metrics


def update_generator(state: TrainState, gradient, loss, *, tx, ema: Ema | None):
    """Returns the state after an update of the generator and its mean, and metrics."""
    state, norm = move_generator(state, gradient, loss, tx, ema)
    return state, {"generator_gradient_norm": norm}


def update_critic(state: TrainState, gradient, loss, *, tx):
    """Returns the state after an update of the critic, one step later, and metrics."""
    fake_score, opt_state, norm, sound = moved(
        tx, gradient, state.opt_fake_score, state.fake_score, loss, state.sound
    )
    state = state.replace(
        fake_score=fake_score,
        opt_fake_score=opt_state,
        sound=sound,
        step=state.step + sound,
    )
    return state, {"critic_gradient_norm": norm}


@struct.dataclass
class Videos:
    """What the gradient of some videos depends on, besides the weights.

    Attributes:
      sequence: state of their sequences.
      prompts: embeddings of the chunk's prompts, as for `rollout.roll`.
      negative: embeddings of the negative prompts.
      blocks: noise of all blocks.
      timestep: [batch], timesteps of the loss.
      noise: noise of the loss, of the shape of its clip.
    """

    sequence: Rollout
    prompts: tuple[jax.Array, ...]
    negative: jax.Array
    blocks: BlockNoise
    timestep: jax.Array
    noise: jax.Array


def _draw(state: TrainState, batch, spec: DistillationSpec, shape: ChunkShape, role):
    """Returns the `Videos` of a step's chunk, and the exit level of its blocks."""
    setup, sequence = spec.setup, state.rollout
    if shape.is_first:
        sequence = rollout.begin(setup, spec.batch, spec.plan.frames)
    key = state.key(role, 0)
    exit_level = jax.random.randint(key, (), 0, len(setup.levels))
    blocks = draw_chunk_noise(jax.random.fold_in(key, 1), shape.blocks, spec)
    both = (batch["prompt"], batch["switch"])
    prompts = both if shape.switch else both[shape.prompt : shape.prompt + 1]
    timestep, noise = _loss_noise(state.key(role, 1), sequence.previous, spec)
    negative = batch["negative"]
    return Videos(sequence, prompts, negative, blocks, timestep, noise), exit_level


def _over_parts(gradient: Callable, videos: Videos, spec: DistillationSpec):
    """Returns gradient, sequences and metrics of all videos, from those of parts."""
    split = sharding.VIDEOS
    specs = Videos(
        rollout.sequence_specs(split),
        *(P(split), P(split), rollout.noise_specs(split), P(split), P(split)),
    )
    return microbatches.over_parts(
        gradient, videos, specs, specs.sequence, spec.microbatches
    )


def _next_chunk(
    state: TrainState, frozen, videos: Videos, exit_level, requested, spec, shape
):
    """Returns the sequences after a chunk, the clip of the loss, and what made them."""
    variables = {**frozen["generator"], **state.generator}
    after, chunk = rollout.roll(
        variables,
        videos.sequence,
        videos.prompts,
        videos.blocks,
        exit_level,
        setup=spec.setup,
        switch=shape.switch,
        requested=requested,
    )
    clip, mask = rollout.window(
        videos.sequence.previous,
        chunk.latents,
        lambda x: rollout.renew_last(frozen["codec"], x, codec=spec.codec),
    )
    return after, jax.lax.stop_gradient(clip), mask, chunk, videos.prompts


def draw_chunk_noise(key: jax.Array, blocks: int, spec: DistillationSpec) -> BlockNoise:
    """Returns the noise of a chunk's blocks, with a leading axis of blocks."""
    setup, grid = spec.setup, spec.setup.grid
    shape = (spec.batch, setup.policy.block, grid.height, grid.width)
    shape = (*shape, setup.model.latent_channels)
    passes = len(setup.levels) + bool(setup.floor)
    draw = jax.random.normal(key, (blocks, passes, *shape), setup.model.dtype)
    levels = len(setup.levels)
    return BlockNoise(
        initial=draw[:, 0],
        fresh=draw[:, 1:levels],
        floor=draw[:, levels] if setup.floor else None,
    )


def _loss_noise(key: jax.Array, clip: jax.Array, spec: DistillationSpec):
    """Returns the timesteps [batch] and the noise of a loss."""
    first, second = jax.random.split(key)
    drawn = jax.random.randint(first, (clip.shape[0],), 0, flow.TRAIN_STEPS)
    timestep = flow.dmd_timestep(drawn.astype(jnp.float32), spec.shift)
    return timestep, jax.random.normal(second, clip.shape, clip.dtype)
