"""Operations on the cache's tensors: make, read, commit, flush."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Int

from anchor_jax import parallel
from anchor_jax.axes import Array
from anchor_jax.cache.policies import Policy
from anchor_jax.cache.types import KVCache, ReadPlan, WritePlan
from anchor_jax.wan.attention import LayersKV
from anchor_jax.wan.rope import Rotary, rotate
from anchor_jax.wan.spec import ModelConfig


def init_cache(policy: Policy, config: ModelConfig, batch: int, tokens: int) -> KVCache:
    """Returns an empty cache of the policy's slots, in the model's dtype."""

    def zeros(frames: int) -> LayersKV:
        dim = config.dim // parallel.size(*parallel.HEADS)
        shape = (config.num_layers, batch, frames, tokens, dim)
        # Two buffers: one array given twice could not be donated.
        return LayersKV(*(jnp.zeros(shape, config.dtype) for _ in range(2)))

    return KVCache(
        slots=zeros(policy.slots),
        prior=zeros(policy.junction_frames) if policy.keeps_prior else None,
        index=policy.init_index(),
    )


def rotated(stored: LayersKV, by: Rotary) -> LayersKV:
    """Returns the stored keys rotated to their positions, and the values."""
    return LayersKV(k=rotate(stored.k, by), v=stored.v)


def take(stored: LayersKV, first: int, end: int | None) -> LayersKV:
    """Returns slots from `first` to `end`."""
    return jax.tree.map(lambda x: x[:, :, first:end], stored)


def choose(plan: ReadPlan, junction: LayersKV, prior: LayersKV) -> LayersKV:
    """Returns the prior junction where the plan shows it, else the junction."""
    return jax.tree.map(lambda a, b: jnp.where(plan.prior, b, a), junction, prior)


def commit(stored: LayersKV, own: LayersKV, plan: WritePlan) -> LayersKV:
    """Returns the cache with a pass's keys and values written to the plan's slots.

    No gradient flows through the cache (training/README.md, "D5").
    """
    # A frame without a slot would take the last frame's, silently.
    chex.assert_shape([plan.slot, plan.junction], (own.k.shape[2],))
    own = jax.lax.stop_gradient(own)

    def put(slots, new):
        for frame in range(new.shape[2]):
            piece = new[:, :, frame : frame + 1].astype(slots.dtype)
            for place in (plan.slot[frame], plan.junction[frame]):
                slots = _put(slots, piece, place)
        return slots

    return jax.tree.map(put, stored, own)


def _put(slots: jax.Array, piece: jax.Array, place: jax.Array) -> jax.Array:
    """Returns the slots with one replaced; unchanged if `place` is past the last.

    It uses slices: a scatter would copy the cache on accelerators and loop on CPUs.
    """
    old = jax.lax.dynamic_slice_in_dim(slots, place, 1, axis=2)
    piece = jnp.where(place < slots.shape[2], piece, old)
    return jax.lax.dynamic_update_slice_in_dim(slots, piece, place, axis=2)


def emptied(stored: LayersKV, slots: int) -> LayersKV:
    """Returns the cache with its first slots set to zero."""
    return jax.tree.map(lambda x: x.at[:, :, :slots].set(0), stored)


def gather(stored: LayersKV, source: Int[Array, " slot"]) -> LayersKV:
    """Returns the cache with every slot refilled from another."""
    return jax.tree.map(lambda x: jnp.take(x, source, axis=2), stored)
