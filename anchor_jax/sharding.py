"""Which part of each array a device has: a table for every network, and the mesh.

The mesh has the axes data, fsdp, context and tensor. On one device all have size 1.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from anchor_jax import parallel

MESH_AXES = ("data", "fsdp", "context", "tensor")
VIDEOS = ("data", "fsdp")
"""Mesh axes that videos are split over."""
SMALL = 65536
"""Bytes. A smaller array is replicated if a mesh axis does not divide it, unless its
features are in `SUMMED`."""

TO_MESH = {
    "embed": "fsdp",
    "rank": "fsdp",
    "shared_rank": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Mesh axis by logical axis. Other axes are replicated."""

SUMMED = ("heads", "mlp")
"""Axes of features that layers add up over devices, hence always split."""


class Unsplittable(ValueError):
    """A mesh axis does not divide what is to be split over it."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The logical axes of a network's arrays.

    Attributes:
      name: the network, as messages name it.
      rows: pairs of a regular expression for an array's whole path, and the names of
        its axes. The first match counts. A leading `layer` is added for arrays of the
        scanned layers.
    """

    name: str
    rows: tuple[tuple[str, tuple[str, ...]], ...]


GENERATOR = Table(
    "transformer",
    (
        (r"patch_embed/kernel", ("patch", "embed")),
        (r"(text_in|time_in)/kernel", ("features", "embed")),
        (r"(text_out|time_out|time_projection)/kernel", ("embed", "features")),
        (r"(blocks/\w+|context)/(q|k|v)/kernel", ("embed", "heads")),
        (r"(blocks/\w+|context)/(q|k|v)/bias", ("heads",)),
        (r"(blocks/\w+|context)/norm_(q|k)/scale", ("heads",)),
        (r"blocks/\w+/o/kernel", ("heads", "embed")),
        (r"blocks/ffn_in/kernel", ("embed", "mlp")),
        (r"blocks/ffn_in/bias", ("mlp",)),
        (r"blocks/ffn_out/kernel", ("mlp", "embed")),
        (r"blocks/modulation|head/modulation", ("parts", "features")),
        (r"head/out/kernel", ("embed", "patch")),
        (r".*/(bias|scale)", ("features",)),
    ),
)
"""Generator, critic and teacher. Vectors are replicated, except for those of heads."""

LORA = Table(
    "low-rank updates",
    (
        (r"blocks/ffn_out/a", ("mlp", "rank")),
        (r"blocks/\w+/o/a", ("heads", "rank")),
        (r".*/a", ("embed", "shared_rank")),
        (r"(blocks/ffn_out|blocks/\w+/o)/b", ("shared_rank", "embed")),
        (r"blocks/ffn_in/b", ("rank", "mlp")),
        (r".*/b", ("rank", "heads")),
    ),
)
"""Devices that share a matrix's features also share the rank of its update."""

TEXT = Table(
    "text encoder",
    (
        (r"token_embedding/embedding", ("vocab", "embed")),
        (r"blocks/attn/(q|k|v)/kernel", ("embed", "heads")),
        (r"blocks/attn/o/kernel", ("heads", "embed")),
        (r"blocks/position_bias/embedding", ("buckets", "head_count")),
        (r"blocks/ffn/(gate|fc1)/kernel", ("embed", "mlp")),
        (r"blocks/ffn/fc2/kernel", ("mlp", "embed")),
        (r".*/scale", ("embed",)),
    ),
)

TRAINED_TEXT = Table(
    "trained text encoder",
    tuple(
        (path, tuple(axis if axis == "embed" else "features" for axis in axes))
        for path, axes in TEXT.rows
    ),
)
"""A text encoder that is trained is gathered to run, hence split over fsdp alone."""

CODEC = Table("VAE", ((r".*", ()),))
"""The codec has half a gigabyte in float32, and is replicated."""

COLLECTIONS = {"params": GENERATOR, "lora": LORA, "text": TRAINED_TEXT}
"""The table of each collection of a network."""


def logical_axes(params, table: Table):
    """Returns a tree of tuples: a logical axis name for every axis of every array.

    Raises:
      ValueError: No row matches a path, or it has another number of axes than the
        array.
    """

    def choose(path, leaf):
        name = "/".join(key.key for key in path)
        stacked = name.split("/")[0] in ("blocks", "context")
        for pattern, axes in table.rows:
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


def make_mesh(shape: tuple[int, ...] = (1, -1, 1, 1), found=None) -> Mesh:
    """Returns the mesh of all devices.

    Args:
      shape: devices along each axis. One may be -1, which is inferred. If data and fsdp
        are, fsdp gets the devices of one machine, or up to 16 TPUs.
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
    shape = infer(tuple(shape), found)
    if shape.count(-1) > 1:
        raise ValueError(
            f"got {shape}; only one axis may be -1, or data and fsdp together"
        )
    needed = math.prod(shape)
    if needed != len(found) or min(shape) < 1:
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} needs {needed} devices,"
            f" found {len(found)}; set one axis to -1 to infer its size"
        )
    kinds = (AxisType.Auto,) * 4
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=kinds, devices=found)
    except NotImplementedError:  # An axis has a part of a TPU slice's side.
        placed = mesh_utils.create_device_mesh(
            shape, found, allow_split_physical_axes=True
        )
        return Mesh(placed, MESH_AXES, axis_types=kinds)


def infer(shape: tuple[int, ...], found) -> tuple[int, ...]:
    """Returns a shape with sizes in place of -1, as far as they follow.

    Args:
      shape: as for `make_mesh`.
      found: the devices.
    """
    known = math.prod(size for size in shape if size != -1)
    if known <= 0:
        return shape
    rest = len(found) // known
    if shape[:2] == (-1, -1) and -1 not in shape[2:]:
        close = math.gcd(_close(found) // math.gcd(_close(found), known), rest)
        return (rest // close, close, *shape[2:])
    if shape.count(-1) > 1:
        return shape
    return tuple(rest if size == -1 else size for size in shape)


def _close(found) -> int:
    """Returns the number of devices with fast links between them."""
    if found[0].platform == "tpu":
        return 16
    here = sum(one.process_index == found[0].process_index for one in found)
    # With one process for each device, machines are not known. Most have 8 devices.
    return here if here > 1 or len(found) == 1 else 8


def specs(params, table: Table, shape=None):
    """Returns a `PartitionSpec` for every array of a network.

    Args:
      params: the arrays, or their shapes.
      table: table of the network.
      shape: number of devices by mesh axis. None takes the current mesh.

    Raises:
      Unsplittable: A mesh axis does not divide an axis of an array of `SMALL` bytes or
        more, or the features in `SUMMED`. The message names the array and what divides
        it.
    """
    shape = shape or jax.sharding.get_abstract_mesh().shape

    def place(path, leaf, names):
        spec = [_axis(path, leaf, n, to, shape, table) for n, to in enumerate(names)]
        return P(*spec)

    return jax.tree_util.tree_map_with_path(place, params, logical_axes(params, table))


def _axis(path, leaf, number: int, name: str, shape, table: Table) -> str | None:
    """Returns the mesh axis of an array's axis, or None if it is replicated."""
    to, size = TO_MESH.get(name), leaf.shape[number]
    if to is None or size % shape[to] == 0:
        return to
    is_small = math.prod(leaf.shape) * leaf.dtype.itemsize < SMALL
    if is_small and name not in SUMMED:
        return None
    fit = [n for n in range(1, min(size, 512) + 1) if size % n == 0]
    raise Unsplittable(
        f"{to}={shape[to]} does not divide the {size} of {table.name}"
        f" {'/'.join(key.key for key in path)} {list(leaf.shape)}; choose {to} from"
        f" {', '.join(map(str, fit))}, and more devices along another axis"
    )


def of_collections(collections):
    """Returns a `PartitionSpec` for every array of a network's collections."""
    return {name: specs(tree, COLLECTIONS[name]) for name, tree in collections.items()}


def shardings(params, table: Table, mesh: Mesh):
    """Returns a NamedSharding for every array of a network, as `specs` splits them."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs(params, table, mesh.shape)
    )


def check_heads(mesh_shape, heads: Collection[int], tokens: int, text: int) -> None:
    """Checks that devices can share the heads and the tokens of all networks.

    Args:
      mesh_shape: number of devices by mesh axis.
      heads: numbers of attention heads of the networks.
      tokens: number of tokens in a latent frame.
      text: number of text tokens.

    Raises:
      Unsplittable: They cannot. The message says what can be chosen.
    """
    tensor, context = mesh_shape["tensor"], mesh_shape["context"]
    common = math.gcd(*heads)
    fit = [n for n in range(1, common + 1) if common % n == 0]
    if common % (tensor * context):
        shown = " and ".join(map(str, sorted(heads)))
        raise Unsplittable(
            f"tensor={tensor} x context={context} does not divide the {shown} attention"
            f" heads; choose a product from {', '.join(map(str, fit))}"
        )
    for what, count in (("tokens of a latent frame", tokens), ("text tokens", text)):
        if count % context:
            ok = [n for n in fit if tokens % n == 0 and text % n == 0]
            raise Unsplittable(
                f"context={context} does not divide the {count} {what}; choose context"
                f" from {', '.join(map(str, ok))}"
            )


def spread(
    function: Callable, variables, in_specs: tuple, out_specs: Any, dtype: Any = None
) -> Callable:
    """Returns `function(variables, *args)`, on a mesh with each device's parts.

    Args:
      function: function of a network's collections and of other arguments.
      variables: the collections, or their shapes.
      in_specs: `PartitionSpec`s of the other arguments.
      out_specs: those of the result.
      dtype: type in which all weights are gathered before the function runs. None
        leaves it to the layers, each time that they use a weight; then one layer is in
        memory at a time.
    """
    if not parallel.is_on_mesh():
        return function
    own = of_collections(variables)

    def one_device(variables, *args):
        found = parallel.parts(variables, own)
        if dtype is not None:
            found = parallel.gathered(found, dtype)
        return function(found, *args)

    return parallel.each_device(one_device, (own, *in_specs), out_specs)


def by_column(clips: jax.Array) -> jax.Array:
    """Returns clips [batch, frame, height, width, channel], split also over columns.

    Devices of one video then share its decoding. Compilers exchange the borders.
    """
    if not parallel.is_on_mesh():
        return clips
    count = math.prod(
        jax.sharding.get_abstract_mesh().shape[axis] for axis in parallel.HEADS
    )
    columns = None if clips.shape[3] % count else parallel.HEADS
    spec = P(split_videos(clips.shape[0]), None, None, columns)
    return jax.lax.with_sharding_constraint(clips, spec)


def split_videos(batch: int) -> tuple[str, ...]:
    """Returns the axes of the current mesh over which a batch of videos is split."""
    shape = jax.sharding.get_abstract_mesh().shape
    return () if batch % math.prod(shape.get(axis, 1) for axis in VIDEOS) else VIDEOS
