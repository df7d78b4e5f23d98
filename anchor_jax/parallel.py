"""One device's part of a network on a mesh, and the collectives between the parts.

`each_device` runs a function on every device of a mesh. Inside it a device has its own
videos (axes data and fsdp), tokens (axis context) and attention heads (axes tensor and
context), and parts of weights (axis fsdp), each a `Part`. The networks call the
functions of this module at the few places where devices exchange something. On one
device, and outside `each_device`, these functions return their argument.

Gradients inside `each_device` are those of the sum over all devices. `reduced` adds
them up, in float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

CONTEXT, TENSOR = "context", "tensor"
HEADS = (TENSOR, CONTEXT)
"""Mesh axes that attention heads are split over; the first is the slowest."""


def is_on_mesh() -> bool:
    """Returns whether the traced program runs on several devices of `jax.set_mesh`.

    Inside `each_device` it is false: the program is that of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and not _inside()


def is_inside() -> bool:
    """Returns whether the traced program is that of one device, in `each_device`."""
    return bool(_inside())


def _inside() -> tuple[str, ...]:
    """Returns the mesh axes of `each_device`, or () outside."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Manual)


def size(*axes: str) -> int:
    """Returns the number of devices along mesh axes, or 1 outside `each_device`."""
    inside, mesh = _inside(), jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes if axis in inside)


def each_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """Returns a function that runs on every device of the mesh with its parts.

    Args:
      function: function of one device's parts.
      in_specs: prefix of the arguments' tree, with a `PartitionSpec` for each array.
      out_specs: the same for the result. A result that is not split must be equal on
        all devices.
    """
    # The checks of replication do not know kernels.
    return jax.shard_map(
        function, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


@struct.dataclass
class Part:
    """A device's part of a weight.

    Attributes:
      value: the part.
      axes: mesh axes that the weight is split over.
      dim: the split axis of the array, counted from the end, so that it stays valid
        for one layer of stacked weights.
    """

    value: jax.Array
    axes: tuple[str, ...] = struct.field(pytree_node=False)
    dim: int = struct.field(pytree_node=False)


def parts(tree, specs):
    """Returns a device's weights, with a `Part` for each that is to be gathered.

    Axes of heads are not gathered: every device computes its own heads.

    Args:
      tree: the arrays inside `each_device`.
      specs: their `PartitionSpec`s.
    """

    def one(value, spec: P):
        for number, axes in enumerate(spec):
            axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
            if axes and TENSOR not in axes:
                return Part(value, axes, number - len(value.shape))
        return value

    return jax.tree.map(one, tree, specs)


def whole(weight: jax.Array | Part, dtype: Any = None) -> jax.Array:
    """Returns a weight on this device, in a type.

    It is cast before it is gathered, so that fewer bytes move. Its gradient is summed
    in float32, and each device keeps the gradient of its part.

    Args:
      weight: a weight, or this device's part of it.
      dtype: type of the result. None keeps the type.
    """
    if not isinstance(weight, Part):
        return weight if dtype is None else weight.astype(dtype)
    dtype = jnp.dtype(dtype or weight.value.dtype)
    return _gather(weight.value, weight.axes, weight.dim, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(value, axes, dim, dtype):
    return jax.lax.all_gather(
        value.astype(dtype), axes, axis=value.ndim + dim, tiled=True
    )


def _gather_forward(value, axes, dim, dtype):
    return _gather(value, axes, dim, dtype), jnp.zeros((), value.dtype)


def _gather_backward(axes, dim, dtype, like, gradient):
    del dtype
    return (_scattered(gradient, axes, dim).astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


def _scattered(gradient: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    """Returns this device's part of the sum of a gradient over the devices."""
    return jax.lax.psum_scatter(
        gradient.astype(jnp.float32),
        axes,
        scatter_dimension=gradient.ndim + dim,
        tiled=True,
    )


def is_part(leaf: Any) -> bool:
    """Returns whether a leaf is a `Part`."""
    return isinstance(leaf, Part)


def gathered(tree, dtype: Any = None):
    """Returns a tree with each `Part` gathered on this device, in a type."""

    def one(leaf):
        return whole(leaf, dtype) if is_part(leaf) else leaf

    return jax.tree.map(one, tree, is_leaf=is_part)


def reduced(gradient, tree, specs):
    """Returns the sum of a gradient over all devices, split like the weights.

    Args:
      gradient: this device's gradient of the gathered weights, float32.
      tree: the weights of this device, from `parts`.
      specs: the weights' `PartitionSpec`s.
    """
    inside = _inside()

    def one(weight, found, spec: P):
        if is_part(weight):
            found = _scattered(found, weight.axes, weight.dim)
        split = {axis for axes in spec for axis in jax.tree.leaves(axes)}
        others = tuple(axis for axis in inside if axis not in split)
        return jax.lax.psum(found, others) if others else found

    return jax.tree.map(one, tree, gradient, specs, is_leaf=is_part)


def once(x: jax.Array) -> jax.Array:
    """Returns a cotangent that all devices of a video have, for one of them.

    The others get zeros, because gradients are those of the sum over the devices.
    """
    if size(*HEADS) == 1:
        return x
    first = jax.lax.axis_index(HEADS) == 0
    return jnp.where(first, x, jnp.zeros_like(x))


def summed(x: jax.Array) -> jax.Array:
    """Returns the sum over the devices that hold the features of a token."""
    return jax.lax.psum(x, TENSOR) if size(TENSOR) > 1 else x


def with_rank(h: jax.Array, rank: int) -> jax.Array:
    """Returns x A of a low-rank update with the part of the rank that B has.

    Args:
      h: [..., rank], x A with a device's part of the rank, or its part of a sum.
      rank: rank that the device's part of B has.
    """
    if h.shape[-1] < rank:
        return jax.lax.all_gather(h, TENSOR, axis=h.ndim - 1, tiled=True)
    if h.shape[-1] > rank:
        return jax.lax.psum_scatter(h, TENSOR, scatter_dimension=h.ndim - 1, tiled=True)
    return h


def own_tokens(x: jax.Array, axis: int) -> jax.Array:
    """Returns this device's tokens of an array with all of them."""
    count = size(CONTEXT)
    if count == 1:
        return x
    each = x.shape[axis] // count
    first = each * jax.lax.axis_index(CONTEXT)
    return jax.lax.dynamic_slice_in_dim(x, first, each, axis)


def all_tokens(x: jax.Array, axis: int) -> jax.Array:
    """Returns the tokens of all devices."""
    if size(CONTEXT) == 1:
        return x
    return jax.lax.all_gather(x, CONTEXT, axis=axis, tiled=True)


def to_heads(x: jax.Array) -> jax.Array:
    """Returns [..., token, dim] with all tokens of some heads, from own tokens."""
    if size(CONTEXT) == 1:
        return x
    last = x.ndim - 1
    return jax.lax.all_to_all(x, CONTEXT, last, last - 1, tiled=True)


def to_tokens(x: jax.Array) -> jax.Array:
    """Returns [..., token, dim] with own tokens of all heads: undoes `to_heads`."""
    if size(CONTEXT) == 1:
        return x
    last = x.ndim - 1
    return jax.lax.all_to_all(x, CONTEXT, last - 1, last, tiled=True)


def own_heads(x: jax.Array) -> jax.Array:
    """Returns [..., dim] with this device's heads along the axis context."""
    return own_tokens(x, x.ndim - 1)
