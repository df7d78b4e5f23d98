"""Checks every call's arrays against their annotations, while the tests run."""

import dataclasses
import functools
import inspect
import types
import typing

import jax
import jaxtyping

from anchor_jax import axes

MODULES = (
    "anchor_jax.cache",
    "anchor_jax.streaming",
    "anchor_jax.training.losses",
    "anchor_jax.wan",
)


def install():
    """Call it before one of the modules is imported."""
    jaxtyping.install_import_hook(MODULES, "array_checks.checked")


def checked(function):
    """Returns the function with a check of its arguments and of its result.

    It is the type checker of `jaxtyping.jaxtyped`, and looks at nothing but arrays.
    Structures are checked where functions take or return them, not where they are made:
    JAX also makes them of shapes, specifications and placeholders.
    """
    hints = {
        name: hint
        for name, hint in function.__annotations__.items()
        if has_arrays(hint)
    }
    if not hints or function.__name__ == "__init__":
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def check(*args, **kwargs):
        result = function(*args, **kwargs)
        # `jaxtyped` asks for the arguments, and then again with the result.
        given = {"return": result}
        if "return" not in hints:
            given = signature.bind(*args, **kwargs).arguments
        for name, hint in hints.items():
            if name in given and not conforms(given[name], hint):
                raise TypeError(f"{name} is {shapes(given[name])}, not {hint}")
        return result

    return check


def conforms(value, hint):
    """Whether the arrays in a value are as annotated; binds the names of axes."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(conforms(value, part) for part in parts)
    if origin is tuple:
        if len(parts) == 2 and parts[1] is Ellipsis:
            parts = parts[:1] * len(value)
        return (
            isinstance(value, tuple)
            and len(value) == len(parts)
            and all(map(conforms, value, parts))
        )
    if origin is dict:
        return all(conforms(one, parts[1]) for one in value.values())
    if hint in (None, type(None)):
        return value is None
    if origin is typing.Annotated and axes.Stacked[parts[0]] == hint:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), value)
        return conforms(one, parts[0])
    if not inspect.isclass(hint) or hint is typing.Any:
        return True
    if not isinstance(value, hint):
        return False
    return not is_structure(hint) or fields_conform(value)


def fields_conform(value):
    hints = typing.get_type_hints(type(value), include_extras=True)
    with jaxtyping.jaxtyped("context"):
        return all(
            conforms(getattr(value, field.name), hints[field.name])
            for field in dataclasses.fields(value)
        )


def has_arrays(hint):
    if inspect.isclass(hint) and is_structure(hint):
        return True
    parts = typing.get_args(hint)
    is_array = inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)
    return is_array or any(map(has_arrays, parts))


def is_structure(hint):
    """Whether a class is a tree of arrays, by `flax.struct.dataclass`."""
    return "_flax_dataclass" in vars(hint)


def shapes(value):
    return jax.tree.map(
        lambda x: str(jax.typeof(x)) if hasattr(x, "shape") else x, value
    )
