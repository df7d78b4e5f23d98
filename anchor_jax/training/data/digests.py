"""Hashes of files, which show whether a training's data are unchanged."""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator
from typing import Any

from anchor_jax import io, places
from anchor_jax.errors import UserError

_PART = 2**20  # bytes


def digest(path: io.Place) -> list[Any]:
    """Returns a file's SHA-256 and its size in bytes, cached until the file changes.

    Raises:
      UserError: The file does not exist or cannot be read.
    """
    if places.is_remote(path):
        return list(_hashed(path))
    with _opened(path) as file:
        status = os.fstat(file.fileno())
        return list(_digest(path, status.st_size, status.st_mtime_ns))


@functools.cache
def _digest(path: io.Place, size: int, changed: int) -> tuple[str, int]:
    del size, changed  # Parts of the cache's key.
    return _hashed(path)


def _hashed(path: io.Place) -> tuple[str, int]:
    found, size = hashlib.sha256(), 0
    with _opened(path) as file:
        while part := file.read(_PART):
            found.update(part)
            size += len(part)
    return found.hexdigest(), size


@contextlib.contextmanager
def _opened(path: io.Place) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give the path of a file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
