"""The Wan2.1 transformer, the module of generator, real score and fake score."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float, Int

from anchor_jax import parallel
from anchor_jax.axes import (
    Array,
    Embedding,
    Latents,
    Number,
    Params,
    RandomKey,
    Tokens,
)
from anchor_jax.wan import kernels, rope
from anchor_jax.wan.attention import (
    ContextKV,
    ContextLayer,
    CrossAttention,
    LayersKV,
    Prefix,
    SelfAttention,
    Spans,
    bidirectional,
)
from anchor_jax.wan.layers import AffineNorm, Dense, gelu, layer_norm, modulate, weight
from anchor_jax.wan.spec import ModelConfig


class TransformerBlock(nn.Module):
    """One transformer block.

    Source: wan/README.md, "Transformer block".
    """

    config: ModelConfig
    kernel: Any

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        layer: tuple[ContextKV, Number],
        time: Float[Array, "batch frame 6 dim"],
        query_rope: rope.Rotary,
        key_rope: rope.Rotary,
        visible: Prefix | Spans,
        past: kernels.LaidOut | LayersKV | None,
    ) -> tuple[Tokens, LayersKV]:
        config = self.config
        context, number = layer
        if past is not None:
            past = kernels.PastLayer(past.k, past.v, number)
        normal = nn.initializers.normal(config.dim**-0.5)
        table = weight(self, "modulation", normal, (6, config.dim), config.param_dtype)
        time = time + parallel.whole(table, config.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = (time[:, :, i] for i in range(6))

        h = modulate(layer_norm(x, config.eps), shift1, scale1)
        attend = SelfAttention(config, self.kernel, name="self_attn")
        y, own = attend(h, query_rope, key_rope, visible, past)
        self.sow("intermediates", "self_attn_out", y)
        x = x + y * gate1[:, :, None]

        h = AffineNorm(config.eps, config.param_dtype, name="norm3")(x)
        y = CrossAttention(config, self.kernel, name="cross_attn")(h, context)
        self.sow("intermediates", "cross_attn_out", y)
        x = x + y

        h = modulate(layer_norm(x, config.eps), shift2, scale2)
        dense = functools.partial(
            Dense, dtype=config.dtype, param_dtype=config.param_dtype
        )
        h = gelu(dense(config.ffn_dim, split="out", name="ffn_in")(h))
        y = dense(config.dim, split="in", name="ffn_out")(h)
        self.sow("intermediates", "ffn", y)
        x = x + y * gate2[:, :, None]
        self.sow("intermediates", "out", x)
        return x, own


class Head(nn.Module):
    """Modulated projection to the patch's latent channels.

    Source: wan/README.md, "Head".
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Tokens, time: Float[Array, "batch frame dim"]
    ) -> Float[Array, "batch frame token patch"]:
        config = self.config
        normal = nn.initializers.normal(config.dim**-0.5)
        table = weight(self, "modulation", normal, (2, config.dim), config.param_dtype)
        table = parallel.whole(table, config.dtype)
        shift, scale = (time + table[i] for i in range(2))
        x = modulate(layer_norm(x, config.eps), shift, scale)
        features = config.patch_size * config.latent_channels
        zeros = nn.initializers.zeros
        return Dense(features, config.dtype, config.param_dtype, zeros, name="out")(x)


class WanDit(nn.Module):
    """Predicts the flow of noisy latents.

    The module reads past keys and values and returns its own; it never writes a cache.
    An object describes what a pass sees: `Prefix` over own | past when streaming,
    `Spans` for whole sequences (bidirectional, block-causal, teacher forcing). `kernel`
    is one of `anchor_jax.wan.kernels`; None takes the best for this machine.
    """

    config: ModelConfig
    kernel: Any = None

    def setup(self) -> None:
        config = self.config
        dtypes = (config.dtype, config.param_dtype)
        small = nn.initializers.normal(0.02)
        self.patch_embed = Dense(config.dim, *dtypes)
        self.text_in = Dense(config.dim, *dtypes, small)
        self.text_out = Dense(config.dim, *dtypes, small)
        self.time_in = Dense(config.dim, *dtypes, small)
        self.time_out = Dense(config.dim, *dtypes, small)
        self.time_projection = Dense(6 * config.dim, *dtypes)
        self.context = _over_layers(ContextLayer, config, (nn.broadcast,))(config)
        axes = (0, *[nn.broadcast] * 5)
        block = _over_layers(_remat(TransformerBlock, config), config, axes)
        self.blocks = block(config, self.attention)
        self.head = Head(config)

    @property
    def attention(self) -> Any:
        """The kernel in use."""
        config = self.config
        if self.kernel is not None:
            return self.kernel
        return kernels.choose(jax.default_backend(), config.dtype, config.head_dim)

    def project(self, embedding: Embedding) -> ContextKV:
        """Returns a prompt's keys and values in every layer.

        Rows of the embedding past the prompt's end are zero and are attended to, as in
        Wan2.1.
        """
        embedding = parallel.own_tokens(embedding, axis=1)
        text = self.text_out(gelu(self.text_in(embedding)))
        self.sow("intermediates", "text_embedding", text)
        context = self.context(None, text)[1]
        lay_out, head_dim = self.attention.lay_out, self.config.head_dim
        return jax.tree.map(lambda x: lay_out(x[:, :, None], head_dim), context)

    def __call__(
        self,
        latents: Latents,
        timestep: Float[Array, "batch frame"],
        context: ContextKV,
        visible: Prefix | Spans,
        query_position: Int[Array, " frame"],
        key_position: Int[Array, " frame"] | None = None,
        past: kernels.LaidOut | LayersKV | None = None,
    ) -> tuple[Latents, LayersKV]:
        """Returns the predicted flow and the pass's own keys and values, unrotated.

        Args:
          latents: noisy latents.
          timestep: 1000 sigma.
          context: the prompt, from `project`.
          visible: `Prefix` or `Spans`, over own frames followed by past ones.
          query_position: temporal RoPE index of each frame.
          key_position: the same for the keys. None takes `query_position`.
          past: past frames of every layer, with rotated keys: for `Prefix` from
            `anchor_jax.cache.memory.lay_out`, for `Spans` as they are stored.
        """
        config = self.config
        _, rows, columns = config.patch
        tokens = latents.shape[2] // rows, latents.shape[3] // columns
        x = rearrange(
            latents, "b f (h p) (w q) c -> b f (h w) (p q c)", p=rows, q=columns
        )
        x = self.patch_embed(parallel.own_tokens(x, axis=2))
        self.sow("intermediates", "patch_embedding", x)
        time, modulation = self._time(timestep)

        def rotation(position):
            return rope.rotary(position, tokens, config.head_dim, config.rope_theta)

        query_rope = rotation(query_position)
        key_rope = query_rope if key_position is None else rotation(key_position)
        numbers = jnp.arange(config.num_layers)
        x, own = self.blocks(
            x, (context, numbers), modulation, query_rope, key_rope, visible, past
        )
        y = parallel.all_tokens(self.head(x, time), axis=2)
        self.sow("intermediates", "head_out", y)
        return unpatchify(y, tokens, config.patch), own

    def _time(self, timestep):
        config = self.config
        wave = rope.timestep_sinusoid(timestep, config.freq_dim)
        time = self.time_out(nn.silu(self.time_in(wave.astype(config.dtype))))
        modulation = self.time_projection(nn.silu(time))
        self.sow("intermediates", "time_embedding", time)
        self.sow("intermediates", "time_projection_out", modulation)
        return time, rearrange(modulation, "b f (n c) -> b f n c", n=6)


def unpatchify(
    y: Float[Array, "batch frame token patch"],
    tokens: tuple[int, int],
    patch: tuple[int, int, int],
) -> Latents:
    """Returns the head's output as latents.

    Source: wan/README.md, "Unpatchify"; the channel is the fastest index of a token.
    """
    return rearrange(
        y,
        "b f (h w) (p q c) -> b f (h p) (w q) c",
        h=tokens[0],
        w=tokens[1],
        p=patch[1],
        q=patch[2],
    )


def init_params(config: ModelConfig, rng: RandomKey) -> Params:
    """Returns a fresh parameter tree; use under `jax.eval_shape` for its shapes."""
    _, rows, columns = config.patch
    latents = jnp.zeros((1, 1, rows, columns, config.latent_channels), config.dtype)
    text = jnp.zeros((1, config.text_len, config.text_dim), config.dtype)

    def both(module, latents, timestep, text):
        position = jnp.zeros(1, jnp.int32)
        context = module.project(text)
        return module(latents, timestep, context, bidirectional(1), position)

    timestep = jnp.zeros((1, 1), jnp.float32)
    return WanDit(config).init(rng, latents, timestep, text, method=both)["params"]


def _remat(block, config: ModelConfig):
    if config.remat == "none":
        return block
    policy = getattr(jax.checkpoint_policies, config.remat)
    return nn.remat(block, prevent_cse=False, policy=policy)


def _over_layers(block, config: ModelConfig, axes):
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=axes,
        length=config.num_layers,
        unroll=min(config.unroll, config.num_layers),
    )
