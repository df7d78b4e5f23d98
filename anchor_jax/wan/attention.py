"""Attention: the visible keys of each query, and a block's two attention layers."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jaxtyping import Float

from anchor_jax import parallel
from anchor_jax.axes import Array, Number, Tokens
from anchor_jax.wan import kernels
from anchor_jax.wan.layers import Dense, RmsNorm
from anchor_jax.wan.rope import Rotary, rotate
from anchor_jax.wan.spec import ModelConfig

OwnTokens = Float[Array, "batch own token dim"]


@struct.dataclass
class LayersKV:
    """Keys and values of one layer, or of all layers along a leading axis.

    They are token-major, as the projections write them: heads are adjacent in `dim`.
    """

    k: Float[Array, "*layer batch frame token dim"]
    v: Float[Array, "*layer batch frame token dim"]


@struct.dataclass
class ContextKV(kernels.LaidOut):
    """A prompt projected for cross-attention, laid out for the kernel."""


@struct.dataclass
class Prefix:
    """Every query sees the first `frames` of the key frames; `frames` is traced."""

    frames: Number

    def attend(
        self,
        attention: Callable,
        q: Tokens,
        k: OwnTokens,
        v: OwnTokens,
        past: kernels.Remembered = None,
    ) -> Tokens:
        """Returns attended values.

        Args:
          attention: `kernels.attend` with its kernel and size of a head.
          q: queries.
          k: the pass's own keys, rotated.
          v: the pass's own values.
          past: past keys and values, from `anchor_jax.cache.memory`.
        """
        return _flat(attention, q, k, v, past, self.frames * k.shape[2])


@struct.dataclass
class Spans:
    """Query frames by spans, each with the spans of key frames that it sees.

    `spans` holds (first, end, ((first, end), ...)) over frames and is static. Therefore
    no token-by-token mask is needed.
    """

    spans: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...] = struct.field(
        pytree_node=False
    )

    def attend(
        self,
        attention: Callable,
        q: Tokens,
        k: OwnTokens,
        v: OwnTokens,
        past: kernels.Remembered = None,
    ) -> Tokens:
        """Returns attended values, like `Prefix`."""
        if past is not None:
            past_k, past_v = past.one()
            k = jnp.concatenate([k, past_k.astype(k.dtype)], axis=1)
            v = jnp.concatenate([v, past_v.astype(v.dtype)], axis=1)
        out = []
        for first, end, keys in self.spans:
            pick = functools.partial(_frames, spans=keys)
            out.append(_flat(attention, q[:, first:end], pick(k), pick(v)))
        return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def bidirectional(frames: int) -> Spans:
    """Returns spans in which every frame sees every frame."""
    return Spans(((0, frames, ((0, frames),)),))


def block_causal(blocks: tuple[int, ...], window: int | None = None) -> Spans:
    """Returns spans in which a block sees itself and all earlier frames.

    Args:
      blocks: latent frames of each block, in order; an independent first frame is a
        first block of 1.
      window: if given, keys earlier than this many frames before the block's end
        are not seen.

    Source: training/README.md, "Who sees whom".
    """
    spans, first = [], 0
    for size in blocks:
        end = first + size
        oldest = 0 if window is None else max(0, end - window)
        spans.append((first, end, ((oldest, end),)))
        first = end
    return Spans(tuple(spans))


def teacher_forcing(blocks: tuple[int, ...]) -> Spans:
    """Returns spans over a clean copy of the frames followed by the noisy ones.

    Clean blocks are block-causal among themselves; a noisy block sees the clean
    blocks before it and itself. Both halves take the same RoPE positions.
    """
    clean = block_causal(blocks).spans
    frames = sum(blocks)
    noisy = []
    for first, end, _ in clean:
        own = (frames + first, frames + end)
        noisy.append((*own, ((0, first), own) if first else (own,)))
    return Spans((*clean, *noisy))


def _frames(x: Tokens, spans) -> jax.Array:
    parts = [x[:, first:end] for first, end in spans]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _flat(attention, q, k, v, past=None, seen=None):
    shape = q.shape
    q, k, v = (rearrange(x, "b f t d -> b (f t) d") for x in (q, k, v))
    return attention(q, k, v, past, seen).reshape(shape)


class _Projections(nn.Module):
    """Base of the attention layers."""

    config: ModelConfig
    kernel: Any = None

    def dense(self, name: str) -> Dense:
        config = self.config
        split = "in" if name == "o" else "out"
        return Dense(
            config.dim, config.dtype, config.param_dtype, split=split, name=name
        )

    def norm(self, name: str) -> RmsNorm:
        config = self.config
        return RmsNorm(config.eps, config.dtype, config.param_dtype, name=name)

    @property
    def attention(self):
        """Attention with the kernel and the model's size of a head."""
        head_dim = self.config.head_dim
        return functools.partial(kernels.attend, self.kernel, head_dim)


class SelfAttention(_Projections):
    """Attention over the pass's own frames and past frames.

    Past keys are already rotated. Own keys are rotated here, and returned unrotated for
    the cache.
    """

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        query_rope: Rotary,
        key_rope: Rotary,
        visible: Prefix | Spans,
        past: kernels.Remembered,
    ) -> tuple[Tokens, LayersKV]:
        q = self.norm("norm_q")(self.dense("q")(x))
        k = self.norm("norm_k")(self.dense("k")(x))
        q, k, v = (parallel.to_heads(one) for one in (q, k, self.dense("v")(x)))
        q, keys = rotate(q, query_rope), rotate(k, key_rope)
        out = visible.attend(self.attention, q, keys, v, past)
        return self.dense("o")(parallel.to_tokens(out)), LayersKV(k=k, v=v)


class CrossAttention(_Projections):
    """Attention to the prompt. Padded text positions take part, as in Wan2.1.

    A context whose batch is a multiple of the video's holds several prompts in a
    row for each video: its frames are split evenly among them.
    """

    @nn.compact
    def __call__(self, x: Tokens, context: ContextKV) -> Tokens:
        frames = x.shape[1]
        groups = context.k.shape[0] // x.shape[0]
        q = parallel.to_heads(self.norm("norm_q")(self.dense("q")(x)))
        q = rearrange(q, "b (g f) t d -> (b g) (f t) d", g=groups)
        out = self.attention(q, None, None, context)
        out = rearrange(
            out, "(b g) (f t) d -> b (g f) t d", g=groups, f=frames // groups
        )
        return self.dense("o")(parallel.to_tokens(out))


class ContextLayer(_Projections):
    """Keys and values of one layer's cross-attention."""

    @nn.compact
    def __call__(
        self, carry: None, text: Float[Array, "batch text dim"]
    ) -> tuple[None, ContextKV]:
        k, v = self.norm("norm_k")(self.dense("k")(text)), self.dense("v")(text)
        return carry, ContextKV(k=parallel.to_heads(k), v=parallel.to_heads(v))
