"""Steps of distillation: generator and critic, on rollouts of the generator.

Pure functions of state, frozen weights and batch; `CompiledDistillation`
compiles them for a mesh.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from anchor_jax import flow
from anchor_jax.streaming.types import BlockNoise, StreamSetup
from anchor_jax.training import losses, rollout
from anchor_jax.training.losses import Score
from anchor_jax.training.rollout import ChunkSwitch
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
    state, clip, mask, chunk, prompts, exit_level = _next_chunk(
        state, frozen, batch, spec, shape, GENERATOR
    )
    timestep, noise = _loss_noise(state.key(GENERATOR, 1), clip, spec)
    fake = {**frozen["fake_score"], **state.fake_score}
    found = losses.distribution_matching(
        clip,
        noise,
        timestep,
        mask,
        fake=(spec.critic, fake, prompts[-1]),
        real=(spec.teacher, frozen["real_score"], prompts[-1], batch["negative"]),
        guidance=spec.guidance,
    )
    frames = chunk.noisy.shape[0] * chunk.noisy.shape[2]
    gradient = rollout.pull_back(
        state.generator,
        frozen["generator"],
        chunk,
        prompts[-1],
        exit_level,
        found.gradient[:, clip.shape[1] - frames :],
        setup=spec.setup,
    )
    metrics = {
        "generator_loss": found.loss,
        "score_gap": found.gap,
        "exit_level": exit_level,
        "loss_timestep": jnp.mean(timestep),
    }
    # The gap shows scores that are not finite; the direction treats them as 0.
    return checked(state, gradient, found.loss + found.gap), gradient, metrics


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
    state, clip, mask, _, prompts, exit_level = _next_chunk(
        state, frozen, batch, spec, shape, CRITIC
    )
    timestep, noise = _loss_noise(state.key(CRITIC, 1), clip, spec)

    def loss(trainable):
        variables = {**frozen["fake_score"], **trainable}
        return losses.score_flow(
            variables, spec.critic, clip, noise, timestep, prompts[-1], mask
        )

    value, gradient = jax.value_and_grad(loss)(state.fake_score)
    metrics = {"critic_loss": value, "critic_exit_level": exit_level}
    return checked(state, gradient, value), gradient, metrics


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


def _next_chunk(
    state: TrainState, frozen, batch, spec: DistillationSpec, shape, role: int
):
    """Returns the state after a chunk, the clip of the loss, and what made them."""
    setup = spec.setup
    sequence = state.rollout
    if shape.is_first:
        sequence = rollout.begin(setup, spec.batch, spec.plan.frames)
    key = state.key(role, 0)
    exit_level = jax.random.randint(key, (), 0, len(setup.levels))
    noise = draw_chunk_noise(jax.random.fold_in(key, 1), shape.blocks, spec)
    both = (batch["prompt"], batch["switch"])
    prompts = both if shape.switch else both[shape.prompt : shape.prompt + 1]
    variables = {**frozen["generator"], **state.generator}
    after, chunk = rollout.roll(
        variables,
        sequence,
        prompts,
        noise,
        exit_level,
        setup=setup,
        switch=shape.switch,
        requested=batch["requested"],
    )
    clip, mask = rollout.window(
        sequence.previous,
        chunk.latents,
        lambda x: rollout.renew_last(frozen["codec"], x, codec=spec.codec),
    )
    state = state.replace(rollout=after)
    return state, jax.lax.stop_gradient(clip), mask, chunk, prompts, exit_level


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
