"""Recognises, by their first bytes, files that are not what their name says."""

import pathlib
import re

from anchor_jax.errors import UserError

_START = 1024  # bytes that are checked
_POINTER = b"version https://git-lfs.github.com/spec/"
_KINDS = (
    (rb"GGUF", "a quantised model in the GGUF format", "use its safetensors original"),
    (rb"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (
        rb"\xfd7zXZ\x00|7z\xbc\xaf\x27\x1c|Rar!",
        "a compressed archive",
        "unpack it first",
    ),
    (rb"\x89HDF\r\n", "an HDF5 file", "use the .safetensors or .pth original"),
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
    """Returns a file's kind by its first bytes, with a remedy, or None if unknown.

    It knows files that often replace the intended one: an empty file, a Git LFS
    pointer, a web page, an archive, or a model of another kind.
    """
    if not start:
        return "empty", "download or copy it again"
    if start.startswith(_POINTER):
        size = re.search(rb"\nsize (\d{1,15})\n", start)
        of = f" of {int(size[1]):,} bytes" if size else ""
        return (
            "a Git LFS pointer instead of the file",
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
      UserError: The file cannot be read, its download is unfinished, or its kind
        differs from its name.
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
    """Raises `UserError` if a file beside it shows an unfinished download.

    aria2 gives a file its full length at once, and lists the missing parts beside it.
    """
    for suffix in _UNFINISHED:
        rest = path.with_name(path.name + suffix)
        if rest.is_file() and (suffix == ".aria2" or not path.exists()):
            raise UserError(
                f"{path}: its download is unfinished, because {rest.name} exists; let"
                " the download finish, or start it again"
            )


def unfinished_in(folder: pathlib.Path) -> list[str]:
    """Returns the names of at most five unfinished downloads in a folder."""
    names = (place.name for place in folder.iterdir())
    return sorted(name for name in names if name.endswith(_UNFINISHED))[:5]
