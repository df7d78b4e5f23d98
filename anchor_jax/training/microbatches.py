"""Gradients of a batch from its parts, one after another.

A part has some of each device's videos, so that nothing moves between devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from anchor_jax import sharding


def over_parts(
    gradient: Callable, videos: Any, specs: Any, after_specs: Any, count: int
):
    """Returns the mean gradient and metrics of parts, and their other result.

    Args:
      gradient: function from a part of the videos to (gradient, other result, metrics).
        Its loss is a mean over the part's videos.
      videos: tree of arrays.
      specs: prefix of that tree, with a `PartitionSpec` for each array. The axis that
        has `sharding.VIDEOS` is that of the videos.
      after_specs: the same for the other result.
      count: number of parts. 1 calls `gradient` once.
    """
    if count == 1:
        return gradient(videos)

    def one(total, part):
        found, after, metrics = gradient(part)
        return jax.tree.map(jnp.add, total, found), (after, metrics)

    parts = _mapped(lambda x, axis: _split(x, axis, count), videos, specs)
    shapes = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, (after, metrics) = jax.lax.scan(one, zeros, parts)
    mean = jax.tree.map(lambda x: x / count, total)
    metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), metrics)
    return mean, _mapped(_joined, after, after_specs), metrics


def _mapped(function: Callable, tree: Any, specs: Any):
    """Returns `function(array, axis of the videos or None)` of every array."""

    def below(spec: P, part):
        axis = next((n for n, one in enumerate(spec) if one == sharding.VIDEOS), None)
        return jax.tree.map(lambda x: function(x, axis), part)

    return jax.tree.map(below, specs, tree)


def _devices() -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return shape.get("data", 1) * shape.get("fsdp", 1)


def _split(x: jax.Array, axis: int | None, count: int) -> jax.Array:
    """Returns an array as parts, along a new first axis."""
    if axis is None:
        return jnp.broadcast_to(x, (count, *x.shape))
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*before, _devices(), count, -1, *after)
    x = jnp.moveaxis(x, axis + 1, 0)
    return x.reshape(count, *before, -1, *after)


def _joined(x: jax.Array, axis: int | None) -> jax.Array:
    """Returns the array of the parts; undoes `_split`."""
    if axis is None:
        return x[0]
    count, before, after = x.shape[0], x.shape[1 : axis + 1], x.shape[axis + 2 :]
    x = x.reshape(count, *before, _devices(), -1, *after)
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*before, -1, *after)
