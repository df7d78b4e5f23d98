"""The umT5 text encoder, from token ids of prompts to conditioning."""

import dataclasses

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from anchor_jax.axes import Array
from anchor_jax.wan.spec import WAN_2_1

TextTokens = Float[Array, "batch text dim"]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of a umT5 encoder; the defaults are those of UMT5-XXL.

    `dtype` is the type of activations, and `param_dtype` the type of weights. `unroll`
    is the number of layers per iteration of the scan over layers.
    """

    vocab: int = 256384
    dim: int = WAN_2_1.text_dim
    attention_dim: int = 4096
    ffn_dim: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    text_len: int = WAN_2_1.text_len
    eps: float = 1e-6
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    unroll: int = 1

    def __post_init__(self):
        if self.attention_dim % self.num_heads:
            raise ValueError(
                f"attention_dim={self.attention_dim} must be a multiple of"
                f" num_heads={self.num_heads}; change one of the two"
            )
        if self.num_buckets < 4 or self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"num_buckets={self.num_buckets} must be at least 4, and"
                f" max_distance={self.max_distance} more than a quarter of it"
            )

    @property
    def head_dim(self) -> int:
        return self.attention_dim // self.num_heads


def relative_bucket(
    distance: Int[Array, "*axes"], num_buckets: int = 32, max_distance: int = 128
) -> Int[Array, "*axes"]:
    """Returns the bucket of each distance (key position minus query position), int32.

    The upper half of the buckets is for keys after the query. In each half, the first
    half of the buckets holds one distance each. The others grow logarithmically, and
    the last holds all distances from about `max_distance`.

    Source: T5 (arXiv:1910.10683), section 2.1; wan/README.md, "Text encoder".
    """
    half, exact = num_buckets // 2, num_buckets // 4
    distance = np.asarray(distance)
    size = np.abs(distance)
    # Float32 as in the original: at a boundary another precision may round the other
    # way, and select the wrong row of the learned table.
    ratio = np.log(np.maximum(size, exact).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    bucket = np.where(size < exact, size, far) + half * (distance > 0)
    return bucket.astype(np.int32)


def _normal(stddev: float) -> nn.initializers.Initializer:
    return nn.initializers.normal(stddev)


def _dense(config: TextConfig, features: int, stddev: float, name: str) -> nn.Dense:
    """Returns a bias-free linear layer with weights drawn at `stddev`."""
    return nn.Dense(
        features,
        use_bias=False,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=_normal(stddev),
        name=name,
    )


class Umt5Norm(nn.Module):
    """Root-mean-square norm: formed in float32, rounded, then scaled."""

    config: TextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*axes"]) -> Float[Array, "*axes"]:
        config = self.config
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self._held())
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + config.eps)
        return normed.astype(config.dtype) * scale.astype(config.dtype)

    def _held(self):
        return jnp.dtype(self.config.param_dtype)


class Umt5Attention(nn.Module):
    """Self-attention without the usual division by the root of the head width.

    Source: wan/README.md, "Text encoder". Weights start as in T5: the missing division
    is in the scale of q.
    """

    config: TextConfig

    @nn.compact
    def __call__(
        self, x: TextTokens, bias: Float[Array, "batch head text text"]
    ) -> TextTokens:
        """Returns the attended tokens; the last two axes of bias are query and key."""
        config = self.config
        inner, std = config.attention_dim, config.dim**-0.5
        q = _dense(config, inner, std * config.head_dim**-0.5, "q")(x)
        k = _dense(config, inner, std, "k")(x)
        v = _dense(config, inner, std, "v")(x)
        q, k, v = (
            einops.rearrange(part, "b t (h d) -> b t h d", h=config.num_heads)
            for part in (q, k, v)
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias
        weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(v.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        mixed = einops.rearrange(mixed, "b t h d -> b t (h d)")
        return _dense(config, config.dim, inner**-0.5, "o")(mixed)


class Umt5FeedForward(nn.Module):
    """The gated feed-forward layer: fc2(fc1(x) * gelu(gate(x)))."""

    config: TextConfig

    @nn.compact
    def __call__(self, x: TextTokens) -> TextTokens:
        config = self.config
        width, std = config.ffn_dim, config.dim**-0.5
        gate = nn.gelu(_dense(config, width, std, "gate")(x), approximate=True)
        hidden = _dense(config, width, std, "fc1")(x) * gate
        return _dense(config, config.dim, width**-0.5, "fc2")(hidden)


class Umt5Block(nn.Module):
    """One encoder layer in the form of `nn.scan`."""

    config: TextConfig

    @nn.compact
    def __call__(
        self,
        x: TextTokens,
        mask: Bool[Array, "batch text"],
        buckets: Int[Array, "text text"],
    ) -> tuple[TextTokens, None]:
        """Runs one layer.

        Args:
          x: Activations.
          mask: false at padding.
          buckets: the bucket of each pair of a query and a key.
        """
        bias = self._bias(mask, buckets)
        normed = Umt5Norm(self.config, name="norm1")(x)
        x = x + Umt5Attention(self.config, name="attn")(normed, bias)
        normed = Umt5Norm(self.config, name="norm2")(x)
        x = x + Umt5FeedForward(self.config, name="ffn")(normed)
        self.sow("intermediates", "output", x)
        return x, None

    def _bias(
        self, mask: Bool[Array, "batch text"], buckets: Int[Array, "text text"]
    ) -> Float[Array, "batch head text text"]:
        """Returns the bias of the logits.

        A masked key gets the most negative finite number in place of its bias.
        """
        config = self.config
        table = nn.Embed(
            config.num_buckets,
            config.num_heads,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=_normal(config.dim**-0.5),
            name="position_bias",
        )
        bias = einops.rearrange(table(buckets), "q k h -> 1 h q k")
        self.sow("intermediates", "bias", bias)
        lowest = jnp.finfo(bias.dtype).min
        return jnp.where(mask[:, None, None, :], bias, lowest)


class Umt5Encoder(nn.Module):
    """The umT5 encoder; each layer has its own relative-position table.

    With the collection `intermediates` mutable it also records `embedded`, per layer
    `blocks/bias` and `blocks/output` (layers leading), and `encoded`, the output before
    padded rows are zeroed.

    Source: wan/README.md, "Text encoder"; mT5 (arXiv:2010.11934), UniMax
    (arXiv:2304.09151).
    """

    config: TextConfig

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch text"],
        mask: Int[Array, "batch text"] | Bool[Array, "batch text"],
    ) -> TextTokens:
        """Returns the conditioning; rows of padding are zero.

        Args:
          ids: token ids, padded on the right.
          mask: 1 at tokens and 0 at padding.
        """
        config = self.config
        mask = mask.astype(bool)
        x = self._embed(ids)
        self.sow("intermediates", "embedded", x)
        blocks = nn.scan(
            Umt5Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.num_layers,
            unroll=min(config.unroll, config.num_layers),
        )(config, name="blocks")
        x, _ = blocks(x, mask, self._buckets(ids.shape[1]))
        x = Umt5Norm(config, name="norm")(x)
        self.sow("intermediates", "encoded", x)
        return jnp.where(mask[:, :, None], x, jnp.zeros_like(x))

    def _embed(self, ids: Int[Array, "batch text"]) -> TextTokens:
        """Returns the token embeddings."""
        config = self.config
        return nn.Embed(
            config.vocab,
            config.dim,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            embedding_init=_normal(1.0),
            name="token_embedding",
        )(ids)

    def _buckets(self, length: int) -> Int[Array, "query key"]:
        """Returns the bucket of key minus query."""
        place = np.arange(length)
        distance = place[None, :] - place[:, None]
        config = self.config
        return jnp.asarray(
            relative_bucket(distance, config.num_buckets, config.max_distance)
        )
