"""Older names of keyword arguments, accepted for one release."""

import functools
import inspect
import warnings
from collections.abc import Callable

_BETWEEN = ("jax", "contextlib", "jaxtyping")


def renamed_keyword(old: str, new: str) -> Callable:
    """Returns a decorator of functions that accept `new` also under the name `old`.

    The function warns (FutureWarning) when the older name is used. `jax.jit` may take
    the older name as a static argument.
    """

    def decorate(function):
        @functools.wraps(function)
        def accepting(*args, **kwargs):
            if old in kwargs:
                message = f"{function.__name__}: {old}= is now called {new}="
                if new in kwargs:
                    raise TypeError(f"{message}; give one of them")
                warnings.warn(message, FutureWarning, stacklevel=_caller())
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        extra = inspect.Parameter(old, inspect.Parameter.KEYWORD_ONLY, default=None)
        own = inspect.signature(function)
        accepting.__signature__ = own.replace(
            parameters=[*own.parameters.values(), extra]
        )
        return accepting

    return decorate


def _caller() -> int:
    """Returns the stack level, for `warnings.warn`, of the code that called jax."""
    frame, level = inspect.currentframe().f_back.f_back, 2
    while frame.f_globals["__name__"].partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    return level
