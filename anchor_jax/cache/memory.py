"""The past as a pass reads it: which slots, at which positions, in which layout.

The cache stores keys and values token-major, [layer, batch, slot, token, dim], keys
before rotation. Before the passes of a block, the slots that it may see are rotated to
their positions and laid out for the attention kernel, once for all passes. What is
visible is a prefix of *own | sink | local | junction*, so a pass needs one number and
no mask.

Source: cache/README.md, "What a pass reads".
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anchor_jax.axes import Flag
from anchor_jax.cache import store
from anchor_jax.cache.policies import Policy, RecachePass
from anchor_jax.cache.types import KVCache, ReadPlan
from anchor_jax.wan.attention import LayersKV
from anchor_jax.wan.kernels import LaidOut
from anchor_jax.wan.rope import Rotary, rotary, rotate
from anchor_jax.wan.spec import ModelConfig

Carried = tuple[LayersKV, LayersKV]


class Memory:
    """The past keys and values that the passes of one block read.

    Under the release's rules the junction changes from pass to pass of one block. It
    is then carried from pass to pass as (junction, prior), and rotated in each pass.
    """

    def __init__(
        self,
        policy: Policy,
        model: ModelConfig,
        kernel: Any,
        tokens: tuple[int, int],
        cache: KVCache,
        plan: ReadPlan,
        recache: RecachePass | None = None,
    ):
        """Rotates and lays out the slots that the passes may see.

        Args:
          policy: cache policy of the stream.
          model: sizes of the generator.
          kernel: one of `anchor_jax.wan.kernels`.
          tokens: rows and columns of tokens in a latent frame.
          cache: cache of the stream.
          plan: read plan of the passes, from `policy.read` or `policy.read_recache`.
          recache: the re-cache that `plan` belongs to, or None for a block.
        """
        self.plan, self.cache, self.is_carried = plan, cache, policy.keeps_prior
        self.kernel, self.head_dim = kernel, model.head_dim
        self.tokens = math.prod(tokens)
        self.junction = policy.sink + policy.local  # first slot of the junction
        rotation = rotary(plan.past, tokens, model.head_dim, model.rope_theta)
        self.rotation = jax.tree.map(lambda x: x[self.junction :], rotation)
        own = plan.query.shape[0]
        self.whole = None
        if policy.remembers:
            read = slots_read(policy, recache)
            rotation = jax.tree.map(lambda x: _taken(x, read, 0), rotation)
            past = jax.tree.map(lambda x: _taken(x, read, 2), cache.slots)
            self.whole = lay_out(kernel, model.head_dim, past, own, rotation)
        # The junction comes last: it starts after all other visible frames.
        seen = plan.frames - own - plan.junction * policy.junction_frames
        self.before_junction = jnp.maximum(seen, 0)

    def carried(self) -> Carried | None:
        """Returns (junction, prior) before the first pass, or None."""
        if not self.is_carried:
            return None
        return store.take(self.cache.slots, self.junction, None), self.cache.prior

    def past(self, carried: Carried | None) -> LaidOut | None:
        """Returns remembered keys and values in reading order, laid out."""
        if carried is None:
            return self.whole
        shown = store.rotated(store.choose(self.plan, *carried), self.rotation)
        first = self.before_junction * self.tokens

        def put(whole, piece):
            piece = self.kernel.lay_out(piece, self.head_dim)
            return jax.lax.dynamic_update_slice_in_dim(whole, piece, first, axis=-2)

        return LaidOut(k=put(self.whole.k, shown.k), v=put(self.whole.v, shown.v))

    def after(
        self, carried: Carried | None, own: LayersKV, capture: Flag | None
    ) -> Carried | None:
        """Returns (junction, prior) after a pass, or None.

        Args:
          carried: before the pass.
          own: the pass's keys and values.
          capture: whether its first frames become the junction, traced.
        """
        if carried is None:
            return None
        junction, prior = carried
        frames = junction.k.shape[2]

        def pick(new, old):
            return jnp.where(capture, new.astype(old.dtype), old)

        taken = jax.tree.map(pick, store.take(own, 0, frames), junction)
        return taken, jax.tree.map(pick, junction, prior)


def lay_out(
    kernel: Any,
    head_dim: int,
    past: LayersKV,
    own: int,
    rotation: Rotary | None = None,
) -> LaidOut:
    """Returns past frames in the kernel's layout, with keys rotated to their positions.

    It loops over the layers: all layers at once would need two more copies of the
    cache.

    Args:
      kernel: one of `anchor_jax.wan.kernels`.
      head_dim: channels of one attention head.
      past: past frames of all layers.
      own: number of frames in the passes that will read them.
      rotation: rotation of the keys, or None if they are already rotated.
    """
    tokens = own * past.k.shape[-2]

    def laid_out(x):
        return kernel.pad(kernel.lay_out(x, head_dim), tokens)

    keys = jax.lax.map(
        lambda k: laid_out(k if rotation is None else rotate(k, rotation)), past.k
    )
    if kernel.in_place:
        return LaidOut(k=keys, v=laid_out(past.v))
    return LaidOut(k=keys, v=jax.lax.map(laid_out, past.v))


LAYOUT = 2
"""Version of the cache's layout in files. In version 1 the heads had an axis."""


def shapes_in_layout_1(cache: KVCache, head_dim: int) -> KVCache:
    """Returns the shapes in layout 1 of a cache [..., token, dim]."""

    def split(x):
        shape = (*x.shape[:-1], x.shape[-1] // head_dim, head_dim)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    slots, prior = jax.tree.map(split, (cache.slots, cache.prior))
    return cache.replace(slots=slots, prior=prior)


def from_layout_1(cache: KVCache) -> KVCache:
    """Returns a cache of layout 1, [..., token, head, head dim], in this layout."""

    def merge(x):
        return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])

    slots, prior = jax.tree.map(merge, (cache.slots, cache.prior))
    return cache.replace(slots=slots, prior=prior)


def slots_read(policy: Policy, recache: RecachePass | None) -> tuple[int, ...]:
    """Returns the slots that a pass may read. A re-cache replaces the local ones."""
    sink = policy.sink
    if recache is None:
        return tuple(range(policy.slots))
    kept = () if recache.sink else tuple(range(sink))
    return (*kept, *range(sink + policy.local, policy.slots))


def _taken(x: jax.Array, picked: tuple[int, ...], axis: int) -> jax.Array:
    """Returns static indices of an axis; taking all of them is free."""
    if len(picked) == x.shape[axis]:
        return x
    return jnp.take(x, np.asarray(picked, np.int32), axis=axis)
