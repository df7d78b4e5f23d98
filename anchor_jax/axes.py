"""Types of arrays: the kind of their values and the names of their axes.

`Float[Array, "batch frame dim"]` is an array of floating-point numbers with three axes.
Within one call, and within one structure, equal names mean equal sizes. `*axes` stands
for any number of axes, and `""` for none. The annotations cost nothing at run time. The
tests check arguments and results of every call (`tests/array_checks.py`), but not what
iterators yield.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key

Array = jax.Array | np.ndarray | jax.ShapeDtypeStruct
"""An array of JAX or numpy, a tracer, or the shape of an array that is not made."""

Number = int | np.integer | Int[Array, ""]
"""A whole number, such as a latent frame, known on the host or traced."""

Flag = bool | np.bool_ | Bool[Array, ""]
"""A truth value, known on the host or traced."""

RandomKey = Key[Array, ""]

Latents = Float[Array, "batch frame height width channel"]
Pixels = Float[Array, "batch pixel_frame pixel_height pixel_width 3"]
Tokens = Float[Array, "batch frame token dim"]
Embedding = Float[Array, "batch text text_dim"]
"""The text encoder's output; rows past a prompt's end are zero."""

Variables = Mapping[str, Any]
"""Collections of a network by name: `params`, and `lora` if its updates are apart."""

Params = Mapping[str, Any]
"""Nested mappings with arrays as leaves."""

_T = TypeVar("_T")
Stacked = Annotated[_T, "every array has one more axis, the first"]

Specs = Annotated[_T, "a jax.sharding.PartitionSpec takes the place of arrays"]
