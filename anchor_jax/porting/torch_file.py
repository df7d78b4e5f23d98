"""Reads files of `torch.save` without PyTorch and without running their code.

A file is a zip archive: one pickle describes the object, and every storage is an
uncompressed member. This module interprets the pickle opcode by opcode. It can build
only plain values and views of storages.
"""

import mmap
import pathlib
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

from anchor_jax.errors import UserError
from anchor_jax.porting.torch_archive import ADVICE, Archive, Unreadable, show
from anchor_jax.porting.torch_values import (
    CALLS,
    Builder,
    Global,
    Storage,
    find,
    storage_of,
)

# Limits far above the needs of weights, so that a small file cannot use much memory.
MAX_PICKLE = 2**22  # bytes
MAX_OPCODES = 2**20
MAX_DEPTH = 64
MAX_VALUES = 10_000_000  # with shared values counted every time
MAX_BITS = 1024  # of an integer
MAX_KEY = 2**60  # of an integer that is a key


def open_torch(path: str | pathlib.Path) -> Any:
    """Returns the object in a file of `torch.save`, with tensors as views of the file.

    Nothing is copied: tensors are read-only arrays on one memory map, which lives as
    long as any of them. Its pages are read when first touched, so the file must not
    change meanwhile. bfloat16 and float8 have the types of `ml_dtypes`. Parameters
    become tensors, sizes tuples, types numpy types, and devices text.

    Raises:
      UserError: The file does not exist, is incomplete, is not in the zip format, or
        holds objects other than plain values and tensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .pt or .pth of torch.save")
    try:
        with path.open("rb") as file:
            return _read(Archive.open(file))
    except Unreadable as problem:
        raise UserError(f"{path}: {problem}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def release(array: np.ndarray) -> None:
    """Lets the system reclaim the memory of an array that `open_torch` returned.

    The array stays usable: its pages are read from the file again when touched. The
    call has no effect on arrays outside a read-only map of a file, or on systems
    without support.
    """
    owner = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
        return
    # A writable map may hold changes that are not in the file and would be lost.
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


def _read(archive: Archive) -> Any:
    """Returns the object in an archive."""
    order = b"little"
    if "byteorder" in archive.members:
        order = archive.read("byteorder", limit=16)
    if order != b"little":
        raise Unreadable(
            f"its byte order is {show(order)}, not 'little'; save it again on a"
            " little-endian machine"
        )
    value = _Machine(archive).run(archive.read("data.pkl", MAX_PICKLE))
    _measure(value, 0, {})
    return value


class _Machine:
    """An interpreter of the pickles that `torch.save` writes.

    It knows the opcodes that build plain values. The opcode REDUCE calls a function,
    which must be in `CALLS`.
    """

    def __init__(self, archive: Archive):
        self.builder = Builder(archive)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """Returns the object of a pickle.

        Raises:
          Unreadable: The pickle is damaged, or uses an unknown opcode or name.
        """
        try:
            for count, (opcode, arg, _) in enumerate(pickletools.genops(program)):
                if count >= MAX_OPCODES:
                    raise Unreadable(
                        f"its pickle has more than {MAX_OPCODES} opcodes; {ADVICE}"
                    )
                if opcode.name == "STOP":
                    return self._result()
                self._execute(opcode.name, arg)
        except (ValueError, IndexError, KeyError) as error:
            raise Unreadable(
                f"its pickle is damaged ({type(error).__name__}: {show(str(error))});"
                " download or copy it again"
            ) from error
        raise Unreadable("its pickle ends early; download or copy it again")

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
        elif name == "INST":  # names a callable
            find(arg)
            raise Unreadable(f"its pickle uses the opcode {name}; {ADVICE}")
        else:
            raise Unreadable(f"its pickle uses the opcode {name}; {ADVICE}")

    def _result(self) -> Any:
        if self.marks or len(self.stack) != 1:
            raise ValueError(f"{len(self.stack)} values at its end, not one")
        return self.stack[0]

    def _pop(self, count: int) -> tuple:
        """Removes the newest values from the stack, and returns them oldest first."""
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        taken = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return taken

    def _pop_mark(self) -> tuple:
        """Removes and returns all values since the last mark."""
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
            # The hash of a tuple of shared tuples could take unlimited time, and so
            # could a dictionary of large integers that all have the same hash.
            if not isinstance(key, str | int | float | None):
                raise Unreadable(
                    f"a dictionary's key is a {type(key).__name__}, must be text or a"
                    f" number; {ADVICE}"
                )
            if isinstance(key, int) and abs(key) > MAX_KEY:
                raise Unreadable(
                    f"a dictionary's key is an integer above {MAX_KEY}; {ADVICE}"
                )
            target[key] = value

    def _target(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"only a {kind.__name__} can be added to")
        return self.stack[-1]

    def build(self, _):
        # State of a dictionary besides its items (`_metadata`) is dropped.
        self._pop(1)
        self._target(dict)

    def name_global(self, names):
        self.stack.append(find(names))

    def name_stacked(self, _):
        module, name = self._pop(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is not text")
        self.stack.append(find(f"{module} {name}"))

    def reduce(self, _):
        function, args = self._pop(2)
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise ValueError("a call of an object that is not callable")
        if function.name not in CALLS:
            raise Unreadable(f"its pickle calls {function.name!r}; {ADVICE}")
        build, fewest, most = CALLS[function.name]
        if not fewest <= len(args) <= most:
            raise ValueError(f"{function.name} with {len(args)} arguments")
        self.builder.count_call()
        self.stack.append(build(self.builder, *args))

    def refer(self, _):
        (record,) = self._pop(1)
        self.stack.append(storage_of(self.builder, record))


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


def _measure(
    value: Any, level: int, known: dict[int, tuple[int, int]]
) -> tuple[int, int]:
    """Returns a value's depth and its number of values, counting all repeats.

    Args:
      value: Value that the machine built.
      level: Number of containers around it.
      known: Results of containers by id.

    Raises:
      Unreadable: The value is too deep (or contains itself), too large, or not plain.
    """
    if isinstance(value, Global | Storage):
        name = value.name if isinstance(value, Global) else "a storage"
        raise Unreadable(f"it holds {name} in place of a tensor or value; {ADVICE}")
    if not isinstance(value, dict | list | tuple):
        return 0, 1
    depth, count = known.get(id(value), (0, 1))
    if id(value) not in known and level <= MAX_DEPTH:
        for part in value.values() if isinstance(value, dict) else value:
            part_depth, part_count = _measure(part, level + 1, known)
            depth, count = max(depth, part_depth + 1), count + part_count
        known[id(value)] = depth, count
    if level + depth > MAX_DEPTH or count > MAX_VALUES:
        raise Unreadable(
            f"its values are nested deeper than {MAX_DEPTH} or more than {MAX_VALUES};"
            f" {ADVICE}"
        )
    return depth, count
