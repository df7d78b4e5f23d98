"""The tiny world's linear codec: principal components of 4 x 8 x 8 pixel blocks.

Pixels are in [-1, 1]. A video's first pixel frame is repeated four times and coded in
the same basis as all other latent frames, so latents rolled by one cell are the
latents of pixels rolled by eight.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from anchor_jax.wan.spec import WAN_2_1

FRAMES, CELL, _ = WAN_2_1.strides
BLOCK_VALUES = FRAMES * CELL * CELL * 3

Params = dict[str, jnp.ndarray]


def pixel_blocks(pixels):
    """Returns [B, 4k, H, W, 3] pixels as blocks, [B, k, H/8, W/8, 768].

    Takes numpy and JAX arrays.
    """
    _check(pixels.shape, remainder=0)
    return rearrange(
        pixels,
        "b (f t) (h y) (w x) c -> b f h w (t y x c)",
        t=FRAMES,
        y=CELL,
        x=CELL,
    )


def with_first_repeated(pixels):
    """Returns [B, 4 + 4k, H, W, 3]: pixels [B, 1 + 4k, H, W, 3], frame 0 four times."""
    _check(pixels.shape, remainder=1)
    module = np if isinstance(pixels, np.ndarray) else jnp
    first = repeat(pixels[:, :1], "b 1 h w c -> b t h w c", t=FRAMES)
    return module.concatenate([first, pixels[:, 1:]], axis=1)


def to_unit(frames: np.ndarray) -> np.ndarray:
    """Returns uint8 pixels as float32 in [-1, 1]."""
    return frames.astype(np.float32) / np.float32(127.5) - np.float32(1)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Returns pixels in [-1, 1] as uint8, rounded and clipped."""
    return np.clip(np.rint((np.asarray(pixels) + 1) * 127.5), 0, 255).astype(np.uint8)


def fit_codec(
    blocks: np.ndarray, channels: int = WAN_2_1.latent_channels
) -> dict[str, np.ndarray]:
    """Returns the codec of pixel blocks [N, 768]: `mean`, `encode` and `decode`.

    The leading principal components, half-whitened: each is divided by the square
    root of its standard deviation, then all by one number that makes their mean
    variance 1. Full whitening would give edges as much weight in the loss as colour and
    place.

    Args:
      blocks: At least `channels` pixel blocks in [-1, 1], in any leading shape.
      channels: Channels of a latent.
    """
    blocks = np.asarray(blocks, np.float32).reshape(-1, BLOCK_VALUES)
    if len(blocks) <= channels:
        raise ValueError(
            f"{len(blocks)} blocks do not span {channels} channels; pass more blocks"
        )
    mean = blocks.mean(axis=0, dtype=np.float64)
    centered = blocks - mean.astype(np.float32)
    variance, basis = np.linalg.eigh(centered.T @ centered / np.float32(len(blocks)))
    variance, basis = variance[::-1][:channels], basis[:, ::-1][:, :channels]
    deviation = np.sqrt(np.maximum(variance.astype(np.float64), 1e-8))
    basis = basis * np.where(basis.sum(axis=0) < 0, -1, 1)
    scale = 1 / np.sqrt(deviation * deviation.mean())
    return {
        "mean": mean.astype(np.float32),
        "encode": (basis * scale).astype(np.float32),
        "decode": (basis / scale).T.astype(np.float32),
    }


def encode_blocks(params: Params, pixels: jnp.ndarray) -> jnp.ndarray:
    """Returns the latents of a clip that starts after a video's first latent frame.

    Pixels [B, 4k, H, W, 3] give latents [B, k, H/8, W/8, channels].
    """
    return (pixel_blocks(pixels) - params["mean"]) @ params["encode"]


def encode(params: Params, pixels: jnp.ndarray) -> jnp.ndarray:
    """Returns a video's latents, [B, k + 1, H/8, W/8, channels].

    Pixels are [B, 1 + 4k, H, W, 3]; the first frame alone is the first latent.
    """
    return encode_blocks(params, with_first_repeated(pixels))


def decode(params: Params, latents: jnp.ndarray, first: bool) -> jnp.ndarray:
    """Returns the pixels of latents [B, k, h, w, channels], [B, F, 8h, 8w, 3].

    Args:
      params: From `fit_codec`.
      latents: Coded by `encode` or `encode_blocks`.
      first: Whether latent 0 starts a video: it then gives one pixel frame, the mean
        of its four, and F = 4k - 3; otherwise F = 4k. Static under jit.
    """
    pixels = rearrange(
        latents @ params["decode"] + params["mean"],
        "b f h w (t y x c) -> b (f t) (h y) (w x) c",
        t=FRAMES,
        y=CELL,
        x=CELL,
    )
    if not first:
        return pixels
    head = pixels[:, :FRAMES].mean(axis=1, keepdims=True)
    return jnp.concatenate([head, pixels[:, FRAMES:]], axis=1)


@dataclasses.dataclass(frozen=True)
class LinearCodec:
    """The codec as a streaming decoder, whose state carries no values."""

    def init(self, batch: int, height: int, width: int) -> tuple:
        """Returns the state after a stream's first latents, here an empty pytree.

        A stream starts with the state None.
        """
        del batch, height, width
        return ()

    def decode(
        self, params: Params, state: tuple | None, latents: jnp.ndarray
    ) -> tuple[jnp.ndarray, tuple]:
        """Returns the pixels of the stream's next latents, and the next state."""
        return decode(params, latents, first=state is None), ()

    def encode(self, params: Params, pixels: jnp.ndarray) -> jnp.ndarray:
        """Returns the latents of a video's pixels [B, 1 + 4k, H, W, 3]."""
        return encode(params, pixels)

    def shapes(self, channels: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each parameter, for latents of `channels`."""
        return {
            "mean": (BLOCK_VALUES,),
            "encode": (BLOCK_VALUES, channels),
            "decode": (channels, BLOCK_VALUES),
        }


LINEAR = LinearCodec()


def _check(shape: tuple[int, ...], remainder: int) -> None:
    _, frames, height, width, _ = shape
    if frames % FRAMES != remainder or height % CELL or width % CELL:
        raise ValueError(
            f"got {frames} pixel frames of {height} x {width}; expected"
            f" {FRAMES}k + {remainder} frames and sides in multiples of {CELL};"
            " cut the clip, and use encode for one that begins its video,"
            " encode_blocks for any other"
        )
