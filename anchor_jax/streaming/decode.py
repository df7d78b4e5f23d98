"""Decodes latents to pixels block by block; the decoder's state is explicit."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="codec")
def decode(params, state, latents: jax.Array, *, codec):
    """Returns a stream's next frames, uint8 RGB, and the decoder's next state.

    Two programs are compiled: the first k latent frames make 4k - 3 pixel frames, later
    ones make 4k.

    Args:
      params: the codec's parameters.
      state: the state of the previous call, or None at the start of a video.
      latents: [batch, k, height, width, channel].
      codec: static, e.g. `anchor_jax.tiny_world.codec.LinearCodec()`.
    """
    pixels, state = codec.decode(params, state, latents)
    return to_bytes(pixels), state


@functools.partial(jax.jit, static_argnames="codec", donate_argnames="state")
def decode_next(params, state, latents: jax.Array, *, codec):
    """Like `decode`, but donates `state`, which saves a copy.

    Use it in streams that never return to an earlier state: the call deletes the arrays
    of `state`.
    """
    return decode(params, state, latents, codec=codec)


def to_bytes(pixels: jax.Array) -> jax.Array:
    """Returns pixels in [-1, 1] as uint8, rounded and clipped."""
    scaled = jnp.rint((pixels.astype(jnp.float32) + 1) * 127.5)
    return jnp.clip(scaled, 0, 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="codec")
def renew(params, state, blocks: tuple[jax.Array, ...], *, codec):
    """Returns the last blocks as the start of a new video, joined and as a tuple.

    The last pixel frame of the first latent frame is encoded again as a single frame.

    Args:
      params: the codec's parameters.
      state: the decoder's state before the first of these blocks.
      blocks: latents [batch, block, height, width, channel] in order.
      codec: static.

    Source: CausVid (arXiv:2412.07772), long videos.
    """
    pixels, _ = codec.decode(params, state, blocks[0][:, :1])
    first = codec.encode(params, pixels[:, -1:]).astype(blocks[0].dtype)
    head = jnp.concatenate([first, blocks[0][:, 1:]], axis=1)
    renewed = (head, *blocks[1:])
    return jnp.concatenate(renewed, axis=1), renewed
