"""Recognises, by its first bytes, a file that is not what its name says."""

import pathlib
import re

from anchor_jax.errors import UserError

_START = 1024  # bytes that are looked at
_POINTER = b"version https://git-lfs.github.com/spec/"
_KINDS = (
    (rb"GGUF", "a quantised model in the GGUF format", "take its safetensors original"),
    (rb"\x1f\x8b", "packed with gzip", "unpack it first"),
    (rb"\xfd7zXZ\x00|7z\xbc\xaf\x27\x1c|Rar!", "a packed archive", "unpack it first"),
    (rb"\x89HDF\r\n", "an HDF5 file", "take the .safetensors or .pth original"),
    (rb"(?s).{257}ustar", "a tar archive", "unpack it first"),
    (
        rb"(?is)\s*(<!doctype html|<html|<head|<\?xml)",
        "a web page",
        "the download failed, or its site asks for a login or for terms to be accepted;"
        " download the file itself",
    ),
    (
        rb"(?i)\s*(Entry not found|Invalid username or password|Not found|Access to )",
        "the message of a failed download",
        "download the file again",
    ),
)


def describe_start(start: bytes) -> tuple[str, str] | None:
    """Returns what a file is by its first bytes, and what to do; None if unknown.

    Known are files that are kept or downloaded in place of the one that is meant:
    an empty file, a pointer of Git LFS, a web page, an archive, a model of another
    kind.
    """
    if not start:
        return "empty", "download or copy it again"
    if start.startswith(_POINTER):
        size = re.search(rb"\nsize (\d{1,15})\n", start)
        of = f" of {int(size[1]):,} bytes" if size else ""
        return (
            "a pointer of Git LFS in the place of the file",
            f"fetch the file{of}: run 'git lfs install' and 'git lfs pull' in its"
            " folder, or download it with the hub's own program",
        )
    for pattern, kind, remedy in _KINDS:
        if re.match(pattern, start):
            return kind, remedy
    return None


def check_start(path: pathlib.Path) -> bytes:
    """Returns the first bytes of a file.

    Raises:
      UserError: It cannot be read, its download is unfinished, or it is another kind
        of file than its name says.
    """
    check_finished(path)
    try:
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if found := describe_start(start):
        kind, remedy = found
        raise UserError(f"{path} is {kind}; {remedy}")
    return start


_UNFINISHED = (".aria2", ".incomplete", ".part", ".partial", ".crdownload", ".tmp")


def check_finished(path: pathlib.Path) -> None:
    """Raises `UserError` if a file beside it says that its download goes on.

    aria2 gives a file its full length at once and keeps what is missing beside it.
    """
    for suffix in _UNFINISHED:
        rest = path.with_name(path.name + suffix)
        if rest.is_file() and (suffix == ".aria2" or not path.exists()):
            raise UserError(
                f"{path}: its download is unfinished, {rest.name} is beside it; let the"
                " download end, or start it again"
            )


def unfinished_in(folder: pathlib.Path) -> list[str]:
    """Returns the names of unfinished downloads in a folder, at most five."""
    names = (place.name for place in folder.iterdir())
    return sorted(name for name in names if name.endswith(_UNFINISHED))[:5]
