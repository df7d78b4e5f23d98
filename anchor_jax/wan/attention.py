"""Attention: who sees whom, and the two attention layers of a block."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct

from anchor_jax.wan import kernels
from anchor_jax.wan.layers import Dense, RmsNorm
from anchor_jax.wan.rope import Rotary, rotate, rotate_as
from anchor_jax.wan.spec import ModelConfig


@struct.dataclass
class LayersKV:
    """Keys and values, [(layer,) batch, frame, token, head, dim]."""

    k: jax.Array
    v: jax.Array


@struct.dataclass
class ContextKV:
    """A prompt projected for cross-attention, laid out for the kernel.

    Before that, and for kernels that read it so: [(layer,) batch, text, head, dim].
    """

    k: jax.Array
    v: jax.Array


@struct.dataclass
class Prefix:
    """Every query sees the first `frames` of the key frames; `frames` is traced."""

    frames: jax.Array

    def lay_out(self, kernel, past: LayersKV, own: int, turn: Rotary | None = None):
        """Returns remembered frames as the kernel reads them, keys at their positions.

        Layer by layer: with all layers at once there would be a second and a third
        copy of the cache.

        Args:
          kernel: one of `anchor_jax.wan.kernels`.
          past: [layer, ...] remembered frames.
          own: frames of the passes that will see them.
          turn: rotation of the keys; None if they are rotated.
        """
        tokens = own * past.k.shape[-3]

        def laid_out(x):
            return kernel.pad(kernel.lay_out(x), tokens)

        def turned(k):
            k = kernel.lay_out(k)
            return kernel.pad(k if by is None else rotate_as(k, *by), tokens)

        by = None
        if turn is not None:
            by = [kernel.lay_out(x[None, :, :, None]) for x in (turn.cos, turn.sin)]
        keys = jax.lax.map(turned, past.k)
        if kernel.in_place:
            return LayersKV(k=keys, v=laid_out(past.v))
        return LayersKV(k=keys, v=jax.lax.map(laid_out, past.v))

    def attend(self, kernel, q, k, v, past=None):
        """Returns [batch, frame, token, head, dim] attended values."""
        return _flat(kernel, q, k, v, past, self.frames * k.shape[2])


@struct.dataclass
class Spans:
    """Query frames by spans, each with the spans of key frames that it sees.

    `spans` holds (first, end, ((first, end), ...)) over frames and is static: no
    mask of tokens by tokens is ever made.
    """

    spans: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...] = struct.field(
        pytree_node=False
    )

    def attend(self, kernel, q, k, v, past=None):
        """Returns [batch, frame, token, head, dim] attended values."""
        if past is not None:
            past_k, past_v = past.one()
            k = jnp.concatenate([k, past_k.astype(k.dtype)], axis=1)
            v = jnp.concatenate([v, past_v.astype(v.dtype)], axis=1)
        out = []
        for first, end, keys in self.spans:
            pick = functools.partial(_frames, spans=keys)
            out.append(_flat(kernel, q[:, first:end], pick(k), pick(v)))
        return out[0] if len(out) == 1 else jnp.concatenate(out, axis=1)


def bidirectional(frames: int) -> Spans:
    """Returns spans in which every frame sees every frame."""
    return Spans(((0, frames, ((0, frames),)),))


def block_causal(blocks: tuple[int, ...], window: int | None = None) -> Spans:
    """Returns spans in which a block sees itself and what came before.

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


def _frames(x: jax.Array, spans) -> jax.Array:
    parts = [x[:, first:end] for first, end in spans]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def _flat(kernel, q, k, v, past=None, seen=None):
    frames, tokens = q.shape[1:3]
    q, k, v = (rearrange(x, "b f t h d -> b (f t) h d") for x in (q, k, v))
    out = kernels.attend(kernel, q, k, v, past, seen)
    return rearrange(out, "b (f t) h d -> b f t h d", f=frames, t=tokens)


class _Projections(nn.Module):
    """What the attention layers share."""

    config: ModelConfig
    kernel: Any = None

    def dense(self, name: str) -> Dense:
        config = self.config
        return Dense(config.dim, config.dtype, config.param_dtype, name=name)

    def norm(self, name: str) -> RmsNorm:
        config = self.config
        return RmsNorm(config.eps, config.dtype, config.param_dtype, name=name)

    def heads(self, x: jax.Array) -> jax.Array:
        return rearrange(x, "... (h d) -> ... h d", h=self.config.num_heads)


class SelfAttention(_Projections):
    """Attention over the pass's own frames and remembered ones.

    Remembered keys come already rotated; the own ones are rotated here, and returned
    unrotated for the cache.
    """

    @nn.compact
    def __call__(self, x, query_rope: Rotary, key_rope: Rotary, visible, past):
        q = self.heads(self.norm("norm_q")(self.dense("q")(x)))
        k = self.heads(self.norm("norm_k")(self.dense("k")(x)))
        v = self.heads(self.dense("v")(x))
        q, keys = rotate(q, query_rope), rotate(k, key_rope)
        out = visible.attend(self.kernel, q, keys, v, past)
        out = self.dense("o")(rearrange(out, "... h d -> ... (h d)"))
        return out, LayersKV(k=k, v=v)


class CrossAttention(_Projections):
    """Attention to the prompt. Padded text positions take part, as in Wan2.1.

    A context whose batch is a multiple of the video's holds several prompts in a
    row for each video: its frames are split evenly among them.
    """

    @nn.compact
    def __call__(self, x, context: ContextKV):
        frames = x.shape[1]
        groups = context.k.shape[0] // x.shape[0]
        q = self.heads(self.norm("norm_q")(self.dense("q")(x)))
        q = rearrange(q, "b (g f) t h d -> (b g) (f t) h d", g=groups)
        out = kernels.attend(self.kernel, q, None, None, context)
        out = rearrange(
            out, "(b g) (f t) h d -> b (g f) t (h d)", g=groups, f=frames // groups
        )
        return self.dense("o")(out)


class ContextLayer(_Projections):
    """Keys and values of one layer's cross-attention."""

    @nn.compact
    def __call__(self, carry, text):
        k = self.heads(self.norm("norm_k")(self.dense("k")(text)))
        return carry, ContextKV(k=k, v=self.heads(self.dense("v")(text)))
