"""Compiled programs, kept from run to run in a folder that only the user may write.

What is in the folder runs as code of whoever reads it.
"""

import contextlib
import dataclasses
import os
import pathlib
import stat
import sys
import warnings
from collections.abc import Callable

from anchor_jax import io
from anchor_jax.errors import UserError

CACHE_VARIABLE = "ANCHOR_JAX_CACHE"

_OFF = ("off", "0", "no", "none")
_ROOT = 0
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_REACHABLE = stat.S_IXGRP | stat.S_IXOTH
_OF_JAX = "persistent compilation cache entry"
_PROGRAM = "*-cache"  # what jax calls its files


def enable() -> pathlib.Path | None:
    """Keeps compiled programs from run to run, and returns the folder.

    It is the folder that jax was given, else that of `ANCHOR_JAX_CACHE`, else one in
    the user's cache folder. None: they are not kept. A folder that cannot be used is
    reported in one line. `ANCHOR_JAX_CACHE=off` leaves all as jax has it.
    """
    import jax

    given = os.environ.get(CACHE_VARIABLE, "")
    if given.lower() in _OFF:
        return None
    of_jax = jax.config.jax_compilation_cache_dir
    if of_jax and "://" in of_jax:  # on another machine
        return pathlib.Path(of_jax)
    try:
        folder = io.expand(of_jax or given or _default())
        check(folder)
    except UserError as error:
        print(
            f"warning: compiled programs are not kept: {error}; set {CACHE_VARIABLE} to"
            " a folder of your own, or to off",
            file=sys.stderr,
        )
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    if not isinstance(warnings.showwarning, _Shortened):
        warnings.showwarning = _Shortened(folder, warnings.showwarning)
    if not of_jax:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return folder


def check(folder: pathlib.Path) -> None:
    """Makes the folder, and finds out whether it is safe to use.

    Raises:
      UserError: It cannot be written to, or others can write to it.
    """
    try:
        _make(folder)
        with io.unfinished(io.temporary_name(folder / "writable")) as test:
            test.write_bytes(b"x")
        _check_owners(folder.resolve())
        _remove_empty(folder)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error


def _default() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base) / "anchor_jax"


def _make(folder: pathlib.Path) -> None:
    """Makes a folder, and those above it, for the user alone."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(mode=0o700, exist_ok=True)


def _check_owners(folder: pathlib.Path) -> None:
    """Raises if another user than root may write what is in a folder, or replace it.

    Raises:
      UserError: One may.
    """
    if not hasattr(os, "geteuid"):
        return
    trusted = (os.geteuid(), _ROOT)
    status = folder.stat()
    if status.st_uid not in trusted:
        raise UserError(f"{folder} belongs to another user, whose programs would run")
    if status.st_mode & _OTHERS:
        raise UserError(
            f"{folder} can be written by others, whose programs would run; chmod -R"
            f" go-w {folder}"
        )
    for parent in folder.parents:
        _check_parent(folder, parent.stat(), trusted)
    is_reachable = bool(status.st_mode & _REACHABLE)
    for name in os.listdir(folder):
        # Another process may remove a file meanwhile.
        with contextlib.suppress(FileNotFoundError):
            _check_file(folder / name, is_reachable, trusted)


def _check_file(path: pathlib.Path, is_reachable: bool, trusted) -> None:
    """Raises if another user owns a file of the folder, or can write it."""
    found = path.lstat()
    if found.st_uid not in trusted:
        raise UserError(
            f"{path.parent} holds {path.name} of another user, which would run; delete"
            " it"
        )
    if found.st_mode & _OTHERS and is_reachable and not stat.S_ISLNK(found.st_mode):
        raise UserError(
            f"{path.parent} holds {path.name}, which others can write and which would"
            f" run; chmod -R go-w {path.parent}"
        )


def _check_parent(folder: pathlib.Path, status: os.stat_result, trusted) -> None:
    """Raises if others could put a folder of their own in the place of one."""
    writers = status.st_mode & _OTHERS
    if status.st_gid == trusted[0]:  # the user's own group, by convention
        writers &= ~stat.S_IWGRP
    if status.st_uid not in trusted or (writers and not status.st_mode & stat.S_ISVTX):
        raise UserError(
            f"{folder} can be replaced by others, who may write to a folder above it"
        )


def _remove_empty(folder: pathlib.Path) -> None:
    """Removes programs without content, which a process that was killed may leave."""
    for path in folder.glob(_PROGRAM):
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and not found.st_size:
                path.unlink()


@dataclasses.dataclass(eq=False)
class _Shortened:
    """Shows warnings; of jax's that a program cannot be kept or read one line each.

    Attributes:
      folder: of the programs.
      show: shows other warnings.
    """

    folder: pathlib.Path
    show: Callable[..., None]
    shown: set[str] = dataclasses.field(default_factory=set)

    def __call__(self, message, *where, **more) -> None:
        text = " ".join(str(message).split())
        kind = text.partition(_OF_JAX)[0]
        if _OF_JAX not in text:
            self.show(message, *where, **more)
        elif kind not in self.shown:
            self.shown.add(kind)
            print(
                f"warning: {self.folder}: {text[:200]}; more are not shown; make room,"
                f" or delete the folder, or set {CACHE_VARIABLE} to another one",
                file=sys.stderr,
            )
