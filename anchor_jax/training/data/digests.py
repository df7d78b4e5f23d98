"""Hashes of files, which show whether a training's data are unchanged."""

import contextlib
import functools
import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from anchor_jax.errors import UserError


def digest(path: pathlib.Path) -> list[Any]:
    """Returns a file's SHA-256 and its size in bytes, cached until the file changes.

    Raises:
      UserError: The file does not exist or cannot be read.
    """
    with _opened(path) as file:
        status = os.fstat(file.fileno())
        return list(_digest(path, status.st_size, status.st_mtime_ns))


@functools.cache
def _digest(path: pathlib.Path, size: int, changed: int) -> tuple[str, int]:
    del size, changed  # Parts of the cache's key.
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give the path of a file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
