"""Paths of this machine and of object storage, for code that takes both alike.

`place` returns a path of pathlib or of etils.epath. Other modules take paths of this
machine, which `expand` returns; it refuses those of object storage by name.
"""

import contextlib
import os
import pathlib
from typing import Any

from anchor_jax import remote
from anchor_jax.errors import UserError

_SHOWN = 200  # characters of a reason in a message

Place = Any
"""A path of pathlib, or one of etils.epath in object storage."""

is_remote = remote.is_remote


def place(path: str | os.PathLike) -> Place:
    """Returns a path of this machine, as `expand` does, or one in object storage.

    Raises:
      UserError: As for `expand`; or a path in object storage is not valid.
    """
    return remote.parse(path) if remote.is_remote(path) else expand(path)


def expand(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path of this machine with `~` replaced by the home folder.

    Raises:
      UserError: The path starts with `~` and there is no home folder, the path has a
        NUL character, or it is in object storage.
    """
    remote.check_local(path)
    path = pathlib.Path(path)
    if "\0" in str(path):
        raise UserError(
            f"{str(path)!r:.200}: a path cannot contain a NUL character; remove it"
        )
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: the home folder of this user is unknown; set HOME, or give a"
            " path without ~"
        ) from error


def local(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path of this machine as it is given, with `~`.

    Raises:
      UserError: It is in object storage, or its scheme is unknown.
    """
    remote.check_local(path)
    return pathlib.Path(path)


def given(path: str | os.PathLike) -> Place:
    """Returns a path as it is given, with `~`; it may be in object storage.

    Raises:
      UserError: Its scheme is unknown, or it is not valid in object storage.
    """
    return remote.parse(path) if is_remote(path) else local(path)


def resolved(path: str | os.PathLike) -> Place:
    """Returns the absolute path, with links, `~` and `..` resolved.

    A path in object storage has none of them.

    Raises:
      UserError: There is no home folder, links form a loop, or the path is relative and
        the current folder was removed.
    """
    if is_remote(path):
        return place(path)
    try:
        return expand(path).resolve()
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:_SHOWN]
        raise UserError(
            f"{path} cannot be resolved ({reason}); choose another path"
        ) from error


def absolute(path: Place) -> Place:
    """Returns the path from the root, with links and `..`; maybe in object storage."""
    return path if is_remote(path) else path.absolute()


def explained(path: Place) -> contextlib.AbstractContextManager:
    """Converts errors about a path in object storage into a UserError with a remedy.

    FileNotFoundError, and all errors about other paths, are raised unchanged.
    """
    return remote.explained(path) if is_remote(path) else contextlib.nullcontext()


def exists(path: Place) -> bool:
    """Returns whether a file, an object or a folder exists."""
    if not is_remote(path):
        return os.path.exists(path)
    return remote.is_folder(path) is not None


def is_file(path: Place) -> bool:
    """Returns whether a path is a file or an object."""
    if not is_remote(path):
        return os.path.isfile(path)
    return remote.is_folder(path) is False


def is_dir(path: Place) -> bool:
    """Returns whether a path is a folder, or objects have it as the start of names."""
    if not is_remote(path):
        return os.path.isdir(path)
    return bool(remote.is_folder(path))


def is_within(path: Place, folder: Place) -> bool:
    """Returns whether a path is a folder or below it."""
    return is_remote(path) == is_remote(folder) and path.is_relative_to(folder)


def make_folder(folder: Place) -> None:
    """Makes a folder and its parents; checks that the bucket exists, if it is in one.

    Raises:
      OSError: The folder cannot be made.
      UserError: The bucket cannot be reached.
    """
    if is_remote(folder):
        remote.check(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)


def size_of(path: Place) -> int:
    """Returns the bytes of a file or an object.

    Raises:
      FileNotFoundError: There is none.
    """
    if not is_remote(path):
        return path.stat().st_size
    with remote.explained(path):
        return path.stat().length
