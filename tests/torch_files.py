"""Writes files as `torch.save` does, without PyTorch; also such that do harm."""

import collections
import dataclasses
import io
import os
import pathlib
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

ALIGNMENT = 64
PIECE = 2**26  # bytes written at a time
STORAGES = {
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class Call:
    """A global ("module name") called with arguments."""

    function: str
    args: tuple = ()


@dataclasses.dataclass(frozen=True)
class Global:
    """A global ("module name") as a value."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A tensor over the storage of `base`; views of one base share it.

    `length` is the number of values that the file claims for the storage.
    """

    base: Any
    offset: int
    shape: tuple
    strides: tuple  # in values
    length: int | None = None
    metadata: dict | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Parameter:
    """A tensor as a module holds it."""

    data: Any


@dataclasses.dataclass(frozen=True)
class Raw:
    """Opcodes that leave one value on the stack."""

    opcodes: bytes


class Encoder:
    """Collects a pickle of protocol 2, and the storages that it refers to."""

    def __init__(self):
        self.out = io.BytesIO()
        self.memo: dict[str, int] = {}
        self.storages: list[Any] = []

    def encode(self, value) -> bytes:
        self.out.write(b"\x80\x02")
        self.add(value)
        self.out.write(b".")
        return self.out.getvalue()

    def add(self, value) -> None:
        writers = {
            bool: self.add_bool,
            int: self.add_int,
            str: self.add_text,
            float: lambda value: self.out.write(b"G" + struct.pack(">d", value)),
            type(None): lambda _: self.out.write(b"N"),
            tuple: lambda value: self.add_many(b"(", value, b"t"),
            list: lambda value: self.add_many(b"](", value, b"e"),
            dict: self.add_dict,
            collections.OrderedDict: self.add_ordered,
            Call: lambda call: self.add_call(call.function, *call.args),
            Global: lambda item: self.add_global(item.name),
            View: self.add_view,
            Parameter: self.add_parameter,
            Raw: lambda raw: self.out.write(raw.opcodes),
        }
        writers.get(type(value), self.add_tensor)(value)

    def add_bool(self, value):
        self.out.write(b"\x88" if value else b"\x89")

    def add_int(self, value):
        size = value.bit_length() // 8 + 1
        data = value.to_bytes(size, "little", signed=True)
        head = b"\x8a" + bytes([size]) if size < 256 else b"\x8b" + size_of(data)
        self.out.write(head + data)

    def add_text(self, value):
        data = value.encode()
        self.memoized(value, b"X" + size_of(data) + data)

    def add_global(self, name):
        self.memoized("global " + name, b"c" + name.replace(" ", "\n").encode() + b"\n")

    def memoized(self, key, opcodes):
        """Writes a value once, and from then on only its number."""
        known = key in self.memo
        number = self.memo.setdefault(key, len(self.memo))
        long = number > 255
        place = struct.pack("<I" if long else "<B", number)
        if known:
            self.out.write((b"j" if long else b"h") + place)
        else:
            self.out.write(opcodes + (b"r" if long else b"q") + place)

    def add_many(self, start, values, end):
        self.out.write(start)
        for value in values:
            self.add(value)
        self.out.write(end)

    def add_dict(self, value):
        self.add_many(b"}(", (part for item in value.items() for part in item), b"u")

    def add_ordered(self, value):
        self.add_call("collections OrderedDict")
        self.add_many(b"(", (part for item in value.items() for part in item), b"u")
        if vars(value):
            self.add(dict(vars(value)))
            self.out.write(b"b")

    def add_call(self, function, *args):
        self.add_global(function)
        self.add(args)
        self.out.write(b"R")

    def add_tensor(self, array):
        shape = tuple(array.shape)
        strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
        self.add_view(View(array, 0, shape, strides))

    def add_view(self, view):
        dtype = np.dtype(view.base.dtype)
        name = STORAGES.get(dtype.name)
        length = int(np.prod(view.base.shape)) if view.length is None else view.length
        numbers = [number for number, kept in enumerate(self.storages)]
        numbers = [n for n in numbers if self.storages[n] is view.base]
        if not numbers:
            numbers = [len(self.storages)]
            self.storages.append(view.base)
        kind = f"torch {name}" if name else "torch.storage UntypedStorage"
        length *= 1 if name else dtype.itemsize
        rebuild = f"torch._utils _rebuild_tensor_v{2 if name else 3}"
        self.add_global(rebuild)
        self.out.write(b"(")
        self.add(("storage", Global(kind), str(numbers[0]), "cpu", length))
        self.out.write(b"Q")
        rest = [view.offset, view.shape, view.strides, False]
        rest.append(Call("collections OrderedDict"))
        rest += [] if name else [Global(f"torch {dtype.name}")]
        for value in rest + ([view.metadata] if view.metadata else []):
            self.add(value)
        self.out.write(b"tR")

    def add_parameter(self, parameter):
        hooks = Call("collections OrderedDict")
        args = (parameter.data, True, hooks)
        self.add_call("torch._utils _rebuild_parameter", *args)


def size_of(data: bytes) -> bytes:
    return struct.pack("<I", len(data))


def write_torch(path: str | pathlib.Path, value: Any, folder: str = "archive") -> None:
    """Writes a file in the layout of `torch.save`.

    Arrays may be anything with a shape and a dtype that numpy can convert; each is
    converted when it is its turn, and only one is held at a time.

    Args:
      path: The file.
      value: Nested dicts, lists, tuples, text, numbers and arrays, or the types above.
      folder: The first folder of all members.
    """
    encoder = Encoder()
    program = encoder.encode(value)
    write_archive(path, program, encoder.storages, folder)


def write_archive(
    path: str | pathlib.Path,
    program: bytes,
    storages: list[Any] | tuple = (),
    folder: str = "archive",
    byteorder: bytes = b"little",
) -> None:
    """Writes any bytes as the pickle of a file, with arrays as its storages."""
    kept = f"{path}.partial"
    with zipfile.ZipFile(kept, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        _write_member(archive, f"{folder}/data.pkl", program)
        _write_member(archive, f"{folder}/byteorder", byteorder)
        for number, array in enumerate(storages):
            _write_member(archive, f"{folder}/data/{number}", _bytes_of(array))
        _write_member(archive, f"{folder}/version", b"3\n")
    os.replace(kept, path)


def _bytes_of(array) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _write_member(archive: zipfile.ZipFile, name: str, data) -> None:
    """Writes a member whose bytes start at a multiple of the alignment."""
    info = zipfile.ZipInfo(name)
    # The header has 30 bytes, its 64-bit sizes 20, the head of the padding 4.
    start = archive.fp.tell() + 30 + len(name.encode()) + 20 + 4
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
    data = memoryview(data)
    with archive.open(info, "w", force_zip64=True) as member:
        for begin in range(0, len(data), PIECE):
            member.write(data[begin : begin + PIECE])
