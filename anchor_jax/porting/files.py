"""Files of weights and settings, opened by content and checked."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from anchor_jax.errors import UserError
from anchor_jax.filetypes import check_finished, check_start
from anchor_jax.porting.convert import Mismatch
from anchor_jax.porting.safetensors_file import open_with_header
from anchor_jax.porting.torch_file import open_torch

_CHUNK = 2**24
_MAX_JSON = 2**24  # bytes
_MOST_LEVELS = 32


@dataclasses.dataclass(frozen=True)
class Content:
    """The content of a file of weights by name, and the texts in its header, if any."""

    values: Mapping[str, Any]
    header: Mapping[str, str] = dataclasses.field(default_factory=dict)


def open_weights(path: pathlib.Path) -> Content:
    """Returns the content of a .pt, .pth or .safetensors; nothing is executed.

    The format is found from the first bytes, not from the name.

    Raises:
      UserError: The file is missing or damaged, or holds no names.
    """
    if not path.is_file():
        check_finished(path)
        raise UserError(f"{path}: no such file; give a .pt, .pth or .safetensors")
    start = check_start(path)
    is_archive = start.startswith(b"PK")
    if not is_archive and (path.suffix == ".safetensors" or start[8:9] == b"{"):
        return Content(*open_with_header(path))
    content = open_torch(path)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(
            f"{path} holds a {kind}, which must be a dict of names to tensors"
        )
    return Content(content)


def tensors_of(path: pathlib.Path, content: Any) -> dict[str, np.ndarray]:
    """Returns the content if it is a dict of arrays."""
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UserError(
            f"{path}: got a {kind}, which must be a dict of names to tensors"
        )
    problems = [
        f"{name!r:.120}: {type(value).__name__}, expected a tensor"
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, np.ndarray)
    ]
    if problems:
        known = [name for name, value in content.items() if isinstance(value, dict)]
        names = ", ".join(str(name)[:40] for name in known[:6])
        hint = f"; choose --key among {names}" if known else ""
        raise Mismatch([f"{path}: {line}{hint}" for line in problems])
    return dict(content)


def open_files(
    folder: pathlib.Path, files: Sequence[pathlib.Path], stem: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the arrays of one file, or of the shards of an index, and headers.

    Raises:
      UserError: A file is damaged, or its names differ from the index.
    """
    shards = [file for file in files if file.suffix == ".safetensors"]
    index = _index(folder, stem)
    arrays: dict[str, np.ndarray] = {}
    headers: dict[str, str] = {}
    problems = []
    for shard in shards:
        found, header = open_with_header(shard)
        headers |= header
        for name in found.keys() & arrays.keys():
            problems.append(f"{name}: in {shard.name} and in another shard")
        if index is not None:
            own = {name for name, file in index.items() if file == shard.name}
            for name in sorted(own ^ found.keys()):
                which = "lacks it" if name in own else "holds it"
                problems.append(f"{name}: {shard.name} {which}, but the index differs")
        arrays.update(found)
    if problems:
        raise Mismatch(problems)
    return arrays, headers


def shards_of(folder: pathlib.Path, stem: str) -> tuple[pathlib.Path, ...]:
    """Returns the files of a network: one file, an index and its shards, or none."""
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return (single,)
    index = _index(folder, stem)
    if index is None:
        alone = sorted(folder.glob(f"{stem}-*.safetensors"))
        if alone:
            raise UserError(
                f"{alone[0]} is a shard, but {stem}.safetensors.index.json is missing;"
                " download it too"
            )
        return ()
    shards = [_inside(folder, name) for name in sorted(set(index.values()))]
    for shard in shards:
        if not shard.is_file():
            raise UserError(
                f"{shard} is missing, but the index names it; download it too"
            )
    return (folder / f"{stem}.safetensors.index.json", *shards)


def _index(folder: pathlib.Path, stem: str) -> dict[str, str] | None:
    """Returns the file of each name, or None if there are no shards."""
    path = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file() or not path.is_file():
        return None
    index = _json(path).get("weight_map")
    if not isinstance(index, dict) or not all(
        isinstance(file, str) for file in index.values()
    ):
        raise UserError(f"{path}: weight_map must be an object of names to file names")
    return index


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of a shard, which must be in the folder.

    A link may lead to another folder of the same download, as in the cache of
    huggingface_hub (snapshots/REVISION/... to blobs/).
    """
    base = folder.resolve()
    for above in (base, *base.parents):
        if above.parent.name == "snapshots":
            base = above.parent.parent
            break
    plain = name == pathlib.PurePath(name).name and name.isprintable()
    usable = plain and name.endswith(".safetensors")
    if not usable or not (folder / name).resolve().is_relative_to(base):
        raise UserError(
            f"the index in {folder} names {name!r}, which must be a .safetensors inside"
            " the folder; do not trust this download"
        )
    return folder / name


def digest(path: pathlib.Path, progress: Callable[[int], None] | None = None) -> str:
    """Returns the SHA-256 of a file; `progress` is called with bytes read."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            if progress:
                progress(len(chunk))
    return found.hexdigest()


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file, empty if the file does not exist.

    Raises:
      UserError: The file is damaged, too large, or does not hold an object.
    """
    return _json(path) if path.is_file() else {}


def _json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a file of JSON."""
    check_start(path)
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"more than {_MAX_JSON} bytes")
        value = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is not valid JSON: {reason}; download it again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, which must be an object")
    return value


def parsed(text: str) -> Any:
    """Returns the JSON document in a text.

    Raises:
      ValueError: The text is not JSON, or is nested deeper than settings are.
      RecursionError: The text is nested deeper than Python can read.
    """
    value = json.loads(text)
    level, parts = 0, [value]
    while parts := [
        inner
        for part in parts
        if isinstance(part, dict | list)
        for inner in (part.values() if isinstance(part, dict) else part)
    ]:
        level += 1
        if level > _MOST_LEVELS:
            raise ValueError(f"it is nested deeper than {_MOST_LEVELS}")
    return value


def first_of(folder: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    """Returns the first of some files that exists in a folder, or None."""
    return next((folder / name for name in names if (folder / name).is_file()), None)
