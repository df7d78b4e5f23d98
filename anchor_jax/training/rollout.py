"""Chunks of a sequence that the generator makes for training, and their gradients.

The sampler's own step makes a chunk without gradient. The gradient of a loss with
respect to its latents is then pulled back through one pass of each block, one block at
a time. Therefore memory holds the activations of only one block, for a chunk of any
length.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from anchor_jax import parallel, sharding
from anchor_jax.axes import Specs
from anchor_jax.cache import store
from anchor_jax.cache.policies import RecachePass
from anchor_jax.cache.types import KVCache, ReadPlan
from anchor_jax.streaming import spread, stream
from anchor_jax.streaming.types import BlockNoise, StreamSetup, StreamState
from anchor_jax.wan.attention import LayersKV


@struct.dataclass
class Rollout:
    """The state of a sequence between chunks.

    `recent` is as in `StreamState`. `previous` is [batch, frame, height, width,
    channel], the newest clean latent frames, whose number is that of the loss's clip.
    """

    cache: KVCache
    recent: jax.Array
    previous: jax.Array


@dataclasses.dataclass(frozen=True)
class ChunkSwitch:
    """A prompt switch within a chunk; static.

    Attributes:
      block: number of the chunk's first block under the new prompt.
      recache: the re-cache before that block, from `Policy.recache`, or None.
    """

    block: int
    recache: RecachePass | None


@struct.dataclass
class Chunk:
    """New blocks of a sequence, with the data that their gradient needs.

    Blocks before a prompt switch have no gradient (training/README.md, "Blocks of a
    chunk").

    Attributes:
      latents: [batch, frame, height, width, channel], all blocks.
      cache: the cache before the first block with a gradient.
      noisy: [block, batch, ...] input of the pass with the gradient.
      own: [block, layer, ...] keys and values that these blocks committed.
      plans: read plans of the chunk's blocks, stacked.
      recache: read plan of the re-cache, or None.
    """

    latents: jax.Array
    cache: KVCache
    noisy: jax.Array
    own: LayersKV
    plans: ReadPlan
    recache: ReadPlan | None


def begin(setup: StreamSetup, batch: int, frames: int) -> Rollout:
    """Returns a sequence at its start, for a loss that sees `frames` latent frames."""
    rows, columns = setup.tokens
    shape = (setup.grid.height, setup.grid.width, setup.model.latent_channels)
    return Rollout(
        cache=store.init_cache(setup.policy, setup.model, batch, rows * columns),
        recent=jnp.zeros((batch, setup.recent, *shape), setup.model.dtype),
        previous=jnp.zeros((batch, frames, *shape), setup.model.dtype),
    )


def roll(
    variables,
    rollout: Rollout,
    prompts: tuple[jax.Array, ...],
    noise: BlockNoise,
    exit_level: jax.Array,
    *,
    setup: StreamSetup,
    switch: ChunkSwitch | None = None,
    requested=0,
) -> tuple[Rollout, Chunk]:
    """Returns a sequence one chunk later, and the chunk, without gradients.

    Args:
      variables: the generator's collections.
      rollout: state of the sequence.
      prompts: embeddings [batch, text, text_dim] of the chunk's prompt and, if it has a
        switch, of the new prompt.
      noise: noise of all blocks, along a leading axis.
      exit_level: number of the noise level whose estimate becomes the block; traced.
      setup: static.
      switch: the prompt switch within the chunk, or None; static.
      requested: latent frame of the sequence at which the switch was requested, traced.
    """
    variables, rollout = jax.lax.stop_gradient((variables, rollout))
    split = sharding.split_videos(rollout.recent.shape[0])
    specs = sequence_specs(split)
    run = sharding.spread(
        functools.partial(_roll, setup=setup, switch=switch),
        variables,
        (specs, P(split), noise_specs(split), P(), P()),
        (specs, _chunk_specs(split)),
        setup.model.dtype,
    )
    return run(variables, rollout, prompts, noise, exit_level, requested)


def _roll(
    variables, rollout: Rollout, prompts, noise, exit_level, requested, *, setup, switch
):
    """Returns the result of `roll`, for the videos of one device."""
    state = StreamState(rollout.cache, _project(variables, prompts[0], setup), None)
    state = state.replace(recent=rollout.recent)
    parts, recache = [], None
    first = switch.block if switch else 0
    captures = bool(first) and setup.policy.captures_from_chunk
    if captures:
        state = _capturing(state, True)
    if first:
        state, part = _blocks(
            variables, state, _cut(noise, 0, first), exit_level, setup
        )
        parts.append(part)
    if switch:
        state, block = stream.change(
            variables,
            state,
            _project(variables, prompts[1], setup),
            requested,
            setup=setup,
            recache=switch.recache,
        )
        recache = block.plan if block else None
    if captures:
        state = _capturing(state, False)
    cache = state.cache
    state, part = _blocks(variables, state, _cut(noise, first, None), exit_level, setup)
    parts.append(part)
    latents, plans = _joined(parts)
    chunk = Chunk(latents, cache, part["noisy"], part["own"], plans, recache)
    previous = _newest(rollout.previous, latents)
    return Rollout(state.cache, state.recent, previous), chunk


def _joined(parts) -> tuple[jax.Array, ReadPlan]:
    """Returns the latents and the plans of all blocks."""
    latents, plans = (
        jax.tree.map(lambda *x: jnp.concatenate(x), *(part[name] for part in parts))
        for name in ("latents", "plans")
    )
    return _in_a_row(latents), plans


def _newest(previous: jax.Array, latents: jax.Array) -> jax.Array:
    """Returns the newest frames, as many as `previous` has."""
    both = jnp.concatenate([previous, latents], axis=1)
    return both[:, both.shape[1] - previous.shape[1] :]


def pull_back(
    trainable,
    frozen,
    chunk: Chunk,
    prompt: jax.Array,
    exit_level: jax.Array,
    cotangent: jax.Array,
    *,
    setup: StreamSetup,
):
    """Returns the gradient of a loss on a chunk's latents with respect to `trainable`.

    Cached keys and values are constants (training/README.md, "D5").

    Args:
      trainable: trained collections of the generator.
      frozen: other collections of the generator.
      chunk: result of `roll` with these collections.
      prompt: embedding of the chunk's last prompt.
      exit_level: as for `roll`.
      cotangent: [batch, frame, height, width, channel], gradient of the loss with
        respect to the latents of the blocks with a gradient, which are the chunk's
        last.
      setup: static.
    """
    split = sharding.split_videos(cotangent.shape[0])
    pull = functools.partial(_pull_back, setup=setup)
    arrays = (_chunk_specs(split), P(split), P(), P(split))
    if not parallel.is_on_mesh():
        return pull(trainable, frozen, chunk, prompt, exit_level, cotangent)
    own, fixed = map(sharding.of_collections, (trainable, frozen))

    def one_device(trainable, frozen, chunk, prompt, exit_level, cotangent):
        mine, others = parallel.parts(trainable, own), parallel.parts(frozen, fixed)
        dtype = setup.model.dtype
        total = pull(
            parallel.gathered(mine, dtype),
            parallel.gathered(others, dtype),
            *(chunk, prompt, exit_level, parallel.once(cotangent)),
        )
        return parallel.reduced(total, mine, own)

    run = parallel.each_device(one_device, (own, fixed, *arrays), own)
    return run(trainable, frozen, chunk, prompt, exit_level, cotangent)


def _pull_back(trainable, frozen, chunk, prompt, exit_level, cotangent, *, setup):
    """Returns the result of `pull_back`, for the videos of one device."""
    blocks = chunk.noisy.shape[0]
    batch, frames, *rest = cotangent.shape
    by_block = cotangent.reshape(batch, blocks, frames // blocks, *rest)

    def estimate(trainable, cache, noisy):
        variables = {**frozen, **trainable}
        state = StreamState(cache, _project(variables, prompt, setup), None)
        return stream.estimate(variables, state, noisy, exit_level, setup=setup)

    def one_block(carry, block):
        cache, total = carry
        noisy, own, by_latents = block
        x0, pull = jax.vjp(lambda some: estimate(some, cache, noisy), trainable)
        (found,) = pull(by_latents.astype(x0.dtype))
        total = jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, found)
        return (stream.recommit(cache, own, setup=setup), total), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable)
    xs = (chunk.noisy, chunk.own, jnp.moveaxis(by_block, 1, 0))
    (_, total), _ = jax.lax.scan(one_block, (chunk.cache, zeros), xs)
    return total


def window(
    previous: jax.Array, latents: jax.Array, renew: Callable
) -> tuple[jax.Array, np.ndarray]:
    """Returns the clip that the loss sees, and the mask of frames with a loss.

    The clip is the new frames, with earlier frames before them to fill it. The first of
    those is encoded again as a video's first frame, because the scores were trained on
    clips that start with such a frame.

    Args:
      previous: clean frames before the chunk, as many as the clip has.
      latents: latents of the chunk.
      renew: function from latents up to a frame to that frame as a clip's first latent.

    Source: training/README.md, "The window of the loss".
    """
    frames, new = previous.shape[1], latents.shape[1]
    mask = np.arange(frames) >= frames - new
    if new == frames:
        return latents, mask
    whole = jnp.concatenate([previous, latents], axis=1)
    image = renew(whole[:, : new + 1]).astype(latents.dtype)
    return jnp.concatenate([image, whole[:, new + 1 :]], axis=1), mask


def renew_last(params, latents: jax.Array, *, codec) -> jax.Array:
    """Returns the last frame of a clip, encoded alone as a clip's first latent.

    The clip then starts like a video (training/README.md, "The window of the loss").

    Args:
      params: the codec's parameters.
      latents: [batch, frame, height, width, channel].
      codec: static.
    """
    pixels, _ = codec.decode(params, None, sharding.by_column(latents))
    return jnp.asarray(codec.encode(params, pixels[:, -1:]))


def _blocks(variables, state: StreamState, noise: BlockNoise, exit_level, setup):
    """Returns the stream after some blocks, and the result of each."""

    def one(carry, noise):
        now = StreamState(carry[0], state.context, carry[1])
        now, block, own = stream.advance(variables, now, noise, exit_level, setup=setup)
        made = {
            "latents": block.latents,
            "noisy": block.passes.noisy[exit_level],
            "own": own,
            "plans": block.plan,
        }
        return (now.cache, now.recent), made

    (cache, recent), made = jax.lax.scan(one, (state.cache, state.recent), noise)
    return StreamState(cache, state.context, recent), made


def sequence_specs(split: tuple[str, ...]) -> Specs[Rollout]:
    """Returns the specs of a sequence whose videos are split over mesh axes."""
    return Rollout(spread.cache(split), P(split), P(split))


def noise_specs(split: tuple[str, ...]) -> Specs[BlockNoise]:
    """Returns the specs of the noise of all blocks, along a leading axis."""
    return jax.tree.map(lambda spec: P(None, *spec), spread.noise(split))


def _chunk_specs(split: tuple[str, ...]) -> Specs[Chunk]:
    own = P(None, None, split, None, None, parallel.HEADS)
    return Chunk(P(split), spread.cache(split), P(None, split), own, P(), P())


def _capturing(state: StreamState, captures: bool) -> StreamState:
    """Returns the stream with `capture` set for its next block."""
    index = state.cache.index.replace(capture=jnp.array(captures))
    return state.replace(cache=state.cache.replace(index=index))


def _cut(noise: BlockNoise, first: int, end: int | None) -> BlockNoise:
    return jax.tree.map(lambda x: x[first:end], noise)


def _in_a_row(latents: jax.Array) -> jax.Array:
    """Returns [block, batch, frame, ...] as [batch, block x frame, ...]."""
    blocks, batch, frames, *rest = latents.shape
    return jnp.moveaxis(latents, 0, 1).reshape(batch, blocks * frames, *rest)


def _project(variables, embedding, setup: StreamSetup):
    return stream.project(variables, embedding, setup=setup)
