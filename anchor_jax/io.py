"""Writes files atomically, and reads files with errors that name them.

Paths that `place` returned may be in object storage; the functions that say so take
them like those of this machine.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anchor_jax import places, remote
from anchor_jax.errors import UserError, shown

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDIES = {
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a writable folder",
    errno.ENOTDIR: "part of the path is a file; choose another path",
    errno.EEXIST: "part of the path is a file; choose another path",
    errno.EISDIR: "it is a folder; choose a file name",
    errno.ENAMETOOLONG: "choose a shorter name",
}
# Errors of file systems without hard links.
_NO_LINKS = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_SHOWN = 200  # characters of a name in a message
_TRIES = 10
_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2)  # seconds between attempts to remove
_MOST_JSON = 256 * 2**20  # bytes
_DEEPEST_JSON = 64
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair

at_exit: list[Callable[[], None]] = []
"""Functions that `remove_unfinished` also calls."""
before_replacing: list[Callable[[pathlib.Path], None]] = []
"""Functions that are called with a path before it is replaced; they may raise."""

_unfinished: dict[pathlib.Path, bool] = {}  # path: whether only this package renames it
_lock = threading.Lock()
_numbers = itertools.count()
_process = secrets.token_hex(6)


Place = places.Place
place, expand, resolved = places.place, places.expand, places.resolved


def move_folder(folder: Place, target: Place) -> None:
    """Renames a folder; an existing folder of that name is removed first."""
    if places.is_remote(folder):
        remote.rename_folder(folder, target)
        return
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)


@contextlib.contextmanager
def local_copies(folder: Place, names: Sequence[str]) -> Iterator[pathlib.Path]:
    """Yields a folder of this machine with the files of these names that exist.

    It is the folder itself unless that is in object storage.
    """
    if not places.is_remote(folder):
        yield folder
        return
    with scratch_folder() as scratch:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                remote.download(folder / name, scratch / name)
        yield scratch


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a file whose name was read from a list in a folder.

    The file must be in the folder or below it. A link to another place is allowed only
    in the layout of hub downloads: from `snapshots/REVISION` to `blobs` beside
    `snapshots`.

    Raises:
      UserError: The name denotes another place, or there is no such file.
    """
    shown = repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}...")
    try:
        base = folder.resolve()
        place = base / name
        end = place.resolve()
        is_file, is_link = end.is_file(), place.is_symlink()
    # Possible causes: a loop of links, a name that is too long or has a NUL or a
    # surrogate.
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:_SHOWN]
        raise UserError(f"{shown} is not a file in {folder} ({reason})") from error
    is_named = pathlib.Path(os.path.normpath(place)).is_relative_to(base)
    roots = [base, *(_blobs(base) if is_named else ())]
    if not any(end.is_relative_to(root) for root in roots):
        kind = "is a link" if is_named else "leads"
        raise UserError(
            f"{shown} {kind} to {end}, outside {base}; put the file itself into that"
            " folder, or into a folder below it"
        )
    if not is_file:
        kind = f"is a link to {end}, which is missing" if is_link else "is not a file"
        raise UserError(
            f"{shown} {kind} in {base}; put it there, or in a folder below it"
        )
    return place


def _blobs(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of a hub download to which its snapshots link."""
    return [
        above.parent.parent / "blobs"
        for above in (folder, *folder.parents)
        if above.parent.name == "snapshots"
    ]


def temporary_name(path: pathlib.Path) -> pathlib.Path:
    """Returns a unique temporary name beside `path`.

    The name is hidden and has the same suffix: `.video.0f3a9c21b4d5-1.part.mp4`.
    """
    own = f"{_process}-{next(_numbers)}"
    return path.with_name(f".{path.stem}.{own}.part{path.suffix}")


def process_id() -> str:
    """Returns the identifier of this process in its temporary names."""
    return _process


def process_of(name: str) -> str | None:
    """Returns the `process_id` in a temporary name, or None for other names."""
    found = re.fullmatch(r".+\.([0-9a-f]{12})-\d+\.part(\..*)?", name, re.DOTALL)
    return found and found[1]


def _renew() -> None:
    """Gives a forked child its own temporary names."""
    global _process, _lock
    _process, _lock = secrets.token_hex(6), threading.Lock()
    _unfinished.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextlib.contextmanager
def unfinished(part: pathlib.Path, is_ours: bool = True) -> Iterator[pathlib.Path]:
    """Removes a temporary file or folder on exit, unless it was renamed.

    If the process is ended early, `remove_unfinished` removes it.

    Args:
      part: the file or folder.
      is_ours: whether only this package, and no library's thread, renames it.
    """
    with removed_at_end(part, is_ours):
        try:
            yield part
        finally:
            remove(part)


@contextlib.contextmanager
def removed_at_end(part: pathlib.Path, is_ours: bool = False) -> Iterator[pathlib.Path]:
    """Registers a file or folder for `remove_unfinished`; keeps it on exit.

    Args:
      part: the file or folder.
      is_ours: whether only this package, and no library's thread, renames it.
    """
    with _lock:
        _unfinished[part] = is_ours
    try:
        yield part
    finally:
        with _lock:
            _unfinished.pop(part, None)


@contextlib.contextmanager
def scratch_folder() -> Iterator[pathlib.Path]:
    """Yields a new temporary folder, which is removed on exit.

    Raises:
      UserError: The system has no writable folder for temporary files.
    """
    try:
        made = pathlib.Path(tempfile.mkdtemp())
    except OSError as error:
        raise UserError(
            f"no folder for temporary files is writable ({error.strerror}); set TMPDIR"
            " to a writable folder"
        ) from error
    with unfinished(made):
        yield made


def remove_unfinished() -> None:
    """Removes the unfinished temporary files and folders of this process.

    Threads that still write to them will fail soon.
    """
    parts = dict(_unfinished)
    for part, is_ours in parts.items():
        _stop_writing(part, is_ours)
    for call in at_exit:
        call()
    for part in parts:
        remove(part)


def _stop_writing(part: pathlib.Path, is_ours: bool) -> None:
    """Removes an unfinished file or folder to which a thread may still write.

    It is renamed first, because the thread could rename it to its final name. A file
    then takes the place of a folder of ours, so that the thread cannot make it again.
    """
    for _ in range(_TRIES):
        aside = temporary_name(part)
        try:
            part.rename(aside)
        except OSError:
            return
        if is_ours and aside.is_dir():
            with contextlib.suppress(OSError):
                part.open("x").close()
        remove(aside)
        if not part.is_dir():
            return


def remove(part: Place) -> None:
    """Removes a file, or a folder with its content, if possible.

    Tries again if a thread of a library still writes into the folder. It may be in
    object storage.
    """
    if places.is_remote(part):
        with contextlib.suppress(UserError):
            remote.remove(part)
        return
    for seconds in (0, *_PAUSES):
        time.sleep(seconds)
        with contextlib.suppress(OSError):
            if part.is_symlink() or not part.is_dir():
                part.unlink(missing_ok=True)
                return
            shutil.rmtree(part, ignore_errors=True)
            if not part.exists():
                return


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike, keep_new: bool = False
) -> Iterator[pathlib.Path]:
    """Yields a temporary path that is renamed to `path` on a clean exit.

    After an error the temporary file is removed and `path` is unchanged. For a path in
    object storage the temporary file is on this machine, and is uploaded.

    Args:
      path: the final path.
      keep_new: whether to keep a file that another program makes there in the meantime.

    Raises:
      UserError: The folder is not writable, the disk is full, or another program made
        the file meanwhile and `keep_new` is set.
    """
    path = places.given(path)
    if places.is_remote(path):
        with _uploading(path, keep_new) as part:
            yield part
        return
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = keep_new and not path.exists()
        with unfinished(temporary_name(path)) as part:
            yield part
            publish(part, path, is_new)


@contextlib.contextmanager
def _uploading(path: Place, keep_new: bool) -> Iterator[pathlib.Path]:
    """Yields a local path whose file is uploaded to `path` on a clean exit."""
    is_new = keep_new and not places.exists(path)
    with scratch_folder() as scratch:
        part = scratch / path.name
        with explained(part):
            yield part
        for call in before_replacing:
            call(path)
        if is_new and places.exists(path):
            raise _made_meanwhile(path)
        remote.upload(part, path)


@contextlib.contextmanager
def filling(folder: Place) -> Iterator[pathlib.Path]:
    """Yields a folder of this machine for new files, which are uploaded if needed.

    It is the folder itself unless that is in object storage. After an error nothing is
    uploaded.
    """
    if not places.is_remote(folder):
        yield folder
        return
    with scratch_folder() as scratch:
        yield scratch
        for call in before_replacing:
            call(folder)
        for path in sorted(scratch.iterdir()):
            remote.upload(path, folder / path.name)


class Mirror:
    """A folder of this machine for files that a library appends to.

    For a folder in object storage it is a temporary one, whose files `upload` copies.
    Otherwise it is the folder itself.
    """

    def __init__(self, folder: Place):
        self._folder, self._sizes = folder, {}
        self._made = contextlib.ExitStack()
        self.local = folder
        if places.is_remote(folder):
            self.local = self._made.enter_context(scratch_folder())

    def upload(self) -> None:
        """Copies the files that have grown since the last call."""
        if not places.is_remote(self._folder):
            return
        for path in sorted(self.local.iterdir()):
            size = path.stat().st_size
            if self._sizes.get(path.name) != size:
                for call in before_replacing:
                    call(self._folder)
                remote.upload(path, self._folder / path.name)
                self._sizes[path.name] = size

    def close(self) -> None:
        """Copies what has grown, and removes the temporary folder."""
        with self._made:
            self.upload()


def publish(part: pathlib.Path, path: pathlib.Path, is_new: bool = False) -> None:
    """Renames a temporary file.

    Args:
      part: the temporary file.
      path: the final path.
      is_new: whether to keep an existing file of this name and raise.

    Raises:
      UserError: The file exists, and `is_new` is set.
    """
    for call in before_replacing:
        call(path)
    if not is_new:
        os.replace(part, path)
        return
    try:
        _link(part, path)
    except FileExistsError as error:
        raise _made_meanwhile(path) from error


def _made_meanwhile(path: Place) -> UserError:
    return UserError(
        f"{path} was made by another program meanwhile and is not replaced; choose"
        " another folder"
    )


def _link(part: pathlib.Path, path: pathlib.Path) -> None:
    try:
        os.link(part, path)
        part.unlink()
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(part, path)


@contextlib.contextmanager
def making_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a new temporary folder that is renamed to `path` on a clean exit.

    `path` must then be absent or an empty folder. After an error nothing is left.

    Raises:
      UserError: The folder cannot be made, or `path` is no longer empty.
    """
    try:
        with unfinished(temporary_name(path)) as part:
            part.mkdir(parents=True)
            yield part
            for call in before_replacing:
                call(path)
            if path.is_dir():
                path.rmdir()
            part.rename(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error}; choose another folder or free disk"
            " space"
        ) from error


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON; numpy and JAX values are allowed."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=_plain)
    write_text(path, text + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text as UTF-8."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike, kind: type = dict, remedy: str = "") -> Any:
    """Returns the JSON document in a file.

    Args:
      path: the path of the file, which may have at most 256 MiB.
      kind: the required type of the document: `dict` or `list`.
      remedy: the end of the message: what the user can do.

    Raises:
      FileNotFoundError: There is no such file.
      UserError: The file is damaged or too large, or has another type.
    """
    path = places.given(path)
    end = f"; {remedy}" if remedy else ""
    try:
        size = places.size_of(path)
        if size > _MOST_JSON:
            raise ValueError(f"{size} bytes; at most {_MOST_JSON} are allowed")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or not JSON ({reason}){end}") from error
    if not isinstance(value, kind):
        expected = {dict: "an object", list: "a list"}.get(kind, kind.__name__)
        raise UserError(
            f"{path} holds a JSON {type(value).__name__}, expected {expected}{end}"
        )
    return value


def parse_json(content: bytes | str, where: str, remedy: str = "") -> dict[str, Any]:
    """Returns the JSON object in untrusted text.

    It is stricter than `read_json`. It refuses NaN, numbers beyond the range of floats,
    duplicate names in an object, lone surrogates, and more than 64 levels of nesting.

    Args:
      content: text, or UTF-8 bytes.
      where: the name of the source in messages.
      remedy: the end of the message: what the user can do.

    Raises:
      UserError: The text is not a JSON object, or has one of these faults.
    """
    end = f"; {remedy}" if remedy else ""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_unique)
        _check_json(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}{end}") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: got {type(value).__name__}, expected a JSON object{end}"
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate name {shown(twice)} in an object")
    return found


def _check_json(value: Any) -> None:
    """Raises ValueError for too much nesting, non-finite numbers or invalid text."""
    level = [("", value)]
    for _ in range(_DEEPEST_JSON):
        inner: list[tuple[str, Any]] = []
        for name, one in level:
            if isinstance(one, dict):
                inner += [(f"{name}.{key}", key) for key in one]
                inner += [(f"{name}.{key}", value) for key, value in one.items()]
            elif isinstance(one, list):
                inner += [(name, value) for value in one]
            elif isinstance(one, str) and (half := _HALF.search(one)):
                raise ValueError(
                    f"{name[1:] or 'the text'} has U+{ord(half[0]):04X}, a lone"
                    " surrogate"
                )
            elif isinstance(one, float) and not math.isfinite(one):
                text = {math.inf: "Infinity", -math.inf: "-Infinity"}.get(one, "NaN")
                raise ValueError(f"{name[1:]}={text} is not a number in JSON")
        if not inner:
            return
        level = inner
    raise ValueError(f"values are nested more than {_DEEPEST_JSON} levels deep")


def _plain(value: Any) -> Any:
    """Converts a value that JSON does not support to a number, list or string."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


@contextlib.contextmanager
def explained(path: pathlib.Path) -> Iterator[None]:
    """Converts an OSError on writing `path` into a UserError with a remedy.

    Errors that concern other files are raised unchanged.
    """
    try:
        with places.explained(path):
            yield
    except OSError as error:
        if isinstance(error, BrokenPipeError) or not _concerns(error, path):
            raise
        if error.errno in _NO_ROOM:
            remedy = "free some space or choose another disk; nothing was kept"
            raise UserError(f"{path}: no room to write it: {remedy}") from error
        remedy = _REMEDIES.get(error.errno, "choose another path")
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); {remedy}"
        ) from error


def _concerns(error: OSError, path: pathlib.Path) -> bool:
    """Returns whether an error may concern a path, its siblings or its folders."""
    if not isinstance(error.filename, str | os.PathLike):
        return True
    place, wrong = (
        pathlib.Path(os.path.abspath(one)) for one in (path, error.filename)
    )
    return place.is_relative_to(wrong) or wrong.is_relative_to(place.parent)
