"""Files: written whole or not at all, and read with errors that name them."""

import contextlib
import errno
import json
import os
import pathlib
import secrets
import shutil
import threading
from collections.abc import Iterator
from typing import Any

from anchor_jax.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDIES = {
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOTDIR: "part of the path is a file; choose another path",
    errno.EEXIST: "part of the path is a file; choose another path",
    errno.EISDIR: "it is a folder; choose a file name",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_MOST_JSON = 256 * 2**20  # bytes

_unfinished: set[pathlib.Path] = set()
_turn = threading.Lock()


def expand(path: str | os.PathLike) -> pathlib.Path:
    """Returns a path whose `~` is replaced by the home folder.

    Raises:
      UserError: The path begins with `~` and there is no home folder.
    """
    path = pathlib.Path(path)
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: the home folder of this user is unknown; set HOME, or give a"
            " path without ~"
        ) from error


def temporary_name(path: pathlib.Path) -> pathlib.Path:
    """Returns a name beside `path` that no other process or thread chooses.

    The name is hidden and keeps the suffix: `.video.0f3a9c21b4d5.part.mp4`.
    """
    return path.with_name(f".{path.stem}.{secrets.token_hex(6)}.part{path.suffix}")


@contextlib.contextmanager
def unfinished(part: pathlib.Path) -> Iterator[pathlib.Path]:
    """Removes a temporary file or folder on exit, if it still has its name.

    `remove_unfinished` removes it earlier, where a process ends at once.
    """
    with _turn:
        _unfinished.add(part)
    try:
        yield part
    finally:
        _remove(part)
        with _turn:
            _unfinished.discard(part)


def remove_unfinished() -> None:
    """Removes the temporary files and folders that this process is making."""
    for part in list(_unfinished):
        _remove(part)


def _remove(part: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path that becomes `path` on a clean exit.

    On an error the temporary file is removed and `path` keeps what it had.

    Raises:
      UserError: The folder cannot be written to, or the disk is full.
    """
    path = pathlib.Path(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(temporary_name(path)) as part:
            yield part
            os.replace(part, path)


@contextlib.contextmanager
def making_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new temporary folder that becomes `path` on a clean exit.

    `path` must be absent or an empty folder then. On an error nothing is left.

    Raises:
      UserError: The folder cannot be made, or `path` has been filled meanwhile.
    """
    try:
        with unfinished(temporary_name(path)) as part:
            part.mkdir(parents=True)
            yield part
            if path.is_dir():
                path.rmdir()
            part.rename(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error}; choose another folder or make room"
        ) from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, numpy and JAX numbers and arrays included."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=_plain)
    write_text(path, text + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text as UTF-8."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike, kind: type = dict, remedy: str = "") -> Any:
    """Returns the JSON document in a file.

    Args:
      path: the file, at most 256 MiB.
      kind: type that the document must have: `dict` or `list`.
      remedy: what the user can do, put at the end of the message.

    Raises:
      FileNotFoundError: There is no such file.
      UserError: The file is damaged, too large or holds another type.
    """
    path = pathlib.Path(path)
    end = f"; {remedy}" if remedy else ""
    try:
        size = path.stat().st_size
        if size > _MOST_JSON:
            raise ValueError(f"{size} bytes, at most {_MOST_JSON} are read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or no JSON ({reason}){end}") from error
    if not isinstance(value, kind):
        expected = {dict: "an object", list: "a list"}.get(kind, kind.__name__)
        raise UserError(
            f"{path} holds a JSON {type(value).__name__}, expected {expected}{end}"
        )
    return value


def _plain(value: Any) -> Any:
    """Returns a number or list for what JSON does not know."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


@contextlib.contextmanager
def explained(path: pathlib.Path) -> Iterator[None]:
    """Turns a failure to write into a message that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            remedy = "free some space or choose another disk; nothing was kept"
            raise UserError(f"{path}: no room to write it: {remedy}") from error
        remedy = _REMEDIES.get(error.errno, "choose another path")
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); {remedy}"
        ) from error
