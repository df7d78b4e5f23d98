import gc
import json
import pathlib
import signal
import subprocess
import sys
import time
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import PartitionSpec as P

from anchor_jax import ownership
from anchor_jax.errors import UserError
from anchor_jax.sharding import make_mesh
from anchor_jax.weights import checkpoint
from anchor_jax.weights.checkpoint import Lazy

TYPES = ("float32", ml_dtypes.bfloat16, "float16", "int32", "uint8")


def tree():
    rng = np.random.default_rng(0)
    leaves = {
        np.dtype(dtype).name: (100 * rng.random((3, 8))).astype(dtype)
        for dtype in TYPES
    }
    return {"params": {**leaves, "deeper": {"scalar": np.float32(0.1)}}}


@pytest.fixture
def folder(tmp_path):
    """Returns the folder of a checkpoint with one network and one file."""
    path = tmp_path / "written"
    checkpoint.write(
        path,
        {"generator": tree(), "vae": {"x": np.arange(4.0, dtype=np.float32)}},
        {"method": "test", "sizes": [1, None]},
        {"tokenizer/spiece.model": b"pieces"},
    )
    return path


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def left_in(path):
    return sorted(entry.name for entry in path.iterdir())


def test_what_is_written_is_read_bit_for_bit(folder):
    assert checkpoint.items(folder) == ("generator", "vae", "meta")
    assert_same(checkpoint.restore(folder, "generator"), tree())
    assert left_in(folder.parent) == ["written"]


def test_shapes_and_meta_are_read_alone(folder):
    shapes = checkpoint.shapes(folder, "generator")["params"]
    meta = checkpoint.read_meta(folder)

    assert shapes["bfloat16"] == jax.ShapeDtypeStruct((3, 8), jnp.bfloat16)
    assert shapes["deeper"]["scalar"].shape == ()
    assert meta == {"format_version": 1, "method": "test", "sizes": [1, None]}


def test_only_floating_leaves_are_cast(folder):
    params = checkpoint.restore(folder, "generator", dtype="bfloat16")["params"]

    expected = tree()["params"]["float32"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["float32"]), expected)
    assert params["int32"].dtype == np.int32


def test_leaves_are_read_one_by_one(folder):
    found = dict(checkpoint.iterate(folder, "generator"))

    assert set(found) == {
        *(f"params/{np.dtype(dtype).name}" for dtype in TYPES),
        "params/deeper/scalar",
    }
    np.testing.assert_array_equal(found["params/uint8"], tree()["params"]["uint8"])
    np.testing.assert_array_equal(checkpoint.leaf(folder, "vae", "x"), np.arange(4))


def test_a_plain_checkpoint_manager_reads_it(folder):
    items = ocp.args.Composite(
        generator=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()
    )
    with ocp.CheckpointManager(folder) as manager:
        found = manager.restore(manager.latest_step(), args=items)

    assert_same(found["generator"], tree())
    assert found["meta"]["method"] == "test"


def test_leaves_are_restored_onto_many_devices(folder):
    mesh = make_mesh()
    split = jax.sharding.NamedSharding(mesh, P(None, "fsdp"))
    whole = jax.sharding.NamedSharding(mesh, P())
    shapes = checkpoint.shapes(folder, "generator")
    places = jax.tree.map(lambda leaf: split if leaf.ndim else whole, shapes)

    found = checkpoint.restore(folder, "generator", shardings=places)

    assert_same(found, tree())
    pieces = found["params"]["float32"].addressable_shards
    assert {piece.data.shape for piece in pieces} == {(3, 8 // jax.device_count())}


def test_lazy_leaves_are_in_memory_one_after_another(tmp_path):
    live, most, written = set(), [], []

    def wait_for_the_writer():
        # A thread of the writer lets go of an array a little after it is written.
        until = time.monotonic() + 5
        while live and time.monotonic() < until:
            gc.collect()
            time.sleep(0.01)

    def load(number):
        wait_for_the_writer()
        array = np.full((64, 64), number, np.float32)
        live.add(id(array))
        weakref.finalize(array, live.discard, id(array))
        most.append(len(live))
        return array

    leaves = {
        str(number): Lazy((64, 64), np.float32, lambda number=number: load(number))
        for number in range(4)
    }
    items = {"generator": leaves, "text_encoder": {"deeper": leaves}}
    checkpoint.write(tmp_path / "out", items, {}, progress=written.append)

    assert most == [1] * 8
    assert written == [64 * 64 * 4] * 8
    assert checkpoint.leaf(tmp_path / "out", "text_encoder", "deeper/3")[0, 0] == 3


@pytest.mark.parametrize("failing", [0, 2])
def test_a_leaf_that_fails_leaves_nothing_behind(tmp_path, failing):
    def load(number):
        if number == failing:
            raise OSError("the source went away")
        return np.zeros(3, np.float32)

    items = {
        name: {"x": Lazy((3,), np.float32, lambda number=number: load(number))}
        for number, name in enumerate(("generator", "ema", "vae"))
    }
    with pytest.raises(UserError, match="the source went away"):
        checkpoint.write(tmp_path / "out", items, {})

    assert left_in(tmp_path) == []


def test_a_leaf_with_an_unexpected_shape_is_refused(tmp_path):
    wrong = Lazy((3,), np.float32, lambda: np.zeros(4, np.float32))

    with pytest.raises(ValueError, match=r"\(4,\), expected float32 \(3,\)"):
        checkpoint.write(tmp_path / "out", {"vae": {"x": wrong}}, {})

    assert left_in(tmp_path) == []


def test_a_taken_folder_is_kept_unless_it_is_to_be_overwritten(folder):
    fresh = {"vae": {"x": np.zeros(2, np.float32)}}

    with pytest.raises(UserError, match="not empty"):
        checkpoint.write(folder, fresh, {})
    assert "generator" in checkpoint.items(folder)
    checkpoint.write(folder, fresh, {}, overwrite=True)

    assert checkpoint.items(folder) == ("vae", "meta")
    assert left_in(folder.parent) == ["written"]


def test_a_failed_overwrite_keeps_the_old_content(folder):
    def load():
        raise OSError("the source went away")

    broken = {"vae": {"x": Lazy((2,), np.float32, load)}}
    with pytest.raises(UserError, match="went away"):
        checkpoint.write(folder, broken, {}, overwrite=True)

    assert_same(checkpoint.restore(folder, "generator"), tree())
    assert left_in(folder.parent) == ["written"]


def test_only_checkpoints_are_overwritten(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "precious.txt").write_text("keep me")

    with pytest.raises(UserError, match="is not a checkpoint"):
        checkpoint.write(tmp_path / "letters", {}, {}, overwrite=True)

    assert (tmp_path / "letters" / "precious.txt").exists()


@pytest.mark.parametrize("step", ["2024", "0"])
def test_folders_with_numbers_are_not_checkpoints(tmp_path, step):
    photo = tmp_path / "photos" / step / "a.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_text("keep me")

    with pytest.raises(UserError, match="not overwritten"):
        checkpoint.write(tmp_path / "photos", {}, {}, overwrite=True)

    assert photo.exists()


def test_files_beside_a_checkpoint_prevent_its_replacement(folder):
    (folder / "thesis.txt").write_text("keep me")

    with pytest.raises(UserError, match="not overwritten"):
        checkpoint.write(folder, {"generator": tree()}, {}, overwrite=True)

    assert (folder / "thesis.txt").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", ".", "0/vae/x", "a/../../x"])
def test_files_stay_beside_the_step(folder, tmp_path, name):
    with pytest.raises(UserError, match="file name"):
        checkpoint.file(folder, name)
    with pytest.raises(UserError, match="file name"):
        checkpoint.write(tmp_path / "new", {}, {}, {name: b""})

    assert left_in(tmp_path) == ["written"]


def test_a_link_out_of_the_folder_is_refused(folder):
    (folder / "link").symlink_to(pathlib.Path(__file__))

    with pytest.raises(UserError, match="file name 'link'"):
        checkpoint.file(folder, "link")


def test_extra_files_are_found(folder):
    assert checkpoint.file(folder, "tokenizer/spiece.model").read_bytes() == b"pieces"
    with pytest.raises(UserError, match="has no file 'other'"):
        checkpoint.file(folder, "other")


def test_what_is_missing_is_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()

    with pytest.raises(UserError, match="is not a folder"):
        checkpoint.read_meta(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.shapes(tmp_path / "empty", "vae")
    with pytest.raises(UserError, match="no item 'ema'.*generator, vae, meta"):
        checkpoint.restore(folder, "ema")
    with pytest.raises(UserError, match="no 'y'"):
        checkpoint.leaf(folder, "vae", "y")
    assert not checkpoint.is_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize("version", [99, 0, None, "1", True])
def test_another_format_is_refused(folder, version):
    meta = json.dumps({"format_version": version})
    (folder / "0" / "meta" / "metadata").write_text(meta)

    with pytest.raises(UserError, match="format_version .* must be from 1 to 1"):
        checkpoint.read_meta(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000])
def test_broken_meta_is_one_message(folder, text):
    (folder / "0" / "meta" / "metadata").write_text(text)

    with pytest.raises(UserError, match="written"):
        checkpoint.read_meta(folder)


@pytest.mark.parametrize("name", ["_METADATA", "_sharding"])
@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"tree_metadata": 5}'])
def test_broken_metadata_of_an_item_is_one_message(folder, name, text):
    (folder / "0" / "generator" / name).write_text(text)

    try:
        assert_same(checkpoint.restore(folder, "generator"), tree())
    except UserError as error:
        assert str(folder) in str(error) and len(str(error)) < 600
        assert "\n" not in str(error)
    else:
        assert name != "_METADATA"


def test_any_error_while_reading_is_one_message(folder, monkeypatch):
    def fail(*args, **options):
        raise Exception("line\n" * 535)

    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "metadata", fail)

    with pytest.raises(UserError, match="copy or write it again") as caught:
        checkpoint.shapes(folder, "generator")
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_cut_files_are_one_message(folder, keep):
    files = [file for file in (folder / "0" / "generator").rglob("*") if file.is_file()]
    needed = [
        file for file in files if file.stat().st_size and file.name != "_sharding"
    ]
    broken = 0
    for file in needed:
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content))])
        try:
            assert_same(checkpoint.restore(folder, "generator"), tree())
        except UserError as error:
            assert str(folder) in str(error)
            broken += 1
        file.write_bytes(content)

    assert broken >= 3


KILLED = """
import os, sys
import numpy as np
from anchor_jax.weights import checkpoint

def load():
    os.kill(os.getpid(), int(sys.argv[2]))

leaf = checkpoint.Lazy((2,), np.float32, load)
checkpoint.write(sys.argv[1], {"vae": {"x": leaf}}, {}, overwrite=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_left_is_removed_by_the_next(folder, number):
    (folder.parent / ".written.0123456789ab-0.part").mkdir()
    line = [sys.executable, "-c", KILLED, folder, str(int(number))]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == -number, done.stderr
    assert len(left_in(folder.parent)) == 4
    assert_same(checkpoint.restore(folder, "generator"), tree())

    checkpoint.write(folder, {"vae": tree()}, {}, overwrite=True)

    assert left_in(folder.parent) == [".written.0123456789ab-0.part", "written"]
    assert checkpoint.items(folder) == ("vae", "meta")


@pytest.mark.slow
def test_a_folder_that_another_process_makes_is_refused(tmp_path):
    with ownership.own_target(tmp_path / "new"):
        checkpoint.write(tmp_path / "new", {"vae": tree()}, {})
        line = [sys.executable, "-c", KILLED, tmp_path / "new", "9"]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "is in use by process" in done.stderr


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appeared_meanwhile_stays(tmp_path, overwrite):
    def load():
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "thesis.txt").write_text("keep me")
        return np.zeros(2, np.float32)

    items = {"vae": {"x": Lazy((2,), np.float32, load)}}
    with pytest.raises(UserError, match="is not"):
        checkpoint.write(tmp_path / "new", items, {}, overwrite=overwrite)

    assert (tmp_path / "new" / "thesis.txt").read_text() == "keep me"
    assert left_in(tmp_path) == ["new"]


def test_a_checkpoint_whose_replacing_was_cut_short_comes_back(folder):
    folder.rename(checkpoint._old(folder))

    with pytest.raises(UserError, match="is not empty"):
        checkpoint.write(folder, {"vae": tree()}, {})

    assert_same(checkpoint.restore(folder, "generator"), tree())
    assert left_in(folder.parent) == ["written"]


def test_the_state_of_an_optimizer_is_read(tmp_path):
    state = [{"mu": np.ones(2, np.float32)}, {"count": np.int32(3)}]
    checkpoint.write(tmp_path / "run", {"opt_generator": state}, {})

    found = checkpoint.restore(tmp_path / "run", "opt_generator")

    np.testing.assert_array_equal(found[0]["mu"], state[0]["mu"])
    assert found[1]["count"] == 3


def bytes_read():
    """Returns the bytes that tensorstore has read from files in this process."""
    name = "/tensorstore/kvstore/file/bytes_read"
    (found,) = ts.experimental_collect_matching_metrics(name, include_zero_metrics=True)
    return sum(one["value"] for one in found["values"])


def test_one_network_is_read_without_the_others(tmp_path):
    rng = np.random.default_rng(0)
    small, large = (
        {"params": {"w": rng.random((side, side), np.float32)}} for side in (128, 1024)
    )
    items = {"generator": small, "opt_generator": large}
    checkpoint.write(tmp_path / "written", items, {})
    before = bytes_read()

    found = checkpoint.restore(tmp_path / "written", "generator")

    np.testing.assert_array_equal(found["params"]["w"], small["params"]["w"])
    size = small["params"]["w"].nbytes
    assert size <= bytes_read() - before <= 2 * size
