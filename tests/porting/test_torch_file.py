"""Files of PyTorch read without it: their values, and those that mean harm."""

import collections
import pathlib
import pickle
import struct
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_files import (
    FLOAT8,
    STORAGES,
    Call,
    Global,
    Parameter,
    Raw,
    View,
    write_archive,
    write_torch,
)

from anchor_jax.errors import UserError
from anchor_jax.porting import torch_file
from anchor_jax.porting.torch_file import open_torch, release

BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
DTYPES = [*STORAGES, FLOAT8.name]
REBUILD = "torch._utils _rebuild_tensor_v2"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pt"


@pytest.fixture
def saved(path):
    """Returns what is read of a value that was written."""

    def save(value):
        write_torch(path, value)
        return open_torch(path)

    return save


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def draw(dtype, shape=(3, 5)):
    return (10 * np.random.default_rng(0).random(shape)).astype(dtype)


@pytest.mark.parametrize("name", DTYPES)
def test_tensors_come_as_they_were_written(saved, name):
    array = draw(dtype_of(name))

    found = saved({"x": array})["x"]

    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_tensors_are_read_only_views_of_one_map(saved):
    found = saved({"a": BASE, "b": BASE, "c": BASE + 1})

    assert np.shares_memory(found["a"], found["b"])
    assert found["a"].base is found["c"].base
    assert found["a"].ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 1


@pytest.mark.parametrize(
    "offset, shape, strides, expected",
    [
        (0, (6, 4), (1, 6), BASE.T),
        (6, (2, 3), (6, 2), BASE[1:3, ::2]),
        (2, (5, 2), (0, 1), np.broadcast_to(BASE[0, 2:4], (5, 2))),
        (23, (), (), BASE[3, 5]),
        (24, (0, 6), (6, 1), BASE[4:]),
        (0, (1, 6), (2**40, 1), BASE[:1]),
    ],
)
def test_views_show_their_part_of_a_storage(saved, offset, shape, strides, expected):
    found = saved([View(BASE, offset, shape, strides), BASE])

    np.testing.assert_array_equal(found[0], expected, strict=True)
    if expected.size:
        assert np.shares_memory(*found)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 0, 4)])
def test_scalars_and_empty_tensors_keep_their_shape(saved, shape):
    array = np.full(shape, 2.5, np.float32)

    np.testing.assert_array_equal(saved(array), array, strict=True)


def test_a_training_state_comes_as_plain_values(saved):
    weights = collections.OrderedDict({"blocks.0.weight": Parameter(BASE)})
    weights._metadata = collections.OrderedDict({"": {"version": 1}})
    state = {
        "generator": weights,
        "generator_ema": {"blocks.0.weight": BASE + 1},
        "step": 600,
        "numbers": [0, -1, 255, 2**31, -(2**40), 2**200, 1.5, True, False, None],
        "nested": ({"a": [(1, "x")]}, "é"),
        0: {f"name {number}": number for number in range(300)},
    }

    found = saved(state)

    assert type(found["generator"]) is dict
    np.testing.assert_array_equal(found["generator"]["blocks.0.weight"], BASE)
    np.testing.assert_array_equal(found["generator_ema"]["blocks.0.weight"], BASE + 1)
    rest = ["step", "numbers", "nested", 0]
    assert {key: found[key] for key in rest} == {key: state[key] for key in rest}
    assert list(found) == list(state)


def test_sizes_types_and_devices_are_plain_too(saved):
    found = saved(
        {
            "size": Call("torch Size", ((2, 3),)),
            "dtype": Global("torch bfloat16"),
            "device": Call("torch device", ("cuda", 0)),
        }
    )

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    assert found == {"size": (2, 3), "dtype": bfloat16, "device": "cuda:0"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_python_is_understood(path, protocol):
    value = {"a": [1, 2**70, -3.5, "text"], "b": ({}, [], (), None, True)}
    value["again"] = value["a"]

    write_archive(path, pickle.dumps(value, protocol))

    assert open_torch(path) == value


@pytest.mark.skipif(sys.platform != "linux", reason="counts the pages of Linux")
def test_released_arrays_leave_memory_and_come_back(saved):
    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

    array = np.broadcast_to(np.float32(2), (8, 2**20))
    found = saved(array)
    assert found.sum() == 2 * array.size
    before = resident()

    release(found[::-1].T)

    assert before - resident() > 0.9 * array.nbytes
    assert found.sum() == 2 * array.size


def test_releasing_keeps_what_only_memory_holds(path):
    path.write_bytes(bytes(8192))
    changed = np.memmap(path, np.uint8, "c")
    changed[:] = 7
    own = np.ones(3)

    release(changed)
    release(own)

    assert (changed == 7).all()
    assert (own == 1).all()


class Touch:
    """Creates a file when it is unpickled by Python itself."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return pathlib.Path.touch, (self.target,)


def calls_by_every_opcode(target):
    """Yields pickles that create the file `target`, and the name they call."""
    shell = f"touch {target}"
    text = b"X" + struct.pack("<I", len(shell)) + shell.encode()
    yield b"\x80\x02cposix\nsystem\n" + text + b"\x85R.", "posix.system"
    yield (
        b"\x80\x02}X\x01\x00\x00\x00acposix\nsystem\n" + text + b"\x85Rs.",
        ("posix.system"),
    )
    yield b"(" + text + b"iposix\nsystem\n.", "posix.system"
    yield b"(cposix\nsystem\n" + text + b"o.", "posix.system"
    yield b"\x80\x02cposix\nsystem\n" + text + b"\x85\x81.", "posix.system"
    yield b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + text + b"\x85R.", "posix.system"
    yield (
        b"\x80\x04\x8c\x0eposix\nsystem\nX\x8c\x06system\x93" + text + b"\x85R.",
        (r"posix\\nsystem\\nX.system"),
    )
    code = f"open({str(target)!r}, 'w')".encode()
    evaluate = b"X" + struct.pack("<I", len(code)) + code
    yield b"\x80\x02cbuiltins\neval\n" + evaluate + b"\x85R.", "builtins.eval"
    yield pickle.dumps({"a": [Touch(target)]}, 4), "getattr|pathlib"


@pytest.mark.parametrize("number", range(9))
def test_pickles_that_call_are_refused_by_name(path, tmp_path, number):
    target = tmp_path / "ran"
    program, name = list(calls_by_every_opcode(target))[number]
    write_archive(path, program)

    with pytest.raises(UserError, match=f"weights.pt: .*names '.*{name}.*'"):
        open_torch(path)

    assert not target.exists()


@pytest.mark.parametrize("name", ["os system", "torch.serialization os.system"])
def test_harm_among_weights_is_refused_by_name(path, name):
    write_torch(path, {"w": BASE, "x": [{"y": Call(name, ("true",))}]})

    with pytest.raises(UserError, match="names '.*os.system'"):
        open_torch(path)


@pytest.mark.parametrize(
    "name",
    [
        "torch.distributed.tensor._api DTensor",
        "torch.distributed._shard.sharded_tensor.api ShardedTensor",
        "torch._tensor _rebuild_from_type_v2",
    ],
)
def test_tensors_in_parts_are_to_be_gathered(path, name):
    write_torch(path, {"w": Call(name, (1,))})

    with pytest.raises(UserError, match=r"full_tensor\(\).*python -c \"import torch"):
        open_torch(path)


@pytest.mark.parametrize(
    "value, message",
    [
        (View(BASE, 0, (25,), (1,)), "reaches out of its storage of 24 values"),
        (View(BASE, 1, (4, 6), (6, 1)), "reaches out"),
        (View(BASE, 0, (4, 6), (7, 1)), "reaches out"),
        (View(BASE, 25, (0,), (1,)), "reaches out"),
        (View(BASE, -1, (1,), (1,)), "none negative"),
        (View(BASE, 0, (-1,), (1,)), "none negative"),
        (View(BASE, 3, (2,), (-1,)), "none negative"),
        (View(BASE, 0, (2,), (1, 1)), "as many strides as axes"),
        (View(BASE, 0, (2.0,), (1,)), "none negative"),
        (View(BASE, 0, (2**70,), (0,)), "none negative"),
        (View(BASE, 0, [4], (1,)), "as many strides as axes"),
        (View(BASE, 0, (1,) * 40, (1,) * 40), "as many strides as axes"),
        (View(BASE, 0, (2**40,), (0,)), "repeats a storage of 24 values"),
        (View(BASE, 0, (24,), (1,), length=25), "has 96 bytes, expected 100"),
        (View(BASE, 0, (1,), (1,), length=2), "has 96 bytes, expected 8"),
        (View(BASE, 0, (1,), (1,), length=2**900), "not to a storage"),
        (View(BASE, 0, (1,), (1,), metadata={"conj": True}), "resolve_conj"),
        (Call(REBUILD, (1, 0, (1,), (1,), False, None)), "a tensor has shape"),
        (Call(REBUILD, (1,)), "with 1 arguments"),
        (Call("torch Size", (3,)), "not a list of at most"),
        (Call("torch FloatStorage", (3,)), "calls 'torch.FloatStorage'"),
        (Call("torch float32", (3,)), "not callable"),
        (Call("collections OrderedDict", ([["a", 1]],)), "with 1 arguments"),
        (Call("torch._utils _rebuild_parameter", (1, 2, 3)), "not a tensor"),
        ({"s": Global("torch FloatStorage")}, "holds torch.FloatStorage"),
        ({(1, 2): 3}, "key is a tuple"),
        (2**2000, "2001 bits"),
        ([Raw(b"K\x01K\x02b")], "expected a dict to add to"),
        ([Raw(b"}K\x01a")], "expected a list to add to"),
        ([Raw(b"}(K\x01u")], "damaged"),
        ([Raw(b"\x82\x01")], "opcode EXT1"),
        ([Raw(b"j\xff\xff\xff\xff")], "KeyError"),
        ([Raw(b"X\xff\xff\xff\x7fa")], "damaged"),
        ([Raw(b"\x8b\xff\xff\xff\x7fa")], "damaged"),
        ([Raw(b"\x8e" + b"\xff" * 7 + b"\x7f")], "damaged"),
        ([Raw(b"]q\x09h\x09a")], "nested deeper"),
        ([Raw(b"]" + b"q\x09]h\x09ah\x09a" * 40)], "nested deeper|more than"),
        ([Raw(b"K\x01" + b"\x85" * 10**5)], "nested deeper"),
        ([Raw(b"(" * 10**5)], "values at its end"),
        ([Raw(b"K\x010")], "opcode POP"),
    ],
)
def test_what_torch_would_not_write_is_refused(path, value, message):
    write_torch(path, value)

    with pytest.raises(UserError, match=f"weights.pt: .*({message})"):
        open_torch(path)


LONG_TEXT = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x01"


def many(first, again, count):
    """A pickle whose list holds one value, and the same made again and again."""
    return b"\x80\x02](" + first + again * count + b"e."


BOMBS = {
    "device": many(
        LONG_TEXT + b"ctorch\ndevice\nq\x00h\x01\x85R", b"h\x00h\x01\x85R", 1000
    ),
    "device of two": many(
        LONG_TEXT + b"ctorch\ndevice\nq\x00h\x01h\x01\x86R",
        b"h\x00h\x01h\x01\x86R",
        1000,
    ),
    "size": many(
        b"](" + b"K\x01" * 10**5 + b"eq\x01ctorch\nSize\nq\x00h\x01\x85R",
        b"h\x00h\x01\x85R",
        1000,
    ),
    "dictionaries": many(b"ccollections\nOrderedDict\nq\x00)R", b"h\x00)R", 2**15),
    "lists": many(b"]", b"]", 2**17),
    "keys of one hash": b"\x80\x02](}("
    + b"".join(
        b"\x8a\x0c" + (number * (2**61 - 1)).to_bytes(12, "little") + b"N"
        for number in range(10**5)
    )
    + b"ue.",
    "name of a storage": many(
        LONG_TEXT
        + b"ctorch\nFloatStorage\nq\x02"
        + b"(X\x07\x00\x00\x00storageh\x02h\x01NK\x01tq\x03Q",
        b"h\x03Q",
        10**5,
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_takes_little_memory(path, name, monkeypatch):
    monkeypatch.setattr(torch_file, "MAX_OPCODES", 2**16)
    write_archive(path, BOMBS[name])

    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"weights\.pt"):
            open_torch(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 64 * 2**20


def test_tensors_show_their_storage_a_few_times_only(path):
    wide = View(BASE, 0, (2**26,), (0,))
    write_torch(path, [wide] * 4)
    assert len(open_torch(path)) == 4
    write_torch(path, [wide] * 5)

    with pytest.raises(UserError, match="view more than"):
        open_torch(path)


def test_a_memo_number_costs_no_memory(path):
    write_archive(path, b"\x80\x02]r\xff\xff\xff\xff.")

    assert open_torch(path) == []


@pytest.mark.parametrize("depth, good", [(torch_file.MAX_DEPTH, True), (65, False)])
def test_depth_counts_through_shared_values(path, depth, good):
    # A chain of lists, met first at its end: no single path from the top is deep.
    lists = b"]q\x00"
    for number in range(1, depth):
        lists += b"]q" + bytes([number]) + b"h" + bytes([number - 1]) + b"a"
    write_archive(path, b"\x80\x02](" + lists + b"e.")

    if good:
        assert len(open_torch(path)) == depth
    else:
        with pytest.raises(UserError, match="nested deeper"):
            open_torch(path)


def small_file(path):
    write_torch(path, {"generator": {"a": BASE[:1, :2], "b": Parameter(BASE[:1])}})
    return path.read_bytes()


def test_a_file_cut_short_is_refused_wherever_it_ends(path):
    whole = small_file(path)

    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="weights.pt: not a (complete )?zip"):
            open_torch(path)


def test_damaged_pickles_are_read_or_refused(path):
    rng = np.random.default_rng(0)
    small_file(path)
    with zipfile.ZipFile(path) as archive:
        program = np.frombuffer(archive.read("archive/data.pkl"), np.uint8)
    storages = [BASE[:1, :2], BASE[:1]]
    refused = 0

    for _ in range(400):
        damaged = program.copy()
        places = rng.integers(0, damaged.size, rng.integers(1, 4))
        damaged[places] = rng.integers(0, 256, places.size)
        write_archive(path, damaged.tobytes(), storages)
        try:
            open_torch(path)
        except UserError:
            refused += 1

    assert 200 < refused < 400


def test_damaged_archives_are_read_or_refused(path):
    rng = np.random.default_rng(1)
    whole = small_file(path)
    refused = 0

    for _ in range(400):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 4):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            open_torch(path)
        except UserError:
            refused += 1

    assert 100 < refused < 400


def archive_of(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)


EMPTY = b"\x80\x02}."


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "members, message",
    [
        ([("a/version", b"3")], "no member 'data.pkl'"),
        ([("data.pkl", EMPTY)], "not under the folder"),
        ([("a/data.pkl", EMPTY), ("b/data/0", b"")], "not under the folder 'a'"),
        ([("a/data.pkl", EMPTY), ("a/../x", b"")], "not under the folder"),
        ([("/data.pkl", EMPTY)], "not under the folder"),
        ([("a/data.pkl", EMPTY), ("a/data.pkl", EMPTY)], "repeated"),
        ([("a/byteorder", b"big"), ("a/data.pkl", EMPTY)], "order b'big'"),
        ([("a/data.pkl", b"")], "pickle is damaged"),
        ([("a/data.pkl", b"\x80\x02}" * 3)], "pickle is damaged"),
        ([("a/data.pkl", bytes(2**22 + 1))], "4194305 bytes, the limit is"),
        ([], "not a zip archive"),
    ],
)
def test_archives_of_another_layout_are_refused(path, members, message):
    archive_of(path, members)

    with pytest.raises(UserError, match=message):
        open_torch(path)


def test_a_packed_archive_is_refused(path):
    archive_of(path, [("a/data.pkl", EMPTY)], zipfile.ZIP_DEFLATED)

    with pytest.raises(UserError, match="'data.pkl' is compressed"):
        open_torch(path)


def test_sizes_in_the_directory_are_not_believed(path):
    write_torch(path, BASE)
    whole = bytearray(path.read_bytes())
    entry = whole.rindex(b"archive/data/0") - 46
    assert whole[entry : entry + 4] == b"PK\x01\x02"
    struct.pack_into("<2I", whole, entry + 20, 2**30, 2**30)
    path.write_bytes(whole)

    with pytest.raises(UserError, match="differs from the archive's directory"):
        open_torch(path)


def test_older_formats_are_to_be_converted(path):
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + EMPTY)

    with pytest.raises(UserError, match=r"before 1\.6.*weights_only=True"):
        open_torch(path)


@pytest.mark.parametrize("data", [b"", b"PK", EMPTY, b"<html>", bytes(1000)])
def test_other_files_are_refused(path, data):
    path.write_bytes(data)

    with pytest.raises(UserError, match="not a zip archive"):
        open_torch(path)


def test_a_path_to_no_file_is_refused(tmp_path):
    for missing in (tmp_path, tmp_path / "absent.pt"):
        with pytest.raises(UserError, match="no such file"):
            open_torch(missing)
