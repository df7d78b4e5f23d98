"""Small layers shared by the Wan2.1 networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from anchor_jax import sharding
from anchor_jax.axes import Array, Tokens


class Dense(nn.Module):
    """A linear layer; adds a low-rank update if the collection `lora` holds one.

    y = x W + b + (x A) B, with the update's scale folded into B.

    Source: wan/README.md, "LoRA"; LoRA (arXiv:2106.09685).
    """

    features: int
    dtype: str
    param_dtype: str
    init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*axes wide"]
    ) -> Float[Array, "*axes {self.features}"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.init, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], self.param_dtype)
        x = x.astype(self.dtype)
        y = x @ self._whole("kernel", kernel) + bias.astype(self.dtype)
        if self.has_variable("lora", "a"):
            down, up = (
                self._whole(name, self.get_variable("lora", name), sharding.LORA)
                for name in ("a", "b")
            )
            y = y + (x @ down) @ up
        return y

    def _whole(self, name: str, value: jax.Array, placements=sharding.GENERATOR):
        path = (*self.path, name)
        return sharding.gathered(value.astype(self.dtype), path, placements)


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last axis; rounds before the weight.

    Source: wan/README.md, "Transformer block".
    """

    eps: float
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
        ones = nn.initializers.ones
        scale = self.param("scale", ones, x.shape[-1:], self.param_dtype)
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        y = (x32 * jax.lax.rsqrt(mean + self.eps)).astype(self.dtype)
        return y * scale.astype(self.dtype)


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
        scale = self.param("scale", ones, x.shape[-1:], self.param_dtype)
        bias = self.param("bias", zeros, x.shape[-1:], self.param_dtype)
        y = layer_norm(x.astype(jnp.float32), self.eps)
        return (y * scale + bias).astype(x.dtype)


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
