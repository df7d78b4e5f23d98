"""Files of `torch.save`, read without PyTorch and without running what they name.

A file is a zip archive: one pickle says how the object is built, and every storage is
a member of its own, not compressed. The pickle is interpreted here, opcode by opcode;
it can build plain values and views of storages, and there is nothing else it could
reach.
"""

import dataclasses
import math
import mmap
import pathlib
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from anchor_jax.errors import UserError

CONVERT = (
    'python -c "import torch; torch.save(torch.load('
    "'IN', weights_only=True, map_location='cpu'), 'OUT')\""
)

_ADVICE = (
    "nothing was run. Save only the tensors, where it was made:"
    " torch.save(model.state_dict(), 'OUT')"
)

# Limits far above what weights need, so that a small file cannot ask for much.
MAX_PICKLE = 2**22  # bytes
MAX_DEPTH = 64
MAX_VALUES = 10_000_000  # with shared ones counted every time
MAX_EXPANDED = 2**28  # values of a tensor that repeats a smaller storage
MAX_BITS = 1024  # of an integer

_LEGACY = bytes.fromhex("6cfc9c46f9206aa85019")  # the number older files start with
_LOCAL = struct.Struct("<4s5H3I2H")  # a member's own header in a zip archive
_FLAG_ENCRYPTED, _FLAG_SIZES_FOLLOW, _FLAG_UTF8 = 0x1, 0x8, 0x800

_DTYPES = {
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
_STORAGES = {
    "torch.HalfStorage": _DTYPES["torch.float16"],
    "torch.BFloat16Storage": _DTYPES["torch.bfloat16"],
    "torch.FloatStorage": _DTYPES["torch.float32"],
    "torch.DoubleStorage": _DTYPES["torch.float64"],
    "torch.CharStorage": _DTYPES["torch.int8"],
    "torch.ShortStorage": _DTYPES["torch.int16"],
    "torch.IntStorage": _DTYPES["torch.int32"],
    "torch.LongStorage": _DTYPES["torch.int64"],
    "torch.ByteStorage": _DTYPES["torch.uint8"],
    "torch.BoolStorage": _DTYPES["torch.bool"],
    "torch.ComplexFloatStorage": _DTYPES["torch.complex64"],
    "torch.ComplexDoubleStorage": _DTYPES["torch.complex128"],
    # Bytes of any type: the tensors that use it say of which.
    "torch.UntypedStorage": None,
    "torch.storage.UntypedStorage": None,
}


class _Unreadable(Exception):
    """What is wrong with a file, without its name."""


def open_torch(path: str | pathlib.Path) -> Any:
    """Returns the object in a file of `torch.save`, tensors as views of the file.

    Nothing is copied: tensors are read-only arrays over one memory map, which lives as
    long as any of them, and whose pages are read when first touched. The file must not
    change meanwhile. bfloat16 and float8 come in the types of `ml_dtypes`; parameters
    come as their tensors, sizes as tuples, types as numpy's, devices as text.

    Raises:
      UserError: There is no such file, it is not complete, not in the zip format, or
        holds anything but plain values and tensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a .pt or .pth of torch.save")
    try:
        with path.open("rb") as file:
            return _read(_Archive.open(file))
    except _Unreadable as problem:
        raise UserError(f"{path}: {problem}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def release(array: np.ndarray) -> None:
    """Lets the system take back the memory of an array that `open_torch` returned.

    The array stays usable: its pages are read from the file again when touched. Does
    nothing for arrays that are not on a read-only map of a file, or where the system
    cannot.
    """
    owner = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    # A writable map may hold changes that the file has not, which would be lost.
    if not memoryview(owner).readonly or array.size == 0:
        return
    spans = [
        (size - 1) * stride
        for size, stride in zip(array.shape, array.strides, strict=True)
    ]
    base = np.frombuffer(owner, np.uint8).ctypes.data
    start = array.ctypes.data - base + sum(span for span in spans if span < 0)
    stop = start + sum(map(abs, spans)) + array.itemsize
    start -= start % mmap.PAGESIZE
    owner.madvise(mmap.MADV_DONTNEED, start, stop - start)


@dataclasses.dataclass(frozen=True)
class _Archive:
    """A zip archive on a memory map, whose members are found but never unpacked."""

    data: mmap.mmap
    members: dict[str, zipfile.ZipInfo]  # by name, without the common first folder
    folder: str
    end: int  # of all members, in bytes: where the archive's directory starts

    @classmethod
    def open(cls, file) -> "_Archive":
        """Returns the archive in an open file.

        Raises:
          _Unreadable: It is not a complete archive, or its names are not those of one
            saved object.
        """
        head = file.read(64)
        if _LEGACY in head:
            raise _Unreadable(
                "in the format of PyTorch before 1.6, expected a zip archive; convert"
                f" it where PyTorch is installed: {CONVERT}"
            )
        if not head.startswith(b"PK\x03\x04"):
            raise _Unreadable(
                "not a zip archive as torch.save writes it; is it another kind of"
                " file, or the error page of a download?"
            )
        try:
            with zipfile.ZipFile(file) as listing:
                infos, end = listing.infolist(), listing.start_dir
        except (zipfile.BadZipFile, RuntimeError, ValueError) as error:
            raise _Unreadable(
                f"not a complete zip archive ({error}); download or copy it again"
            ) from error
        folder, members = _names(infos)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(data, members, folder, end)

    def span(self, name: str) -> tuple[int, int]:
        """Returns where a member's bytes start and stop, from its own header.

        Raises:
          _Unreadable: It is missing, packed, or not inside the archive.
        """
        if name not in self.members:
            raise _Unreadable(
                f"it has no member {_show(name)} in its folder {_show(self.folder)};"
                " expected a file of torch.save, complete"
            )
        info = self.members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _FLAG_ENCRYPTED:
            raise _Unreadable(
                f"its member {_show(name)} is compressed or encrypted, expected plain"
                " bytes; take the file as torch.save wrote it, not packed again"
            )
        header = info.header_offset
        if not 0 <= header <= self.end - _LOCAL.size:
            raise _Unreadable(
                f"its member {_show(name)} lies outside; download it again"
            )
        return self._local_span(name, info)

    def _local_span(self, name: str, info: zipfile.ZipInfo) -> tuple[int, int]:
        fields = _LOCAL.unpack_from(self.data, info.header_offset)
        magic, _, flags, method, _, _, _, packed, size, name_size, extra = fields
        begin = info.header_offset + _LOCAL.size
        start = begin + name_size + extra
        stop = start + info.file_size
        encoding = "utf-8" if flags & _FLAG_UTF8 else "cp437"
        own_name = self.data[begin : begin + name_size].decode(encoding, "replace")
        # A size of all ones stands in the extra field; flagged ones follow the data.
        told = not flags & _FLAG_SIZES_FOLLOW and size != 2**32 - 1
        agrees = (
            magic == b"PK\x03\x04"
            and own_name == info.orig_filename
            and method == zipfile.ZIP_STORED
            and not flags & _FLAG_ENCRYPTED
            and info.compress_size == info.file_size
            and (not told or packed == size == info.file_size)
        )
        if not agrees or stop > self.end:
            raise _Unreadable(
                f"its member {_show(name)} is not as the archive's directory says;"
                " download or copy it again"
            )
        return start, stop

    def read(self, name: str, limit: int) -> bytes:
        """Returns a member's bytes; it may have `limit` of them."""
        start, stop = self.span(name)
        if stop - start > limit:
            raise _Unreadable(
                f"its member {_show(name)} has {stop - start} bytes, expected at most"
                f" {limit}; {_ADVICE}"
            )
        return self.data[start:stop]


def _names(infos: list[zipfile.ZipInfo]) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """Returns the one folder that all members lie in, and them by name without it.

    Raises:
      _Unreadable: There are several folders, a name twice, or one that leads outside.
    """
    folder, members = "", {}
    for info in infos:
        top, _, name = info.orig_filename.partition("/")
        folder = folder or top
        parts = [top, *name.split("/")]
        if top != folder or not {"", ".", ".."}.isdisjoint(parts) or name in members:
            raise _Unreadable(
                f"its member {_show(info.orig_filename)} is there twice or not under"
                f" the one folder {_show(folder)}; expected a file of torch.save"
            )
        members[name] = info
    return folder, members


def _read(archive: _Archive) -> Any:
    """Returns the object in an archive."""
    order = b"little"
    if "byteorder" in archive.members:
        order = archive.read("byteorder", limit=16)
    if order != b"little":
        raise _Unreadable(
            f"its bytes are in the order {_show(order)}, expected 'little'; save it"
            " again on a little-endian machine"
        )
    value = _Machine(archive).run(archive.read("data.pkl", MAX_PICKLE))
    _measure(value, 0, {})
    return value


def _show(value: Any) -> str:
    """Returns a short text of a value from the file, without control characters."""
    short = reprlib.Repr()
    short.maxlevel, short.maxtuple, short.maxlist, short.maxdict = 2, 8, 8, 4
    short.maxstring = short.maxother = 100
    return short.repr(value)


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name in a pickle: inert, and one of a few."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Where a storage lies in the file, in bytes; no type if tensors bring theirs."""

    dtype: np.dtype | None
    start: int
    stop: int


class _Machine:
    """An interpreter of the pickles that `torch.save` writes.

    It knows the opcodes that build plain values. The one that calls, REDUCE, calls
    only what `_CALLS` holds.
    """

    def __init__(self, archive: _Archive):
        self.archive = archive
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """Returns the object that a pickle builds.

        Raises:
          _Unreadable: It is damaged, or uses what is not known here.
        """
        try:
            for opcode, arg, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self._result()
                self._execute(opcode.name, arg)
        except (ValueError, IndexError, KeyError) as error:
            raise _Unreadable(
                f"its pickle is damaged ({type(error).__name__}: {_show(str(error))});"
                " download or copy it again"
            ) from error
        raise _Unreadable("its pickle ends early; download or copy it again")

    def _execute(self, name: str, arg: Any) -> None:
        if name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self.stack.append(_literal(arg))
        elif name in _TUPLES:
            self.stack.append(self._pop(_TUPLES[name]))
        elif name in _ACTIONS:
            _ACTIONS[name](self, arg)
        elif name == "INST":  # names what it would call
            _find(arg)
            raise _Unreadable(f"its pickle uses the opcode {name}; {_ADVICE}")
        else:
            raise _Unreadable(f"its pickle uses the opcode {name}; {_ADVICE}")

    def _result(self) -> Any:
        if self.marks or len(self.stack) != 1:
            raise ValueError(f"{len(self.stack)} values at its end, expected one")
        return self.stack[0]

    def _pop(self, count: int) -> tuple:
        """Takes the newest values off the stack, oldest first."""
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        taken = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return taken

    def _pop_mark(self) -> tuple:
        """Takes all values since the last mark."""
        return self._pop(max(0, len(self.stack) - self.marks.pop()))

    def ignore(self, _):
        pass

    def set_mark(self, _):
        self.marks.append(len(self.stack))

    def put(self, number):
        self.memo[len(self.memo) if number is None else number] = self.stack[-1]

    def get(self, number):
        self.stack.append(self.memo[number])

    def make_tuple(self, _):
        self.stack.append(self._pop_mark())

    def append(self, _):
        self._extend(self._pop(1))

    def appends(self, _):
        self._extend(self._pop_mark())

    def _extend(self, values: tuple) -> None:
        self._target(list).extend(values)

    def setitem(self, _):
        self._update(self._pop(2))

    def setitems(self, _):
        self._update(self._pop_mark())

    def _update(self, flat: tuple) -> None:
        target = self._target(dict)
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            # The hash of a tuple of shared tuples could take for ever.
            if not isinstance(key, str | int | float | None):
                raise _Unreadable(
                    f"a dictionary's key is a {type(key).__name__}, expected text or a"
                    f" number; {_ADVICE}"
                )
            target[key] = value

    def _target(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"expected a {kind.__name__} to add to")
        return self.stack[-1]

    def build(self, _):
        # What a dictionary carries besides its items (`_metadata`) is dropped.
        self._pop(1)
        self._target(dict)

    def name_global(self, names):
        self.stack.append(_find(names))

    def name_stacked(self, _):
        module, name = self._pop(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is not text")
        self.stack.append(_find(f"{module} {name}"))

    def reduce(self, _):
        function, args = self._pop(2)
        if not isinstance(function, _Global) or not isinstance(args, tuple):
            raise ValueError("a call of what cannot be called")
        if function.name not in _CALLS:
            raise _Unreadable(f"its pickle calls {function.name!r}; {_ADVICE}")
        build, fewest, most = _CALLS[function.name]
        if not fewest <= len(args) <= most:
            raise ValueError(f"{function.name} with {len(args)} arguments")
        self.stack.append(build(self.archive, *args))

    def refer(self, _):
        (record,) = self._pop(1)
        self.stack.append(_storage(self.archive, record))


_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.ignore,
    "FRAME": _Machine.ignore,
    "MARK": _Machine.set_mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.make_tuple,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.setitem,
    "SETITEMS": _Machine.setitems,
    "BUILD": _Machine.build,
    "GLOBAL": _Machine.name_global,
    "STACK_GLOBAL": _Machine.name_stacked,
    "REDUCE": _Machine.reduce,
    "BINPERSID": _Machine.refer,
}


def _literal(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError(f"an integer of {value.bit_length()} bits")
    return value


def _find(names: str) -> _Global | np.dtype:
    """Returns what stands for a global name, written as "module name".

    Raises:
      _Unreadable: It is not one of those that weights need.
    """
    name = names.replace(" ", ".")
    if name in _DTYPES:
        return _DTYPES[name]
    if name in _STORAGES or name in _CALLS:
        return _Global(name)
    if name.startswith("torch.distributed") or name in _WRAPPED:
        raise _Unreadable(
            f"its pickle names {_show(name)}: a tensor kept in parts (DTensor,"
            " ShardedTensor) or with attributes of its own, expected plain tensors."
            " Gather it with full_tensor() in the code that saved it; for plain"
            f" tensors: {CONVERT}"
        )
    raise _Unreadable(
        f"its pickle names {_show(name)}, which plain tensors do not need; {_ADVICE}"
    )


_WRAPPED = {
    "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_wrapper_subclass",
}


def _storage(archive: _Archive, record: Any) -> _Storage:
    """Returns the storage that a pickle refers to.

    Args:
      archive: The file.
      record: ("storage", its type, the member's name, a device, its length in values,
        or in bytes where it has no type).

    Raises:
      _Unreadable: The member is missing or of another length.
    """
    if not isinstance(record, tuple) or len(record) not in (5, 6):
        raise ValueError("a reference that is not to a storage")
    word, kind, key, _, length = record[:5]
    good = word == "storage" and isinstance(kind, _Global) and kind.name in _STORAGES
    if not good or not isinstance(key, str) or not _is_size(length):
        raise ValueError("a reference that is not to a storage")
    dtype = _STORAGES[kind.name]
    start, stop = archive.span(f"data/{key}")
    expected = length * (dtype.itemsize if dtype else 1)
    if stop - start != expected:
        raise _Unreadable(
            f"its storage {_show(key)} has {stop - start} bytes, expected"
            f" {_show(expected)}; download or copy it again"
        )
    return _Storage(dtype, start, stop)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _view(archive: _Archive, storage, offset, shape, strides, dtype) -> np.ndarray:
    """Returns a tensor: values of a storage, at an offset and strides in values.

    Raises:
      _Unreadable: It reaches out of its storage, or repeats it without measure.
    """
    sizes = (shape, strides)
    good = isinstance(storage, _Storage) and isinstance(dtype, np.dtype)
    good = good and all(isinstance(size, tuple) for size in sizes)
    good = good and len(shape) == len(strides) <= 32
    if not good or not all(map(_is_size, (offset, *shape, *strides))):
        raise _Unreadable(
            f"a tensor has shape {_show(shape)}, strides {_show(strides)} and offset"
            f" {_show(offset)}, expected as many strides as axes, none negative"
        )
    length = (storage.stop - storage.start) // dtype.itemsize
    count = math.prod(shape)
    last = offset + sum(
        (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
    )
    if offset > length or count and last >= length:
        raise _Unreadable(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} reaches"
            f" out of its storage of {length} values; download or copy it again"
        )
    if count > max(length, MAX_EXPANDED):
        raise _Unreadable(
            f"a tensor of shape {shape} repeats a storage of {length} values, expected"
            f" at most {MAX_EXPANDED}; save it without expand()"
        )
    # numpy multiplies even what it does not use.
    steps = [
        stride * dtype.itemsize if count and size > 1 else dtype.itemsize
        for size, stride in zip(shape, strides, strict=True)
    ]
    start = storage.start + (offset * dtype.itemsize if count else 0)
    return np.ndarray(shape, dtype, archive.data, start, steps)


def _tensor_v2(archive, storage, offset, shape, strides, *more) -> np.ndarray:
    # More is: whether it takes a gradient, hooks, and how its values are to be read.
    dtype = storage.dtype if isinstance(storage, _Storage) else None
    _refuse_metadata(more[2:])
    return _view(archive, storage, offset, shape, strides, dtype)


def _tensor_v3(archive, storage, offset, shape, strides, _, hooks, dtype, *more):
    del hooks
    _refuse_metadata(more)
    return _view(archive, storage, offset, shape, strides, dtype)


def _refuse_metadata(metadata: tuple) -> None:
    if any(metadata):
        raise _Unreadable(
            f"a tensor is saved as {_show(metadata[0])} of its storage, expected its"
            " values as they are; save it after resolve_conj() and resolve_neg()"
        )


def _parameter(archive, tensor, *_) -> np.ndarray:
    if not isinstance(tensor, np.ndarray):
        raise ValueError("a parameter that is not a tensor")
    return tensor


def _size(archive, values) -> tuple:
    if not isinstance(values, list | tuple) or not all(map(_is_size, values)):
        raise ValueError("a size that is not a list of integers")
    return tuple(values)


def _device(archive, kind, *index) -> str:
    return ":".join(str(part) for part in (kind, *index) if isinstance(part, str | int))


# What may be called, with the fewest and the most arguments it takes.
_CALLS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "collections.OrderedDict": (lambda archive: {}, 0, 0),
    "torch._utils._rebuild_tensor": (_tensor_v2, 4, 4),
    "torch._utils._rebuild_tensor_v2": (_tensor_v2, 6, 7),
    "torch._utils._rebuild_tensor_v3": (_tensor_v3, 7, 8),
    "torch._utils._rebuild_parameter": (_parameter, 3, 3),
    "torch._utils._rebuild_parameter_with_state": (_parameter, 4, 4),
    "torch.Size": (_size, 1, 1),
    "torch.device": (_device, 1, 2),
}


def _measure(
    value: Any, level: int, known: dict[int, tuple[int, int]]
) -> tuple[int, int]:
    """Returns how deep a value is, and how many it holds, counting all repeats.

    Args:
      value: Built by the machine.
      level: How many containers it is in.
      known: What was found for containers, by id.

    Raises:
      _Unreadable: It is too deep (or holds itself), too large, or not a plain value.
    """
    if isinstance(value, _Global | _Storage):
        name = value.name if isinstance(value, _Global) else "a storage"
        raise _Unreadable(f"it holds {name} where a tensor or value is due; {_ADVICE}")
    if not isinstance(value, dict | list | tuple):
        return 0, 1
    depth, count = known.get(id(value), (0, 1))
    if id(value) not in known and level <= MAX_DEPTH:
        for part in value.values() if isinstance(value, dict) else value:
            part_depth, part_count = _measure(part, level + 1, known)
            depth, count = max(depth, part_depth + 1), count + part_count
        known[id(value)] = depth, count
    if level + depth > MAX_DEPTH or count > MAX_VALUES:
        raise _Unreadable(
            f"its values are nested deeper than {MAX_DEPTH} or more than {MAX_VALUES};"
            f" {_ADVICE}"
        )
    return depth, count
