"""Attention kernels with one interface, and the choice of a kernel for a machine.

Arrays are token-major, as the projections write them: `Flat`, with the heads
adjacent in `dim`. A kernel is static: a frozen object with

* `lay_out(x, head_dim)`: remembered keys or values, [..., batch, frame, token, dim],
  in the order of axes that the kernel reads; tokens are the last axis but one.
  If `in_place`, this moves no data. `pad(x, own)`: the same, with room to whole
  tiles after the pass's `own` tokens. Both are done once for all passes of a block;
* `attend(head_dim, q, k, v, past, seen)`: the attended values of the queries. Keys are
  the pass's own, then those of `past`: one layer of what was laid out, or a
  `PastLayer`. The first `seen` (traced) are visible. Without k and v all keys are of
  `past`, with nothing padded;
* `split(videos, heads)`: how a layer of what was laid out is split over mesh axes;
* `refuses(dtype, head_dim)`: why it cannot serve such a model, or "".

Networks call `attend` of this module, which gives each device of a mesh its videos and
heads: compilers do not split a kernel by themselves.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from anchor_jax.axes import Array, Number
from anchor_jax.errors import UserError, suggest

_LANES = 128
_HIDDEN = -1e30

Flat = Float[Array, "batch token dim"]
Own = Float[Array, "batch own dim"]
LaidOutArray = Float[Array, "*axes token dim"]


@struct.dataclass
class LaidOut:
    """Keys and values in the order of axes that a kernel reads.

    Where heads have an axis of their own, it is one of `axes`, and `dim` is a head's.
    """

    k: LaidOutArray
    v: LaidOutArray


@struct.dataclass
class PastLayer:
    """Past keys and values of all layers, laid out, and the number of a layer."""

    k: Float[Array, "layer *axes token dim"]
    v: Float[Array, "layer *axes token dim"]
    layer: Number

    def one(self) -> tuple[LaidOutArray, LaidOutArray]:
        """Returns the keys and values of the layer."""
        pick = jax.lax.dynamic_index_in_dim
        return tuple(pick(x, self.layer, keepdims=False) for x in (self.k, self.v))


Remembered = LaidOut | PastLayer | None


class _Kernel:
    """Base of kernels: by default they serve every model and pad nothing."""

    def refuses(self, dtype: str, head_dim: int) -> str:
        del dtype, head_dim
        return ""

    def pad(self, x: LaidOutArray, own: int) -> LaidOutArray:
        del own
        return x


@dataclasses.dataclass(frozen=True)
class Plain(_Kernel):
    """Attention by XLA, for any machine and size; it stores the score matrix."""

    implementation = "xla"
    in_place = True

    def lay_out(
        self, x: Float[Array, "*axes frame token dim"], head_dim: int
    ) -> Float[Array, "*axes frames_tokens dim"]:
        del head_dim
        return rearrange(x, "... f t d -> ... (f t) d")

    def split(self, videos: tuple[str, ...], heads: tuple[str, ...]) -> P:
        return P(videos, None, heads)

    def attend(
        self,
        head_dim: int,
        q: Flat,
        k: Own | None,
        v: Own | None,
        past: Remembered = None,
        seen: Number | None = None,
    ) -> Flat:
        k, v = _joined(k, v, past)
        q, k, v = (rearrange(x, "b t (h d) -> b t h d", d=head_dim) for x in (q, k, v))
        if seen is not None:
            seen = jnp.full(q.shape[:1], seen, jnp.int32)
        out = jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=seen, implementation=self.implementation
        )
        return rearrange(out, "b t h d -> b t (h d)")


@dataclasses.dataclass(frozen=True)
class Cudnn(Plain):
    """cuDNN's fused attention for NVIDIA, without a score matrix in memory."""

    implementation = "cudnn"

    def refuses(self, dtype: str, head_dim: int) -> str:
        if dtype not in ("bfloat16", "float16"):
            return f"it computes in bfloat16 or float16, not {dtype}"
        if head_dim > 128 or head_dim % 8:
            return f"a head of {head_dim} is not a multiple of 8 up to 128"
        return ""


class _ByHead(_Kernel):
    """Base of kernels that read [batch, head, token, head dim]."""

    in_place = False

    def lay_out(
        self, x: Float[Array, "*axes frame token dim"], head_dim: int
    ) -> Float[Array, "*axes head frames_tokens {head_dim}"]:
        return rearrange(x, "... f t (h d) -> ... h (f t) d", d=head_dim)

    def split(self, videos: tuple[str, ...], heads: tuple[str, ...]) -> P:
        return P(videos, heads, None, None)


@dataclasses.dataclass(frozen=True)
class Heads(_ByHead):
    """Attention by head for CPUs: the scores of one head fit into the CPU's cache.

    Hidden keys are skipped in steps of the pass's own size; under `vmap` all steps run.
    With fewer than `least` scores per head, all heads run at once.
    """

    least: int = 2**16

    def attend(
        self,
        head_dim: int,
        q: Flat,
        k: Own | None,
        v: Own | None,
        past: Remembered = None,
        seen: Number | None = None,
    ) -> Flat:
        own = 0 if k is None else k.shape[1]
        keys = own + (0 if past is None else past.k.shape[-2])
        q, k, v = _heads_first(head_dim, q, k, v)
        call = _all_heads if q.shape[2] * keys < self.least else _head_by_head
        return rearrange(call(q, k, v, past, seen), "b h t d -> b t (h d)")


@dataclasses.dataclass(frozen=True)
class Splash(_ByHead):
    """Pallas' splash attention for TPUs, without a score matrix in memory.

    Source: jax.experimental.pallas.ops.tpu.splash_attention.
    """

    interpret: bool = False
    most_queries: int = 2048
    most_keys: int = 1024

    def refuses(self, dtype: str, head_dim: int) -> str:
        if dtype not in ("bfloat16", "float32"):
            return f"it computes in bfloat16 or float32, not {dtype}"
        if head_dim % _LANES:
            return f"a head of {head_dim} is not a multiple of {_LANES}"
        return ""

    def pad(self, x: LaidOutArray, own: int) -> Float[Array, "*axes padded dim"]:
        whole = own + x.shape[-2]
        return _padded(x, _tile(whole, self.most_keys)[1] - own)

    def attend(
        self,
        head_dim: int,
        q: Flat,
        k: Own | None,
        v: Own | None,
        past: Remembered = None,
        seen: Number | None = None,
    ) -> Flat:
        queries = q.shape[1]
        q, k, v = _heads_first(head_dim, q, k, v)
        k, v = _joined(k, v, past)
        tile, whole = _tile(k.shape[2], self.most_keys)
        if seen is None and whole != k.shape[2]:
            seen = k.shape[2]
        k, v = _padded(k, whole), _padded(v, whole)
        rows, padded = _tile(queries, self.most_queries)
        kernel = self._kernel(q.shape[1], padded, whole, rows, tile)
        out = kernel(_padded(q, padded), k, v, seen)
        return rearrange(out[:, :, :queries], "b h t d -> b t (h d)")

    def _kernel(self, heads: int, queries: int, keys: int, rows: int, tile: int):
        """Returns the kernel over a batch; its last argument is the visible part."""
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


def attend(
    kernel: Any,
    head_dim: int,
    q: Flat,
    k: Own | None,
    v: Own | None,
    past: Remembered = None,
    seen: Number | None = None,
) -> Flat:
    """Returns `kernel.attend`."""
    return kernel.attend(head_dim, q, k, v, past, seen)


KERNELS = {"plain": Plain(), "heads": Heads(), "cudnn": Cudnn(), "splash": Splash()}
_NEEDS = {"cudnn": "gpu", "splash": "tpu"}
PREFERRED = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "cpu": "heads"}


def choose(platform: str, dtype: str, head_dim: int) -> Any:
    """Returns the fastest kernel that can serve a model on a machine."""
    kernel = KERNELS[PREFERRED.get(platform, "plain")]
    return KERNELS["plain"] if kernel.refuses(dtype, head_dim) else kernel


def named(name: str, dtype: str, head_dim: int) -> Any:
    """Returns the kernel with a name; None for `auto`, which depends on the machine.

    Raises:
      UserError: The kernel does not exist, or cannot serve the model.
    """
    if name == "auto":
        return None
    if name not in KERNELS:
        known = ["auto", *KERNELS]
        raise UserError(f"attention={name!r}{suggest(name, known, 'kernels')}")
    needed, here = _NEEDS.get(name), jax.default_backend()
    reason = KERNELS[name].refuses(dtype, head_dim)
    if not reason and needed and here != needed:
        reason = f"it needs a {needed}, but jax found a {here}"
    if reason:
        raise UserError(f"attention={name!r}: {reason}; choose auto or plain")
    return KERNELS[name]


def _one(past) -> tuple[jax.Array, jax.Array]:
    return past.one() if isinstance(past, PastLayer) else (past.k, past.v)


def _heads_first(head_dim: int, q, k, v):
    """Returns scaled queries, keys and values as [batch, head, token, head dim]."""
    scale = jnp.asarray(head_dim**-0.5, q.dtype)
    pattern = "b t (h d) -> b h t d"
    return (
        rearrange(q * scale, pattern, d=head_dim),
        *(None if x is None else rearrange(x, pattern, d=head_dim) for x in (k, v)),
    )


def _joined(k, v, past):
    """Returns own keys and values followed by past ones."""
    if past is None:
        return k, v
    past_k, past_v = _one(past)
    if k is None:
        return past_k, past_v
    whole = jnp.concatenate([k, past_k.astype(k.dtype)], axis=-2)
    return whole, jnp.concatenate([v, past_v.astype(v.dtype)], axis=-2)


def _all_heads(q, k, v, past, seen):
    """Returns attention of all heads at once, everything [batch, head, token, dim]."""
    keys_values = [] if k is None else [k, v]
    if past is not None and past.k.shape[-2]:
        keys_values += _one(past)
        seen = seen if k is None or seen is None else seen - k.shape[2]
    bias = None if seen is None else _bias(keys_values[-1].shape[2], seen)
    one = functools.partial(_one_head, bias=bias)
    return jax.vmap(jax.vmap(one))(q, *keys_values)


def _head_by_head(q, k, v, past, seen):
    """Returns the same as `_all_heads`, one head after another."""
    batch, own = q.shape[0], 0 if k is None else k.shape[2]
    remembered = 0 if past is None else past.k.shape[-2]
    if not own:
        k, v = _one(past)
    q, k, v = (rearrange(x, "b h t d -> (b h) t d") for x in (q, k, v))
    if own and remembered:
        out = _shown_part(q, k, v, past, remembered if seen is None else seen - own)
    else:
        bias = None if seen is None else _bias(k.shape[1], seen)
        out = _each_head(q, k, v, bias=bias)
    return rearrange(out, "(b h) t d -> b h t d", b=batch)


def _shown_part(q, k, v, past, shown):
    """Returns attention over own keys and the first `shown` past keys.

    Args:
      q: [head, query, dim], scaled; heads of all videos in sequence.
      k: [head, own, dim].
      v: values of the shape of `k`.
      past: past keys and values in the layout of `Heads`.
      shown: number of visible past keys, traced.
    """
    size, first = past.k.shape[-2], 0
    if isinstance(past, PastLayer):
        first = past.layer * len(q)
    stored = [x.reshape(-1, *x.shape[-2:]) for x in (past.k, past.v)]
    unit = math.gcd(k.shape[1], size)
    steps = size // unit if size // unit <= 8 else 1
    unit = size // steps

    def part(count: int):
        end = count * unit

        def one_head(head, bias=None):
            *own, number = head
            # Cut head by head: one cut for all heads would copy the whole past.
            place, cut = (first + number, 0, 0), (1, end, k.shape[-1])
            seen = (jax.lax.dynamic_slice(x, place, cut)[0] for x in stored)
            return _one_head(*own, *seen, bias=bias)

        def all_shown():
            return jax.lax.map(one_head, (q, k, v, jnp.arange(len(q))))

        def some_hidden():
            hiding = functools.partial(one_head, bias=_bias(end, shown))
            return jax.lax.map(hiding, (q, k, v, jnp.arange(len(q))))

        return lambda: jax.lax.cond(shown < end, some_hidden, all_shown)

    branches = [lambda: _each_head(q, k, v), *map(part, range(1, steps + 1))]
    return jax.lax.switch(jnp.clip(-(-shown // unit), 0, steps), branches)


def _bias(size: int, shown) -> jax.Array:
    return jnp.where(jnp.arange(size) < shown, 0.0, _HIDDEN).astype(jnp.float32)


def _each_head(*arrays, bias=None):
    """Returns `_one_head` of each head, one after another."""
    return jax.lax.map(lambda head: _one_head(*head, bias=bias), arrays)


def _one_head(q, *keys_values, bias=None):
    """Returns [query, dim] of one head; all keys share one softmax.

    Args:
      q: [query, dim], scaled.
      *keys_values: keys and values [key, dim], alternating.
      bias: [key], added to the scores of the last keys.
    """
    values = keys_values[1::2]
    scores = [_dot(q, k.astype(q.dtype)) for k in keys_values[::2]]
    if bias is not None:
        # This comes before the maximum, because a hidden key may score far above all
        # others.
        scores[-1] = scores[-1] + bias
    tops = [jnp.max(part, axis=-1, keepdims=True) for part in scores]
    top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, tops))
    weights = [jnp.exp(part - top) for part in scores]
    whole = sum(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
    mixed = sum(
        jnp.matmul(part.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for part, v in zip(weights, values, strict=True)
    )
    return (mixed / whole).astype(q.dtype)


def _dot(q, k):
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(q, k, contract, preferred_element_type=jnp.float32)


def _tile(length: int, most: int) -> tuple[int, int]:
    """Returns a tile size in lanes, up to `most`, and the length in whole tiles.

    The tile with the least padding is chosen, then the largest. Small tiles count as
    padding, because they read the other operand many times.
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
