"""Sharding of parameters: tables from paths to logical axes, and from these to a mesh.

The mesh has the axes data, fsdp, context and tensor. On one device all have size 1.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "context", "tensor")
VIDEOS = ("data", "fsdp")
"""Mesh axes that videos are split over."""
HEADS = ("tensor",)
"""Mesh axes that attention heads are split over."""

TO_MESH = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Mesh axis by logical axis. Other axes are replicated."""

# The first expression that matches the whole path counts. A leading `layer` is added
# for parameters of the scanned layers.
GENERATOR = (
    (r"patch_embed/kernel", ("patch", "embed")),
    (r"(text_in|time_in)/kernel", ("features", "embed")),
    (r"(text_out|time_out)/kernel", ("embed", "heads")),
    (r"(text_out|time_out)/bias", ("heads",)),
    (r"time_projection/kernel", ("embed", "heads")),
    (r"time_projection/bias", ("heads",)),
    (r"(blocks/\w+|context)/(q|k|v)/kernel", ("embed", "heads")),
    (r"(blocks/\w+|context)/(q|k|v)/bias", ("heads",)),
    (r"(blocks/\w+|context)/norm_(q|k)/scale", ("heads",)),
    (r"blocks/\w+/o/kernel", ("heads", "embed")),
    (r"blocks/ffn_in/kernel", ("embed", "mlp")),
    (r"blocks/ffn_in/bias", ("mlp",)),
    (r"blocks/ffn_out/kernel", ("mlp", "embed")),
    (r"blocks/modulation|head/modulation", ("parts", "embed")),
    (r"head/out/kernel", ("embed", "patch")),
    (r"head/out/bias", ("patch",)),
    (r".*/(bias|scale)", ("embed",)),
)

LORA = (
    (r"blocks/ffn_out/a", ("mlp", "rank")),
    (r"blocks/\w+/o/a", ("heads", "rank")),
    (r".*/a", ("embed", "rank")),
    (r"(blocks/ffn_out|blocks/\w+/o)/b", ("rank", "embed")),
    (r"blocks/ffn_in/b", ("rank", "mlp")),
    (r".*/b", ("rank", "heads")),
)

TEXT = (
    (r"token_embedding/embedding", ("vocab", "embed")),
    (r"blocks/attn/(q|k|v)/kernel", ("embed", "heads")),
    (r"blocks/attn/o/kernel", ("heads", "embed")),
    (r"blocks/position_bias/embedding", ("buckets", "head_count")),
    (r"blocks/ffn/(gate|fc1)/kernel", ("embed", "mlp")),
    (r"blocks/ffn/fc2/kernel", ("mlp", "embed")),
    (r".*/scale", ("embed",)),
)

CODEC = ((r".*", ()),)
"""The codec has half a gigabyte in float32, and is replicated."""


def logical_axes(params, placements):
    """Returns a tree of tuples: a logical axis name for every axis of every array.

    Raises:
      ValueError: No pattern matches a path, or it has another number of axes than the
        array.
    """

    def choose(path, leaf):
        name = "/".join(key.key for key in path)
        stacked = name.split("/")[0] in ("blocks", "context")
        for pattern, axes in placements:
            if not re.fullmatch(pattern, name):
                continue
            axes = ("layer", *axes) if stacked and axes else axes
            axes = axes or ("replicated",) * leaf.ndim
            if len(axes) != leaf.ndim:
                raise ValueError(
                    f"{name!r} of shape {leaf.shape} does not fit the axes {axes}"
                )
            return axes
        raise ValueError(f"no logical axes for {name!r} of shape {leaf.shape}")

    return jax.tree_util.tree_map_with_path(choose, params)


def no_mesh():
    """Returns a context without a mesh, for programs whose arrays are not on it."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def make_mesh(shape: tuple[int, int, int, int] = (1, -1, 1, 1), found=None) -> Mesh:
    """Returns the mesh of all devices.

    Args:
      shape: devices along each axis. At most one is -1, which is inferred.
      found: the devices. None takes those of all processes.

    Raises:
      ValueError: The shape does not have four axes, or its product is not the number of
        devices.
    """
    found = jax.devices() if found is None else found
    if len(shape) != len(MESH_AXES):
        raise ValueError(
            f"got {tuple(shape)}, expected four integers: the devices along the axes"
            f" {', '.join(MESH_AXES)}, such as (1, -1, 1, 1)"
        )
    devices = len(found)
    known = math.prod(size for size in shape if size != -1)
    if known > 0 and shape.count(-1) <= 1:
        shape = tuple(devices // known if size == -1 else size for size in shape)
    needed = math.prod(shape)
    if needed != devices or min(shape) < 1:
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} needs {needed} devices,"
            f" found {devices}; set one axis to -1 to infer its size"
        )
    return jax.make_mesh(
        shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=found
    )


def shardings(params, placements, mesh: Mesh):
    """Returns a NamedSharding for every parameter.

    An axis that the mesh axis does not divide is replicated.
    """
    axes = logical_axes(params, placements)

    def place(leaf, names):
        spec = []
        for size, name in zip(leaf.shape, names, strict=True):
            to = TO_MESH.get(name)
            spec.append(to if to and size % mesh.shape[to] == 0 else None)
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(place, params, axes)


def is_on_mesh() -> bool:
    """Returns whether the traced program runs on several devices of `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def dividing(axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Returns the axes of the mesh over which `size` items can be split.

    Devices along other axes do the same work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    found = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    while size % math.prod(mesh.shape[axis] for axis in found):
        found = found[:-1]
    return found


def gathered(x: jax.Array, path: tuple[str, ...], placements) -> jax.Array:
    """Returns a layer's parameter gathered on each device, except for split heads.

    Cast it first, to send fewer bytes. Without this, compilers split each product by
    device, and take minutes for a large mesh.

    Args:
      x: parameter of one layer.
      path: name of the parameter.
      placements: a table such as `GENERATOR`. A parameter that it lacks is not split.
    """
    if not is_on_mesh():
        return x
    name = "/".join(path)
    axes = next((a for pattern, a in placements if re.fullmatch(pattern, name)), ())
    split = [dividing(HEADS, n) for n in x.shape[: len(axes)]]
    spec = [
        s if TO_MESH.get(a) in HEADS else None for a, s in zip(axes, split, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, P(*spec))


def by_video(x: jax.Array) -> jax.Array:
    """Returns activations [batch, ...], with each device's videos on that device.

    Without this, compilers split features like the parameters, and gather videos.
    """
    if not is_on_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, P(dividing(VIDEOS, x.shape[0])))
