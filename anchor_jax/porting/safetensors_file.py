"""Safetensors files: arrays as views of a mapping, and the texts of the header."""

import json
import math
import mmap
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from anchor_jax.errors import UserError
from anchor_jax.filetypes import check_start

_MAX_HEADER = 2**24  # bytes
_MAX_NAME = 512  # characters
_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def open_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file by name, as read-only views of a mapping.

    Raises:
      UserError: The file does not exist, or its header is damaged.
    """
    return open_with_header(path)[0]


def open_with_header(
    path: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the arrays of a file, and the texts in its header's `__metadata__`.

    Raises is that of `open_safetensors`.
    """
    check_start(path)
    try:
        with path.open("rb") as file:
            length = path.stat().st_size
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; download it again") from error
    try:
        header, start = _header(data, length)
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise ValueError("its __metadata__ is not an object of texts")
        return dict(_views(header, data, start, length)), metadata
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a complete safetensors file: {error}; download it again"
        ) from error


def _header(data: mmap.mmap, length: int) -> tuple[dict[str, Any], int]:
    """Returns the header of a file, and the offset of its data."""
    size = int.from_bytes(data[:8], "little")
    if length < 8 or size > min(length - 8, _MAX_HEADER):
        raise ValueError(f"a header of {size} bytes in a file of {length}")
    header = json.loads(data[8 : 8 + size].decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return header, 8 + size


def _views(
    header: Mapping[str, Any], data: mmap.mmap, start: int, length: int
) -> Iterator[tuple[str, np.ndarray]]:
    spans = []
    for name, entry in header.items():
        dtype, shape, span = _entry(name, entry)
        spans.append((*span, name))
        if span[1] > length - start:
            raise ValueError(f"{name} ends at byte {span[1]} of {length - start}")
        yield name, np.ndarray(shape, dtype, data, start + span[0])
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise ValueError(f"{name} starts at byte {first}, expected {end}")
        end = last
    if end != length - start:
        raise ValueError(f"{length - start} bytes of data, expected {end}")


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """Returns type, shape and span in bytes of a tensor."""
    if len(name) > _MAX_NAME:
        raise ValueError(f"a name of {len(name)} characters")
    try:
        dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
        shape, span = tuple(entry["shape"]), tuple(entry["data_offsets"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name} is described by {entry!r:.80}") from error
    whole = all(type(size) is int and 0 <= size < 2**48 for size in (*shape, *span))
    if not whole or len(span) != 2 or len(shape) > 16:
        raise ValueError(f"{name} has shape {shape!r:.80} and offsets {span!r:.80}")
    expected = math.prod(shape) * dtype.itemsize
    if span[1] - span[0] != expected:
        raise ValueError(f"{name} has {span[1] - span[0]} bytes, expected {expected}")
    return dtype, shape, span
