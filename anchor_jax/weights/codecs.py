"""Codecs of bundles in one file; ported weights have the VAE instead."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from anchor_jax.plugins import Registry


class Codec(Protocol):
    """A streaming codec, frozen and hashable, so that it can be static under jit."""

    def init(self, batch: int, height: int, width: int) -> Any:
        """Returns the state after a stream's first latents."""

    def decode(self, params, state, latents: jax.Array) -> tuple[jax.Array, Any]:
        """Returns the pixels of the next latents, and the next state.

        Latents are [batch, frame, height, width, channel], pixels [batch, pixel frame,
        height, width, 3] in [-1, 1]. A stream starts with the state None.
        """

    def encode(self, params, pixels: jax.Array) -> jax.Array:
        """Returns the latents of a video's pixels."""


class StoredCodec(Codec, Protocol):
    """A codec whose parameters a bundle's file holds."""

    def shapes(self, channels: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shape of each float32 parameter, for latents of `channels`."""


CODECS: Registry[StoredCodec] = Registry("codecs")
"""Codecs by their name in the header of a bundle's file."""
STORED = "linear"
"""Name of the codec that `save_bundle` writes."""


def parameters(codec: StoredCodec, channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and types of a codec's parameters by name."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in codec.shapes(channels).items()
    }
