"""Writes safetensors files tensor by tensor, whole or in shards."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from anchor_jax import io, trees
from anchor_jax.errors import UserError
from anchor_jax.porting.convert import Place, places
from anchor_jax.porting.key_tables import UMT5_ALIAS

_WRITTEN = {
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
}

Read = Callable[[str], np.ndarray]
"""A function from a path to a leaf."""
Progress = Callable[[int], None] | None
"""A function that is called with the number of bytes written."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor to write: its place in the tree and its description."""

    name: str
    place: Place
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def tensors_of(tree: Any, table: tuple) -> list[Tensor]:
    """Returns the tensors of a tree of shapes, those of one leaf together.

    The widest types come first, so that each tensor starts at a multiple of its width.
    """
    leaves = trees.flatten(tree)
    wrong = sorted({str(leaf.dtype) for leaf in leaves.values()} - _names())
    if wrong:
        raise UserError(f"types {', '.join(wrong)}, expected {', '.join(_names())}")
    found = []
    for place in places(tree, table):
        leaf = leaves[place.path]
        shape = place.shape(tuple(leaf.shape))
        found.append(Tensor(place.name, place, np.dtype(leaf.dtype), shape))
    return sorted(found, key=lambda one: -one.dtype.itemsize)


def _names() -> set[str]:
    return {dtype.name for dtype in _WRITTEN}


def with_alias(tensors: list[Tensor]) -> list[Tensor]:
    """Returns the tensors of a text encoder, its embedding under both names."""
    alias, name = UMT5_ALIAS
    at = next(at for at, one in enumerate(tensors) if one.name == name)
    again = dataclasses.replace(tensors[at], name=alias)
    return [*tensors[: at + 1], again, *tensors[at + 1 :]]


def write(
    folder: pathlib.Path,
    stem: str,
    tensors: Sequence[Tensor],
    read: Read,
    limit: int | None = None,
    progress: Progress = None,
) -> None:
    """Writes tensors to one file, or to shards and their index.

    Args:
      folder: The folder, which is created if missing.
      stem: Name of the file before `.safetensors`.
      tensors: The tensors, those of one leaf together.
      read: Function from a path to a leaf.
      limit: Largest number of bytes in a file, or None.
      progress: Called with the number of bytes written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, limit)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}.safetensors"
        if len(shards) > 1:
            file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {one.name: file for one in shard}
        with (folder / file).open("wb") as opened:
            write_file(opened, shard, read, progress)
    if len(shards) > 1:
        total = sum(one.nbytes for one in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        io.write_json(folder / f"{stem}.safetensors.index.json", index)


def _split(tensors: Sequence[Tensor], limit: int | None) -> list[list[Tensor]]:
    """Returns the tensors in groups of at most `limit` bytes, or of one tensor."""
    runs: list[list[Tensor]] = [[]]
    size = 0
    for one in tensors:
        if runs[-1] and limit is not None and size + one.nbytes > limit:
            runs.append([])
            size = 0
        runs[-1].append(one)
        size += one.nbytes
    return runs


def write_file(
    file: BinaryIO,
    tensors: Sequence[Tensor],
    read: Read,
    progress: Progress,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file: the header, then the tensors one by one."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for one in tensors:
        span = [end, end + one.nbytes]
        end = span[1]
        header[one.name] = {
            "dtype": _WRITTEN[one.dtype],
            "shape": list(one.shape),
            "data_offsets": span,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for path, group in itertools.groupby(tensors, lambda one: one.place.path):
        leaf = read(path)
        for one in group:
            part = one.place.take(leaf)
            file.write(part.reshape(-1).view(np.uint8).data)
            if progress:
                progress(one.nbytes)
        # Otherwise two leaves would be in memory while the next leaf is read.
        del leaf, part
