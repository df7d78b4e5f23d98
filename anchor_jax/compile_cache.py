"""A persistent cache of compiled programs, in a folder that only the user can write.

Cached programs run as code. A folder that other users can write to is therefore unsafe.
The owners of objects in a bucket say nothing: there the bucket's permissions decide.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import stat
import time
import warnings
from collections.abc import Callable

import jax

from anchor_jax import compile_writes, io, places, processes, remote
from anchor_jax.errors import UserError

CACHE_VARIABLE = "ANCHOR_JAX_CACHE"
_LOG = logging.getLogger(__name__)

_OFF = ("off", "0", "no", "none")
_ROOT = 0
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_REACHABLE = stat.S_IXGRP | stat.S_IXOTH
_OF_JAX = "persistent compilation cache entry"
_PROGRAM = "*-cache"  # names of jax's files
_PART = ".*-cache.*.part"  # files that a killed process was writing
_OLD = 86400.0  # seconds


def enable(
    tell: Callable[[str], None] = _LOG.warning,
) -> places.Place | None:
    """Turns on the cache of compiled programs and returns its folder, or None.

    The folder is jax's own setting if there is one, otherwise `ANCHOR_JAX_CACHE`,
    otherwise a folder in the user's cache folder. If the folder cannot be used, one
    line says so, nothing is cached, and the result is None. `ANCHOR_JAX_CACHE=off`
    leaves jax's own settings unchanged. Each process of a job writes what it compiled,
    so that all of them find their programs at the next start, in one shared folder or
    in a folder of each host. Several processes on CPUs cache nothing unless
    JAX_PLATFORMS is cpu, or `processes.SAME_ORDER` is in XLA_FLAGS.

    The folder may be in a bucket (gs://BUCKET/NAME). Only the user can check who may
    write to it: whoever can, can run code in this process. A program that is compiled
    within a second is not kept there, because reading it takes about as long; jax's own
    setting changes that.

    Args:
      tell: called with each warning. Default: it goes to the log.
    """
    given = os.environ.get(CACHE_VARIABLE, "")
    if given.lower() in _OFF:
        return None
    if _may_deadlock():
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    compile_writes.install()
    of_jax = jax.config.jax_compilation_cache_dir
    try:
        folder = places.place(of_jax or given or _default())
        check(folder)
    except UserError as error:
        tell(
            f"warning: compiled programs are not cached: {error}; set {CACHE_VARIABLE}"
            " to a folder of your own, or to off"
        )
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    if not isinstance(warnings.showwarning, _Shortened):
        warnings.showwarning = _Shortened(folder, warnings.showwarning, tell)
    if not of_jax:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if not places.is_remote(folder):
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return folder


def _may_deadlock() -> bool:
    """Returns whether processes would wait for each other with cached programs.

    On CPUs the collective operations of a cached program may have a different order
    from those of the program that a process without a cached copy compiles.
    """
    # A program of the user's own may still have to call jax.distributed.initialize.
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return False
    if processes.SAME_ORDER in os.environ.get("XLA_FLAGS", ""):
        return False
    return jax.default_backend() == "cpu"


def check(folder: places.Place) -> None:
    """Makes the folder, and checks that it is safe to use, as far as that can be known.

    Raises:
      UserError: The folder is not writable, or other users can write to it.
    """
    if places.is_remote(folder):
        _check_bucket(folder)
        return
    try:
        _make(folder)
        with io.unfinished(io.temporary_name(folder / "writable")) as test:
            test.write_bytes(b"x")
        _check_owners(folder.resolve())
        _remove_empty(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def _check_bucket(folder: places.Place) -> None:
    """Checks that objects can be written and removed, which jax does not report."""
    places.make_folder(folder)
    test = io.temporary_name(folder / "writable")
    with remote.explained(folder):
        test.write_bytes(b"x")
        test.unlink()


def _default() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base) / "anchor_jax"


def _make(folder: pathlib.Path) -> None:
    """Makes a folder and its missing parents, with access for the user only."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(mode=0o700, exist_ok=True)


def _check_owners(folder: pathlib.Path) -> None:
    """Checks that only this user and root can write to a folder or replace it.

    Raises:
      UserError: Another user can do so.
    """
    if not hasattr(os, "geteuid"):
        return
    trusted = (os.geteuid(), _ROOT)
    status = folder.stat()
    if status.st_uid not in trusted:
        raise UserError(f"{folder} belongs to another user, whose programs would run")
    if status.st_mode & _OTHERS:
        raise UserError(
            f"other users can write to {folder}, so their programs could run; fix it"
            f" with: chmod -R go-w {folder}"
        )
    for parent in folder.parents:
        _check_parent(folder, parent.stat(), trusted)
    is_reachable = bool(status.st_mode & _REACHABLE)
    for name in os.listdir(folder):
        # Another process may remove a file meanwhile.
        with contextlib.suppress(FileNotFoundError):
            _check_file(folder / name, is_reachable, trusted)


def _check_file(path: pathlib.Path, is_reachable: bool, trusted) -> None:
    """Raises UserError if another user owns a file of the folder or can write it."""
    found = path.lstat()
    if found.st_uid not in trusted:
        raise UserError(
            f"{path.parent} holds {path.name}, which belongs to another user and would"
            " run; delete it"
        )
    if found.st_mode & _OTHERS and is_reachable and not stat.S_ISLNK(found.st_mode):
        raise UserError(
            f"{path.parent} holds {path.name}, which other users can write and which"
            f" would run; fix it with: chmod -R go-w {path.parent}"
        )


def _check_parent(folder: pathlib.Path, status: os.stat_result, trusted) -> None:
    """Raises UserError if other users could replace the folder by their own."""
    writers = status.st_mode & _OTHERS
    if status.st_gid == trusted[0]:  # the user's own group, by convention
        writers &= ~stat.S_IWGRP
    if status.st_uid not in trusted or (writers and not status.st_mode & stat.S_ISVTX):
        raise UserError(
            f"other users could replace {folder}, because they can write to a folder"
            " above it"
        )


def _remove_empty(folder: pathlib.Path) -> None:
    """Removes empty and old incomplete files, which a killed process may have left."""
    for path in folder.glob(_PART):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime > _OLD:
                path.unlink()
    for path in folder.glob(_PROGRAM):
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and not found.st_size:
                path.unlink()


@dataclasses.dataclass(eq=False)
class _Shortened:
    """Shows warnings, and shortens jax's warnings about the cache to one line each.

    Attributes:
      folder: the folder of the cache.
      show: the function that shows all other warnings.
      tell: called with each shortened line.
      shown: the kinds of cache warnings that were shown already.
    """

    folder: pathlib.Path
    show: Callable[..., None]
    tell: Callable[[str], None]
    shown: set[str] = dataclasses.field(default_factory=set)

    def __call__(self, message, *where, **more) -> None:
        text = " ".join(str(message).split())
        kind = text.partition(_OF_JAX)[0]
        if _OF_JAX not in text:
            self.show(message, *where, **more)
        elif kind not in self.shown:
            self.shown.add(kind)
            self.tell(
                f"warning: {self.folder}: {text[:200]}; similar warnings are hidden."
                f" Free disk space, delete the folder, or set {CACHE_VARIABLE} to"
                " another folder"
            )
