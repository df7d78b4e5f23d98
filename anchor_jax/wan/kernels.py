"""Attention kernels: one interface, and which of them suits which machine.

A kernel is static: a frozen object with

* `lay_out(x, own)`: remembered keys or values, [layer, batch, frame, token, head, dim],
  in the order of axes that the kernel reads, done once for all passes of a block whose
  own frames have `own` tokens;
* `attend(q, k, v, past, seen)`: q, k, v [batch, token, head, dim] in, and
  [batch, token, head, dim] out. Keys are the pass's own, then those of `past`, one
  layer of what `lay_out` gave; of these the first `seen` (traced) are visible;
* `refuses(dtype, head_dim)`: why it cannot serve such a model, or nothing.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange

from anchor_jax.errors import UserError, suggest

_LANES = 128
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Plain:
    """Attention as XLA makes it: any machine, any size; holds the score matrix."""

    implementation = "xla"

    def refuses(self, dtype: str, head_dim: int) -> str:
        del dtype, head_dim
        return ""

    def lay_out(self, x: jax.Array, own: int) -> jax.Array:
        del own
        return rearrange(x, "... f t h d -> ... (f t) h d")

    def attend(self, q, k, v, past=None, seen=None):
        if past is not None:
            k = jnp.concatenate([k, past.k.astype(k.dtype)], axis=1)
            v = jnp.concatenate([v, past.v.astype(v.dtype)], axis=1)
        if seen is not None:
            seen = jnp.full(q.shape[:1], seen, jnp.int32)
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=seen, implementation=self.implementation
        )


@dataclasses.dataclass(frozen=True)
class Cudnn(Plain):
    """cuDNN's fused attention, for NVIDIA: no score matrix in memory."""

    implementation = "cudnn"

    def refuses(self, dtype: str, head_dim: int) -> str:
        if dtype not in ("bfloat16", "float16"):
            return f"it computes in bfloat16 or float16, not {dtype}"
        if head_dim > 128 or head_dim % 8:
            return f"a head of {head_dim} is not a multiple of 8 up to 128"
        return ""


@dataclasses.dataclass(frozen=True)
class Heads:
    """One head at a time, for CPU: a head's scores stay in the cache.

    What is not visible is not computed, in steps of the pass's own size; under `vmap`
    all steps run. Fewer than `least` scores a head go to `Plain`.
    """

    least: int = 2**16

    def refuses(self, dtype: str, head_dim: int) -> str:
        del dtype, head_dim
        return ""

    def lay_out(self, x: jax.Array, own: int) -> jax.Array:
        del own
        return rearrange(x, "... f t h d -> ... h (f t) d")

    def attend(self, q, k, v, past=None, seen=None):
        if past is not None and not past.k.shape[2]:
            past = None
        keys = k.shape[1] + (past.k.shape[2] if past is not None else 0)
        if q.shape[1] * keys < self.least:
            return Plain().attend(q, k, v, _by_token(past), seen)
        batch = q.shape[0]
        scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
        flat = [rearrange(x, "b t h d -> (b h) t d") for x in (scaled, k, v)]
        if past is not None:
            own = flat[1].shape[1]
            flat += [rearrange(x, "b h t d -> (b h) t d") for x in (past.k, past.v)]
            shown = jnp.int32(keys - own) if seen is None else seen - own
            out = _shown_part(*flat, shown)
        else:
            shown = keys if seen is None else seen
            own_bias = None if seen is None else _bias(keys, shown, jnp.float32)
            out = jax.lax.map(lambda x: _one_head(*x, own_bias=own_bias), tuple(flat))
        return rearrange(out, "(b h) t d -> b t h d", b=batch)


@dataclasses.dataclass(frozen=True)
class Splash:
    """Pallas' splash attention, for TPU: no score matrix in memory.

    Source: jax.experimental.pallas.ops.tpu.splash_attention.
    """

    interpret: bool = False
    most_queries: int = 2560
    most_keys: int = 1024

    def refuses(self, dtype: str, head_dim: int) -> str:
        if dtype not in ("bfloat16", "float32"):
            return f"it computes in bfloat16 or float32, not {dtype}"
        if head_dim % _LANES:
            return f"a head of {head_dim} is not a multiple of {_LANES}"
        return ""

    def lay_out(self, x: jax.Array, own: int) -> jax.Array:
        x = rearrange(x, "... f t h d -> ... h (f t) d")
        whole = own + x.shape[-2]
        return _padded(x, _tile(whole, self.most_keys)[1] - own)

    def attend(self, q, k, v, past=None, seen=None):
        queries, keys = q.shape[1], k.shape[1]
        scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
        q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q * scale, k, v))
        if past is None:
            tile, whole = _tile(keys, self.most_keys)
            k, v = _padded(k, whole), _padded(v, whole)
            seen = keys if seen is None else seen
        else:
            k = jnp.concatenate([k, past.k.astype(k.dtype)], axis=2)
            v = jnp.concatenate([v, past.v.astype(v.dtype)], axis=2)
            tile = _tile(k.shape[2], self.most_keys)[0]
        rows, padded = _tile(queries, self.most_queries)
        kernel = self._kernel(q.shape[1], padded, k.shape[2], rows, tile)
        limit = None if seen is None else jnp.asarray(seen)
        out = kernel(_padded(q, padded), k, v, limit)
        return rearrange(out[:, :, :queries], "b h t d -> b t h d")

    def _kernel(self, heads: int, queries: int, keys: int, rows: int, tile: int):
        """Returns the kernel over a batch; its last argument is what is visible."""
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel as splash,
        )
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_mask as masks,
        )

        inner = math.gcd(tile, 512)
        back, back_keys = math.gcd(rows, 1024), math.gcd(tile, 1024)
        sizes = splash.BlockSizes(
            block_q=rows,
            block_kv=tile,
            block_kv_compute=inner,
            block_q_dkv=back,
            block_kv_dkv=back_keys,
            block_kv_dkv_compute=inner,
            block_q_dq=back,
            block_kv_dq=back_keys,
        )
        mask = masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads)
        kernel = splash.make_splash_mha(
            mask,
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=self.interpret,
        )

        def attend(q, k, v, seen):
            ids = None
            if seen is not None:
                visible = (jnp.arange(keys) < seen).astype(jnp.int32)
                ids = splash.SegmentIds(q=jnp.ones(queries, jnp.int32), kv=visible)
            return jax.vmap(functools.partial(kernel, segment_ids=ids))(q, k, v)

        return attend


KERNELS = {"plain": Plain(), "heads": Heads(), "cudnn": Cudnn(), "splash": Splash()}
PREFERRED = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "cpu": "heads"}


def choose(platform: str, dtype: str, head_dim: int):
    """Returns the kernel for a machine and a model: the fastest that can serve it."""
    kernel = KERNELS[PREFERRED.get(platform, "plain")]
    return KERNELS["plain"] if kernel.refuses(dtype, head_dim) else kernel


def named(name: str, dtype: str, head_dim: int):
    """Returns the kernel of a name; None for `auto`, which is chosen by the machine.

    Raises:
      UserError: There is no such kernel, or it cannot serve the model.
    """
    if name == "auto":
        return None
    if name not in KERNELS:
        known = ["auto", *KERNELS]
        raise UserError(f"attention={name!r}{suggest(name, known, 'kernels')}")
    reason = KERNELS[name].refuses(dtype, head_dim)
    if reason:
        raise UserError(f"attention={name!r}: {reason}; choose auto or plain")
    return KERNELS[name]


def _by_token(past):
    """Returns the layout of `Heads` as that of `Plain`."""
    if past is None:
        return None
    return jax.tree.map(lambda x: rearrange(x, "b h t d -> b t h d"), past)


def _shown_part(q, k, v, past_k, past_v, shown):
    """Returns attention over own keys and the first `shown` remembered ones.

    Args:
      q: [head, query, dim], scaled.
      k: [head, own, dim].
      v: as `k`.
      past_k: [head, key, dim].
      past_v: as `past_k`.
      shown: traced.
    """
    size = past_k.shape[1]
    unit = math.gcd(k.shape[1], size)
    steps = size // unit if size // unit <= 8 else 1
    unit = size // steps

    def part(count: int):
        def run():
            ends = (past_k[:, : count * unit], past_v[:, : count * unit])
            bias = _bias(count * unit, shown, jnp.float32)
            each = (q, k, v, *ends) if count else (q, k, v)
            return jax.lax.map(lambda x: _one_head(*x, bias=bias), each)

        return run

    used = jnp.clip(-(-shown // unit), 0, steps)
    return jax.lax.switch(used, [part(count) for count in range(steps + 1)])


def _bias(size: int, shown, dtype) -> jax.Array:
    return jnp.where(jnp.arange(size) < shown, 0.0, _HIDDEN).astype(dtype)


def _one_head(q, k, v, past_k=None, past_v=None, *, bias=None, own_bias=None):
    """Returns [query, dim], of one head; own and past keys share one softmax."""
    scores = [_dot(q, k) if own_bias is None else _dot(q, k) + own_bias]
    values = [v]
    if past_k is not None:
        scores.append(_dot(q, past_k.astype(q.dtype)) + bias)
        values.append(past_v.astype(v.dtype))
    tops = [jnp.max(part, axis=-1, keepdims=True) for part in scores]
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    weights = [jnp.exp(part - top) for part in scores]
    whole = sum(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
    mixed = sum(
        jnp.matmul(part.astype(v.dtype), value, preferred_element_type=jnp.float32)
        for part, value in zip(weights, values, strict=True)
    )
    return (mixed / whole).astype(v.dtype)


def _dot(q, k):
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(q, k, contract, preferred_element_type=jnp.float32)


def _tile(length: int, most: int) -> tuple[int, int]:
    """Returns a tile of whole lanes up to `most`, and the length in whole tiles.

    The least padding wins, then the largest tile; small tiles count as padding, since
    they read the other side again and again.
    """
    tiles = range(_LANES, max(_LANES, most) + 1, _LANES)

    def cost(tile: int):
        padded = -(-length // tile) * tile
        return padded * max(1.0, 512 / tile), -tile

    best = min(tiles, key=cost)
    return best, -(-length // best) * best


def _padded(x: jax.Array, length: int) -> jax.Array:
    """Returns `x` with zeros after its tokens, the last axis but one."""
    missing = length - x.shape[-2]
    if not missing:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])
