"""Three-axis rotary position embedding and the sinusoid of timesteps."""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import struct
from jaxtyping import Float, Float32, Int

from anchor_jax.axes import Array

_STRIDE = 1024


@struct.dataclass
class Rotary:
    """Rotation of every token.

    Both channels of a pair have its angle; `sin` is negative in the first of them.
    """

    cos: Float32[Array, "frame token head_dim"]
    sin: Float32[Array, "frame token head_dim"]


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Returns the numbers of a head's pairs that rotate with time, height and width.

    Source: wan/README.md, "RoPE"; 22, 21 and 21 for a head of 128.
    """
    pairs = head_dim // 2
    side = pairs // 3
    return pairs - 2 * side, side, side


def frequencies(pairs: int, theta: float = 10000.0) -> Float[Array, " {pairs}"]:
    """Returns theta^(-i / pairs) for each pair, in float64."""
    return theta ** (-np.arange(pairs, dtype=np.float64) / pairs)


def cos_sin(
    position: Int[Array, "*axes"], freq: Float[Array, " pairs"]
) -> tuple[Float32[Array, "*axes pairs"], Float32[Array, "*axes pairs"]]:
    """Returns cos and sin of position * freq.

    `position` is not negative. It is split as 1024 a + b, both looked up in
    tables made in float64 and joined by the addition theorem, so that the error stays
    near 1e-7 up to a million. float32 products would lose the phase.
    """
    angle = np.arange(_STRIDE)[:, None] * freq
    fine = np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)
    coarse = np.stack([np.cos(_STRIDE * angle), np.sin(_STRIDE * angle)])
    coarse = coarse.astype(np.float32)
    position = jnp.maximum(position, 0)
    low, high = position % _STRIDE, jnp.minimum(position // _STRIDE, _STRIDE - 1)
    (cos_l, sin_l) = jnp.asarray(fine)[:, low]
    (cos_h, sin_h) = jnp.asarray(coarse)[:, high]
    return cos_h * cos_l - sin_h * sin_l, sin_h * cos_l + cos_h * sin_l


def rotary(
    position: Int[Array, " frame"],
    tokens: tuple[int, int],
    head_dim: int,
    theta: float = 10000.0,
) -> Rotary:
    """Returns the rotation of latent frames at the given temporal positions.

    Args:
      position: the temporal index of each frame, traced.
      tokens: rows and columns of tokens in a frame.
      head_dim: channels of one attention head.
      theta: base of the frequencies. Each axis has its own spectrum.

    Source: wan/README.md, "RoPE".
    """
    rows, columns = tokens
    time, high, wide = axis_pairs(head_dim)
    row = np.arange(rows)[:, None] * frequencies(high, theta)
    column = np.arange(columns)[:, None] * frequencies(wide, theta)

    def combine(temporal, spatial):
        shape = (position.shape[0], rows, columns)
        parts = (
            jnp.broadcast_to(temporal[:, None, None], (*shape, time)),
            jnp.broadcast_to(spatial(row)[:, None], (*shape, high)),
            jnp.broadcast_to(spatial(column)[None], (*shape, wide)),
        )
        joined = jnp.concatenate([part.astype(jnp.float32) for part in parts], -1)
        return rearrange(joined, "f h w p -> f (h w) p")

    cos, sin = cos_sin(position, frequencies(time, theta))
    return of_pairs(combine(cos, np.cos), combine(sin, np.sin))


def of_pairs(
    cos: Float32[Array, "frame token pairs"], sin: Float32[Array, "frame token pairs"]
) -> Rotary:
    """Returns the rotation by angles of pairs."""
    return Rotary(
        cos=jnp.repeat(cos, 2, axis=-1),
        sin=rearrange(jnp.stack([-sin, sin], axis=-1), "f t p two -> f t (p two)"),
    )


def rotate(
    x: Float[Array, "*axes frame token dim"], by: Rotary
) -> Float[Array, "*axes frame token dim"]:
    """Returns `x` with adjacent channel pairs (2i, 2i + 1) rotated, in its dtype.

    Args:
      x: heads are adjacent in `dim`.
      by: rotation of every frame and token for one head.
    """
    head_dim = by.cos.shape[-1]
    wide = rearrange(x, "... (h d) -> ... h d", d=head_dim).astype(jnp.float32)
    # Rolling finds each channel's partner, and is fast on every backend.
    odd = np.arange(head_dim) % 2 == 1
    partner = jnp.where(odd, jnp.roll(wide, 1, -1), jnp.roll(wide, -1, -1))
    rotated = wide * by.cos[:, :, None] + partner * by.sin[:, :, None]
    return rotated.astype(x.dtype).reshape(x.shape)


def timestep_sinusoid(
    timestep: Float[Array, "*axes"], dim: int
) -> Float[Array, "*axes {dim}"]:
    """Returns [cos, sin] of timestep * 10000^(-i / (dim / 2)).

    The whole part of the timestep, in [0, 1000], is looked up exactly. The rest, below
    1, is small enough for float32.

    Source: wan/README.md, "Forward pass", cosines first.
    """
    freq = frequencies(dim // 2)
    whole = jnp.floor(timestep)
    cos_n, sin_n = cos_sin(whole.astype(jnp.int32), freq)
    rest = (timestep - whole)[..., None] * freq.astype(np.float32)
    cos_r, sin_r = jnp.cos(rest), jnp.sin(rest)
    cos = cos_n * cos_r - sin_n * sin_r
    return jnp.concatenate([cos, sin_n * cos_r + cos_n * sin_r], axis=-1)


def table(
    position: Int[Array, " position"], head_dim: int
) -> Float[Array, "position {head_dim//2}"]:
    """Returns the angles of all three axes at equal positions, in float64.

    It serves only inspection and tests.
    """
    freq = np.concatenate([frequencies(pairs) for pairs in axis_pairs(head_dim)])
    return np.asarray(position, np.float64)[:, None] * freq
