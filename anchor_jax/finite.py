"""Checks that numbers are finite: neither NaN nor infinite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anchor_jax.errors import UserError

# Bits of a number's exponent, all set if it is not finite.
_EXPONENTS = {
    "float32": (np.uint32, 0x7F800000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}
_STEP = 2**24  # values


def count(array: np.ndarray) -> int:
    """Returns the number of non-finite values, with little additional memory."""
    if array.dtype.name not in _EXPONENTS:
        floating = np.issubdtype(array.dtype, np.floating)
        return int(np.count_nonzero(~np.isfinite(array))) if floating else 0
    kind, mask = _EXPONENTS[array.dtype.name]
    flat = np.ascontiguousarray(array).reshape(-1).view(kind)
    return sum(
        int(np.count_nonzero(flat[at : at + _STEP] & mask == mask))
        for at in range(0, flat.size, _STEP)
    )


@jax.jit
def _counts(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(~jnp.isfinite(leaf), dtype=jnp.float32) for leaf in leaves]


def _is_on_host(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return True
    near = leaf.is_fully_addressable
    return near and all(device.platform == "cpu" for device in leaf.devices())


def check(tree: Any, what: str, remedy: str) -> None:
    """Raises `UserError` if a tree of arrays holds values that are not finite.

    Arrays on an accelerator are reduced there, and arrays on the host in place.

    Args:
      tree: Tree of numpy or JAX arrays.
      what: Start of the message: the owner of the arrays.
      remedy: End of the message.
    """
    found = jax.tree_util.tree_leaves_with_path(tree)
    on_host = [_is_on_host(leaf) for _, leaf in found]
    if all(on_host):
        counts = [count(np.asarray(leaf)) for _, leaf in found]
    else:
        counts = [int(one) for one in _counts([leaf for _, leaf in found])]
    wrong = [
        (path, many) for (path, _), many in zip(found, counts, strict=True) if many
    ]
    if wrong:
        name = "/".join(str(getattr(key, "key", key)) for key in wrong[0][0])
        raise UserError(
            f"{what}: {sum(counts):,} values are not finite (NaN or infinite), in"
            f" {len(wrong)} of {len(found)} arrays, first {name}; {remedy}"
        )
