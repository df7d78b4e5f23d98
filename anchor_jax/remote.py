"""Paths in object storage, gs://BUCKET/NAME, through the library etils.epath.

A bucket has objects and no folders: a write replaces a whole object at once, nothing
can be appended, and nothing is renamed atomically. What is written here is therefore
made in a local file first.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import Any

from anchor_jax.errors import UserError

SCHEME = "gs://"
COMPLETE = "commit_success.txt"
"""Orbax writes this object last: without it a checkpoint is incomplete."""

_ANY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
# The libraries read these as patterns, queries or escapes.
_SPECIAL = re.compile(r"[\x00-\x1f\x7f*?\[\]{}#%\\]")
_EXTRA = "pip install 'anchor_jax[gcs]'"
_ALLOWED = (
    "allowed are a path on this machine or on a mounted disk, and gs://BUCKET/..."
)
_REASON = 300  # characters


def scheme_of(path: str | os.PathLike) -> str:
    """Returns the scheme of a URL, such as `gs`; "" for paths on this machine."""
    text = os.fspath(path)
    # pathlib makes one slash of two.
    if text.startswith("gs:/"):
        return "gs"
    found = _ANY.match(text) if isinstance(text, str) else None
    return found[1] if found else ""


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is in object storage."""
    return not isinstance(path, pathlib.Path) and scheme_of(path) == "gs"


def check_local(path: str | os.PathLike) -> None:
    """Raises UserError unless a path is one of this machine."""
    scheme = scheme_of(path)
    if scheme == "gs":
        raise UserError(
            f"{path}: this cannot be in a bucket; copy it to a path on this machine or"
            " on a mounted disk (gcloud storage cp -r, or gcsfuse), and give that path"
        )
    if scheme:
        _refuse(path, scheme)


def _refuse(path: str | os.PathLike, scheme: str) -> None:
    raise UserError(
        f"{str(path)[:_REASON]}: the scheme {scheme}:// is unknown; {_ALLOWED}; mount"
        " other storage, or copy the files"
    )


def parse(path: str | os.PathLike) -> Any:
    """Returns a path of etils.epath. Nothing is read.

    Raises:
      UserError: The scheme is unknown, the name is not allowed, or the package that
        reaches buckets is missing.
    """
    scheme, text = scheme_of(path), os.fspath(path)
    if scheme != "gs":
        _refuse(path, scheme)
    bucket, _, name = text.removeprefix(SCHEME).partition("/")
    parts = name.rstrip("/").split("/")
    is_plain = all(part and part not in (".", "..") for part in parts)
    is_named = text.startswith(SCHEME) and _BUCKET.fullmatch(bucket)
    if not is_named or not is_plain or _SPECIAL.search(name):
        raise UserError(
            f"{text[:_REASON]!r}: give gs://BUCKET/NAME/..., without empty parts, . and"
            " .., control characters, and * ? [ ] { } # % \\"
        )
    _check_installed(text)
    # It takes long to import.
    from etils import epath

    return epath.Path(f"{SCHEME}{bucket}/{'/'.join(parts)}")


def _check_installed(path: str) -> None:
    """Raises UserError if no package reaches buckets; turns off stale listings."""
    # Otherwise etils.epath prefers TensorFlow wherever it is installed.
    os.environ.setdefault("EPATH_USE_TF", "0")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{path}: buckets need the package gcsfs; {_EXTRA}")
    import fsspec

    # Other processes change the listings.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


@contextlib.contextmanager
def explained(path: Any) -> Iterator[None]:
    """Converts any error about a bucket, except a missing object, into a UserError."""
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    # The libraries raise errors of many kinds.
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:_REASON]
        raise UserError(
            f"{path} cannot be reached ({text}); check its name, the network, and your"
            " access: gcloud auth application-default login"
        ) from error


def is_folder(path: Any) -> bool | None:
    """Returns whether objects have a path as the start of names, or None if none has.

    `exists` of the library says no also if the network fails; this raises UserError.
    """
    try:
        with explained(path):
            return bool(path.stat().is_directory)
    except FileNotFoundError:
        return None


def check(path: Any) -> None:
    """Raises UserError unless a path's bucket exists and may be listed."""
    _, _, bucket, first, *_ = path.parts
    try:
        with explained(path):
            # Listing needs fewer rights than asking for the bucket.
            _objects().ls(bucket, prefix=first)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: the bucket {bucket} does not exist, or you may not list it; make"
            " it, or run: gcloud auth application-default login"
        ) from error


def upload(part: pathlib.Path, path: Any) -> None:
    """Copies a local file to an object, which is replaced as a whole."""
    with explained(path):
        _objects().put_file(str(part), str(path))


def upload_within(seconds: float, part: pathlib.Path, path: Any) -> bool:
    """Copies like `upload`, and returns whether it succeeded in time."""
    done = threading.Event()

    def copy() -> None:
        with contextlib.suppress(UserError, OSError):
            upload(part, path)
            done.set()

    threading.Thread(target=copy, daemon=True).start()
    return done.wait(seconds)


def download(path: Any, place: pathlib.Path) -> None:
    """Copies an object to a local file.

    Raises:
      FileNotFoundError: There is no such object.
    """
    with explained(path):
        _objects().get_file(str(path), str(place))


def remove(path: Any) -> None:
    """Removes an object, or all objects below a name, if there are any.

    Raises:
      UserError: The bucket cannot be reached.
    """
    if is_folder(path):
        with explained(path):
            path.rmtree(missing_ok=True)
        return
    with explained(path):
        path.unlink(missing_ok=True)


def rename_folder(folder: Any, target: Any) -> None:
    """Moves all objects below a name, one by one; those of `target` are removed.

    The mark of a complete checkpoint goes first: what is left of a folder after an
    interruption is then incomplete.
    """
    with explained(folder):
        target.rmtree(missing_ok=True)
        (folder / COMPLETE).unlink(missing_ok=True)
        _objects().mv(str(folder), str(target), recursive=True)


def _objects() -> Any:
    """Returns the objects as etils.epath sees them, too."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)
