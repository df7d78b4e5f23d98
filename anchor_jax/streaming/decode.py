"""Decodes latents to pixels block by block; the decoder's state is explicit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, UInt8

from anchor_jax.axes import Array, Latents, Params

Frames = UInt8[Array, "batch pixel_frame pixel_height pixel_width 3"]


@functools.partial(jax.jit, static_argnames="codec")
def decode(
    params: Params, state: Any, latents: Latents, *, codec: Any
) -> tuple[Frames, Any]:
    """Returns a stream's next frames, RGB, and the decoder's next state.

    Two programs are compiled: the first k latent frames make 4k - 3 pixel frames, later
    ones make 4k.

    Args:
      params: the codec's parameters.
      state: the state of the previous call, or None at the start of a video.
      latents: the next k latent frames.
      codec: static, e.g. `anchor_jax.tiny_world.codec.LinearCodec()`.
    """
    pixels, state = codec.decode(params, state, latents)
    return to_bytes(pixels), state


@functools.partial(jax.jit, static_argnames="codec", donate_argnames="state")
def decode_next(
    params: Params, state: Any, latents: Latents, *, codec: Any
) -> tuple[Frames, Any]:
    """Like `decode`, but donates `state`, which saves a copy.

    Use it in streams that never return to an earlier state: the call deletes the arrays
    of `state`.
    """
    return decode(params, state, latents, codec=codec)


def to_bytes(pixels: Float[Array, "*axes"]) -> UInt8[Array, "*axes"]:
    """Returns pixels in [-1, 1] as bytes, rounded and clipped."""
    scaled = jnp.rint((pixels.astype(jnp.float32) + 1) * 127.5)
    return jnp.clip(scaled, 0, 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="codec")
def renew(
    params: Params, state: Any, blocks: tuple[Latents, ...], *, codec: Any
) -> tuple[Float[Array, "batch frames height width channel"], tuple[Latents, ...]]:
    """Returns the last blocks as the start of a new video, joined and as a tuple.

    The last pixel frame of the first latent frame is encoded again as a single frame.

    Args:
      params: the codec's parameters.
      state: the decoder's state before the first of these blocks.
      blocks: latents of the blocks in order.
      codec: static.

    Source: CausVid (arXiv:2412.07772), long videos.
    """
    pixels, _ = codec.decode(params, state, blocks[0][:, :1])
    first = codec.encode(params, pixels[:, -1:]).astype(blocks[0].dtype)
    head = jnp.concatenate([first, blocks[0][:, 1:]], axis=1)
    renewed = (head, *blocks[1:])
    return jnp.concatenate(renewed, axis=1), renewed
