"""Low-rank updates of the transformer as a tree beside its parameters.

Unmerged, the tree is the collection `lora`; merging adds it to the parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from anchor_jax.axes import Params, RandomKey


def is_target(path: tuple[str, ...]) -> bool:
    """Returns whether a parameter takes an update, which every matrix in a block does.

    Source: wan/README.md, "LoRA".
    """
    return path[0] in ("blocks", "context") and path[-1] == "kernel"


def init(params: Params, rank: int, rng: RandomKey) -> Params:
    """Returns fresh updates `a` [layer, in, rank] and `b` [layer, rank, out].

    `a` is uniform within 1 / sqrt(in) and `b` is zero, so the initial update is zero.
    """
    found = traverse_util.flatten_dict(params)
    adapters = {}
    for number, (path, kernel) in enumerate(sorted(found.items())):
        if not is_target(path):
            continue
        layers, wide, features = kernel.shape
        key, bound = jax.random.fold_in(rng, number), wide**-0.5
        shape = (layers, wide, rank)
        draw = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        adapters[*path[:-1], "a"] = draw
        adapters[*path[:-1], "b"] = jnp.zeros((layers, rank, features))
    return traverse_util.unflatten_dict(adapters)


def ranks(adapters: Params) -> set[int]:
    """Returns the ranks of updates."""
    found = traverse_util.flatten_dict(adapters)
    return {leaf.shape[-1] for path, leaf in found.items() if path[-1] == "a"}


def merge(params: Params, adapters: Params) -> Params:
    """Returns the parameters with each update's product added to its kernel."""
    leaves = traverse_util.flatten_dict(params)
    found = traverse_util.flatten_dict(adapters)
    for path in found:
        if path[-1] == "a":
            kernel = (*path[:-1], "kernel")
            product = np.matmul(found[path], found[*path[:-1], "b"])
            leaves[kernel] = leaves[kernel] + product
    return traverse_util.unflatten_dict(leaves)
