"""Placement of a training's arrays on a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from anchor_jax import sharding
from anchor_jax.parallel import HEADS
from anchor_jax.training.data import order
from anchor_jax.training.state import TrainState
from anchor_jax.wan import kernels
from anchor_jax.wan.spec import ModelConfig


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Makes arrays and places them on the devices of a mesh."""

    mesh: Mesh

    def make(self, function: Callable, *args):
        """Returns `function(*args)`."""
        return function(*args)

    def put(self, tree, places):
        """Returns arrays of this process on their devices."""
        return put(tree, places)

    def kernel(self, name: str, model: ModelConfig):
        """Returns the attention kernel of a name; None is chosen at its first use."""
        return kernels.named(name, model.dtype, model.head_dim)


class Shapes(Arrays):
    """Makes only shapes, to compile for a mesh of absent devices."""

    def make(self, function: Callable, *args):
        """Returns the shapes of `function(*args)`."""
        return jax.eval_shape(function, *args)

    def put(self, tree, places):
        """Returns shapes with the shardings that their arrays would have."""

        def place(leaf, where):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return jax.tree.map(place, tree, places)

    def kernel(self, name: str, model: ModelConfig):
        """Returns the attention kernel for the mesh's devices; the name is ignored."""
        del name
        platform = self.mesh.devices.flat[0].platform
        return kernels.choose(platform, model.dtype, model.head_dim)


def of_collections(collections, mesh: Mesh):
    """Returns the shardings of a network's collections."""
    return {
        name: sharding.shardings(tree, sharding.COLLECTIONS[name], mesh)
        for name, tree in collections.items()
    }


def of_optimizer(opt_state, params, mesh: Mesh):
    """Returns the shardings of an optimizer's state, which follow the parameters.

    Args:
      opt_state: state of the optimizer, or its shapes.
      params: shardings of the optimized parameters.
      mesh: mesh of all arrays.
    """
    known = {
        _names(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }

    def place(path, leaf):
        names = _names(path)
        for first in range(len(names)):
            found = known.get(names[first:])
            if found is not None and len(found.spec) == leaf.ndim:
                return found
        return everywhere(mesh)

    return jax.tree_util.tree_map_with_path(place, opt_state)


def _names(path) -> tuple[str, ...]:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def of_videos(tree, mesh: Mesh):
    """Returns shardings that split the first axis of every array by video."""

    def place(leaf):
        return NamedSharding(mesh, P(_videos(mesh, leaf.shape[0])))

    return jax.tree.map(place, tree)


def _videos(mesh: Mesh, batch: int) -> tuple[str, ...]:
    return () if batch % videos_at_once(mesh) else sharding.VIDEOS


def videos_at_once(mesh: Mesh) -> int:
    """Returns the number of devices that videos are split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def of_rollout(rollout, mesh: Mesh):
    """Returns the shardings of a sequence, split by video."""
    if rollout is None:
        return None
    cache = rollout.cache
    stored = P(None, _videos(mesh, rollout.recent.shape[0]), None, None, HEADS)
    stored = NamedSharding(mesh, stored)
    return rollout.replace(
        cache=jax.tree.map(lambda _: stored, cache).replace(
            index=jax.tree.map(lambda _: everywhere(mesh), cache.index)
        ),
        recent=of_videos(rollout.recent, mesh),
        previous=of_videos(rollout.previous, mesh),
    )


def of_state(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the shardings of a state, which may be given as shapes."""
    generator = of_collections(state.generator, mesh)
    fake_score = state.fake_score and of_collections(state.fake_score, mesh)
    return state.replace(
        **dict.fromkeys(("step", "rng", "updates", "sound"), everywhere(mesh)),
        generator=generator,
        opt_generator=of_optimizer(state.opt_generator, generator, mesh),
        ema=state.ema and generator,
        fake_score=fake_score,
        opt_fake_score=of_optimizer(state.opt_fake_score, fake_score, mesh),
        rollout=of_rollout(state.rollout, mesh),
    )


def of_frozen(frozen, mesh: Mesh):
    """Returns the shardings of frozen weights; the codec's are replicated."""
    return {
        name: sharding.shardings(tree, sharding.CODEC, mesh)
        if name == "codec"
        else of_collections(tree, mesh)
        for name, tree in frozen.items()
    }


def put(tree, places):
    """Returns arrays of this process on their devices."""
    return jax.tree.map(_put, tree, places)


def _put(value: Any, place: NamedSharding) -> jax.Array:
    # `device_put` of a local array would compare it across processes, and needs equally
    # many shards in each.
    is_local = isinstance(value, jax.Array) and value.is_fully_addressable
    if isinstance(value, jax.Array) and is_local == place.is_fully_addressable:
        return jax.device_put(value, place)
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, place, lambda index: value[index])


def rows_of_process(mesh: Mesh, batch: int) -> np.ndarray:
    """Returns the rows of a batch that are on this process's devices."""
    held = _of_rows(mesh).addressable_devices_indices_map((batch,)).values()
    return np.unique([np.arange(batch)[rows] for (rows,) in held])


def put_batch(batch, mesh: Mesh):
    """Returns a batch on its devices; every process passes its own rows."""
    own = {name: np.asarray(value) for name, value in batch.items()}
    return jax.make_array_from_process_local_data(of_batch(batch, mesh), own)


def of_batch(batch, mesh: Mesh):
    """Returns the shardings of a batch; arrays without a video axis are replicated."""
    return {
        name: everywhere(mesh) if name in order.SHARED else _of_rows(mesh)
        for name in batch
    }


def _of_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(sharding.VIDEOS))


def everywhere(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a replicated array."""
    return NamedSharding(mesh, P())
