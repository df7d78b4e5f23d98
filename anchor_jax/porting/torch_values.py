"""The values that a file of `torch.save` may build, and their limits.

Every call counts against one budget, so that a small file cannot use much memory by
repeating calls with a large argument.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from anchor_jax.porting.torch_archive import ADVICE, CONVERT, Archive, Unreadable, show

MAX_EXPANDED = 2**28  # values of a tensor that repeats a smaller storage
MAX_CALLS = 2**17
MAX_AXES = 32
MAX_TEXT = 256  # characters of a storage's name or a device's kind
_SHARED = 8  # bytes of all tensors, as a multiple of the file's, besides 1 GiB

DTYPES = {
    f"torch.{name}": np.dtype(kind)
    for name, kind in {
        "float16": np.float16,
        "half": np.float16,
        "bfloat16": ml_dtypes.bfloat16,
        "float32": np.float32,
        "float": np.float32,
        "float64": np.float64,
        "double": np.float64,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
        "int8": np.int8,
        "int16": np.int16,
        "int32": np.int32,
        "int64": np.int64,
        "uint8": np.uint8,
        "uint16": np.uint16,
        "uint32": np.uint32,
        "uint64": np.uint64,
        "bool": np.bool_,
        "complex64": np.complex64,
        "complex128": np.complex128,
    }.items()
}
STORAGES = {
    "torch.HalfStorage": DTYPES["torch.float16"],
    "torch.BFloat16Storage": DTYPES["torch.bfloat16"],
    "torch.FloatStorage": DTYPES["torch.float32"],
    "torch.DoubleStorage": DTYPES["torch.float64"],
    "torch.CharStorage": DTYPES["torch.int8"],
    "torch.ShortStorage": DTYPES["torch.int16"],
    "torch.IntStorage": DTYPES["torch.int32"],
    "torch.LongStorage": DTYPES["torch.int64"],
    "torch.ByteStorage": DTYPES["torch.uint8"],
    "torch.BoolStorage": DTYPES["torch.bool"],
    "torch.ComplexFloatStorage": DTYPES["torch.complex64"],
    "torch.ComplexDoubleStorage": DTYPES["torch.complex128"],
    # Bytes without a type: the tensors on it state the type.
    "torch.UntypedStorage": None,
    "torch.storage.UntypedStorage": None,
}


@dataclasses.dataclass(frozen=True)
class Global:
    """A name in a pickle: one of a few names that do nothing."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A storage's span in the file in bytes; `dtype` is None if tensors state it."""

    dtype: np.dtype | None
    start: int
    stop: int


@dataclasses.dataclass
class Builder:
    """An archive, and the totals of what was built from it.

    Attributes:
      archive: The archive of the file.
      calls: Number of calls and references so far.
      shown: Bytes of all tensors, with shared bytes counted every time.
    """

    archive: Archive
    calls: int = 0
    shown: int = 0

    def count_call(self) -> None:
        """Raises `Unreadable` if a file makes more calls than weights need."""
        self.calls += 1
        if self.calls > MAX_CALLS:
            raise Unreadable(f"its pickle makes more than {MAX_CALLS} calls; {ADVICE}")

    def count_bytes(self, size: int) -> None:
        """Raises `Unreadable` if too many tensors view the same bytes."""
        self.shown += size
        most = _SHARED * len(self.archive.data) + 2**30
        if self.shown > most:
            raise Unreadable(
                f"its tensors view more than {most} bytes in all, many of them the"
                f" same; {ADVICE}"
            )


def find(names: str) -> Global | np.dtype:
    """Returns the object for a global name, written as "module name".

    Raises:
      Unreadable: Weights do not need the name.
    """
    name = names.replace(" ", ".")
    if name in DTYPES:
        return DTYPES[name]
    if name in STORAGES or name in CALLS:
        return Global(name)
    if name.startswith("torch.distributed") or name in _WRAPPED:
        raise Unreadable(
            f"its pickle names {show(name)}: a tensor kept in parts (DTensor,"
            " ShardedTensor) or with additional attributes, not a plain tensor."
            " Gather it with full_tensor() in the code that saved it; for plain"
            f" tensors: {CONVERT}"
        )
    raise Unreadable(
        f"its pickle names {show(name)}, which plain tensors do not need; {ADVICE}"
    )


_WRAPPED = {
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_wrapper_subclass",
}


def storage_of(builder: Builder, record: Any) -> Storage:
    """Returns the storage that a pickle refers to.

    Args:
      builder: Builder that holds the file.
      record: ("storage", its type, the member's name, a device, its length in values,
        or in bytes where it has no type).

    Raises:
      Unreadable: The member is missing or of another length.
    """
    if not isinstance(record, tuple) or len(record) not in (5, 6):
        raise ValueError("a reference that is not to a storage")
    word, kind, key, _, length = record[:5]
    good = word == "storage" and isinstance(kind, Global) and kind.name in STORAGES
    good = good and isinstance(key, str) and len(key) <= MAX_TEXT
    if not good or not _is_size(length):
        raise ValueError("a reference that is not to a storage")
    builder.count_call()
    dtype = STORAGES[kind.name]
    start, stop = builder.archive.span(f"data/{key}")
    expected = length * (dtype.itemsize if dtype else 1)
    if stop - start != expected:
        raise Unreadable(
            f"its storage {show(key)} has {stop - start} bytes, expected"
            f" {show(expected)}; download or copy it again"
        )
    return Storage(dtype, start, stop)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _view(builder: Builder, storage, offset, shape, strides, dtype) -> np.ndarray:
    """Returns a tensor: values of a storage, at an offset and strides in values.

    Raises:
      Unreadable: The tensor reaches out of its storage, or repeats it too often.
    """
    sizes = (shape, strides)
    good = isinstance(storage, Storage) and isinstance(dtype, np.dtype)
    good = good and all(isinstance(size, tuple) for size in sizes)
    good = good and len(shape) == len(strides) <= MAX_AXES
    if not good or not all(map(_is_size, (offset, *shape, *strides))):
        raise Unreadable(
            f"a tensor has shape {show(shape)}, strides {show(strides)} and offset"
            f" {show(offset)}, expected as many strides as axes, none negative"
        )
    length = (storage.stop - storage.start) // dtype.itemsize
    count = math.prod(shape)
    last = offset + sum(
        (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
    )
    if offset > length or count and last >= length:
        raise Unreadable(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} reaches"
            f" out of its storage of {length} values; download or copy it again"
        )
    if count > max(length, MAX_EXPANDED):
        raise Unreadable(
            f"a tensor of shape {shape} repeats a storage of {length} values, at most"
            f" {MAX_EXPANDED} are allowed; save it without expand()"
        )
    builder.count_bytes(count * dtype.itemsize)
    # numpy also multiplies strides that it does not use.
    steps = [
        stride * dtype.itemsize if count and size > 1 else dtype.itemsize
        for size, stride in zip(shape, strides, strict=True)
    ]
    start = storage.start + (offset * dtype.itemsize if count else 0)
    return np.ndarray(shape, dtype, builder.archive.data, start, steps)


def _tensor_v2(builder, storage, offset, shape, strides, *more) -> np.ndarray:
    # Further arguments: whether it takes a gradient, hooks, and how to read its values.
    dtype = storage.dtype if isinstance(storage, Storage) else None
    _refuse_metadata(more[2:])
    return _view(builder, storage, offset, shape, strides, dtype)


def _tensor_v3(builder, storage, offset, shape, strides, _, hooks, dtype, *more):
    del hooks
    _refuse_metadata(more)
    return _view(builder, storage, offset, shape, strides, dtype)


def _refuse_metadata(metadata: tuple) -> None:
    if any(metadata):
        raise Unreadable(
            f"a tensor is saved as {show(metadata[0])} of its storage, not as its"
            " plain values; save it after resolve_conj() and resolve_neg()"
        )


def _parameter(builder, tensor, *_) -> np.ndarray:
    if not isinstance(tensor, np.ndarray):
        raise ValueError("a parameter that is not a tensor")
    return tensor


def _size(builder, values) -> tuple:
    short = isinstance(values, list | tuple) and len(values) <= MAX_AXES
    if not short or not all(map(_is_size, values)):
        raise ValueError(f"a size that is not a list of at most {MAX_AXES} integers")
    return tuple(values)


def _device(builder, kind, *index) -> str:
    if not isinstance(kind, str) or len(kind) > MAX_TEXT:
        raise ValueError("a device whose name is not a short text")
    if not all(one is None or _is_size(one) for one in index):
        raise ValueError("a device whose number is not an integer")
    return ":".join(str(part) for part in (kind, *index) if part is not None)


# Functions that may be called, with their least and greatest numbers of arguments.
CALLS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "collections.OrderedDict": (lambda builder: {}, 0, 0),
    "torch._utils._rebuild_tensor": (_tensor_v2, 4, 4),
    "torch._utils._rebuild_tensor_v2": (_tensor_v2, 6, 7),
    "torch._utils._rebuild_tensor_v3": (_tensor_v3, 7, 8),
    "torch._utils._rebuild_parameter": (_parameter, 3, 3),
    "torch._utils._rebuild_parameter_with_state": (_parameter, 4, 4),
    "torch.Size": (_size, 1, 1),
    "torch.device": (_device, 1, 2),
}
