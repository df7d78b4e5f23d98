"""Trees of arrays or of their shapes: sizes, names and casts."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util


def nbytes(tree: Any) -> int:
    """Returns the bytes of a tree's leaves; random keys do not count.

    A leaf is an array, or anything else with `shape` and `dtype`.
    """
    return sum(map(leaf_nbytes, jax.tree.leaves(tree)))


def leaf_nbytes(leaf: Any) -> int:
    """Returns the bytes of one leaf, 0 for random keys."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 0
    return math.prod(leaf.shape) * itemsize(leaf.dtype)


def itemsize(dtype: Any) -> int:
    """Returns the bytes of one value of a type or of its name."""
    return jax.numpy.dtype(dtype).itemsize


def shard_nbytes(tree: Any) -> int:
    """Returns the bytes of a tree on one device; unsharded leaves count fully."""
    return sum(map(_shard_nbytes, jax.tree.leaves(tree)))


def _shard_nbytes(leaf: Any) -> int:
    shape = leaf.shape
    if getattr(leaf, "sharding", None) is not None:
        shape = leaf.sharding.shard_shape(shape)
    return leaf_nbytes(jax.ShapeDtypeStruct(shape, leaf.dtype))


def count(tree: Any) -> int:
    """Returns the number of values in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of nested mappings by name, such as `blocks/ffn_in/kernel`."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the inverse of `flatten`."""
    return traverse_util.unflatten_dict(leaves, sep="/")


def cast(tree: Any, dtype: Any) -> Any:
    """Returns a tree whose leaves have another type."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
