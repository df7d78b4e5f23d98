"""Small layers shared by the Wan2.1 networks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from anchor_jax import parallel
from anchor_jax.axes import Array, Tokens


def weight(
    module: nn.Module, name: str, init: Any, shape: tuple[int, ...], dtype: str
) -> Float[Array, "*axes"] | parallel.Part:
    """Returns a module's parameter, or this device's part of it; made at `init`.

    Args:
      module: the module that has the parameter.
      name: name of the parameter.
      init: its initializer.
      shape: its whole shape.
      dtype: type of a new parameter.
    """
    if parallel.is_inside():
        # Flax would compare the part's shape with the whole one.
        return module.get_variable("params", name)
    return module.param(name, init, shape, dtype)


class Dense(nn.Module):
    """A linear layer; adds a low-rank update if the collection `lora` holds one.

    y = x W + b + (x A) B, with the update's scale folded into B. On a mesh, `split`
    names the side whose features a device has a part of: "out", or "in" with the sum
    over the devices as the result.

    Source: wan/README.md, "LoRA"; LoRA (arXiv:2106.09685).
    """

    features: int
    dtype: str
    param_dtype: str
    init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    split: str = ""

    @nn.compact
    def __call__(self, x: Float[Array, "*axes wide"]) -> Float[Array, "*axes out"]:
        shape, zeros = (x.shape[-1], self.features), nn.initializers.zeros
        kernel = weight(self, "kernel", self.init, shape, self.param_dtype)
        bias = weight(self, "bias", zeros, shape[1:], self.param_dtype)
        x = x.astype(self.dtype)
        y = x @ parallel.whole(kernel, self.dtype)
        if self.has_variable("lora", "a"):
            down, up = (self.get_variable("lora", name) for name in ("a", "b"))
            down, up = (parallel.whole(one, self.dtype) for one in (down, up))
            y = y + parallel.with_rank(x @ down, up.shape[0]) @ up
        if self.split == "in":
            y = parallel.summed(y)
        return y + parallel.whole(bias, self.dtype)


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis; rounds before the weight.

    On a mesh a device has a part of the features, and the mean is that of all.

    Source: wan/README.md, "Transformer block".
    """

    eps: float
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
        ones = nn.initializers.ones
        scale = weight(self, "scale", ones, x.shape[-1:], self.param_dtype)
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        devices = parallel.size(parallel.TENSOR)
        mean = parallel.summed(mean / devices) if devices > 1 else mean
        y = (x32 * jax.lax.rsqrt(mean + self.eps)).astype(self.dtype)
        return y * parallel.whole(scale, self.dtype)


def layer_norm(x: Float[Array, "*axes"], eps: float) -> Float[Array, "*axes"]:
    """Returns `x` with mean 0 and variance 1 over its last axis, in its dtype."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    centred = x32 - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


class AffineNorm(nn.Module):
    """Layer norm with scale and bias."""

    eps: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale = weight(self, "scale", ones, x.shape[-1:], self.param_dtype)
        bias = weight(self, "bias", zeros, x.shape[-1:], self.param_dtype)
        y = layer_norm(x.astype(jnp.float32), self.eps)
        return (y * parallel.whole(scale) + parallel.whole(bias)).astype(x.dtype)


def modulate(
    x: Tokens,
    shift: Float[Array, "batch frame dim"],
    scale: Float[Array, "batch frame dim"],
) -> Tokens:
    """Returns x (1 + scale) + shift, with one shift and scale per latent frame."""
    return x * (1 + scale[:, :, None]) + shift[:, :, None]


def gelu(x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
    """Returns the tanh form of GELU."""
    return nn.gelu(x, approximate=True)
