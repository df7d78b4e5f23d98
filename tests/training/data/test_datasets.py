import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from anchor_jax.errors import UserError
from anchor_jax.training.data.order import Order

pytest.importorskip("tensorflow_datasets")

from anchor_jax.training.data import datasets, trajectories
from anchor_jax.training.data.trajectories import Trajectories, TrajectoryWriter

ROOT = pathlib.Path(datasets.__file__).parents[2]
SHAPE = (5, 2, 3, 3, 4)


def run(program, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def all_of(examples):
    return [examples[number] for number in range(len(examples))]


def pairs(tmp_path, **arguments):
    examples = datasets.prepare(datasets.PromptPairs, tmp_path / "built", **arguments)
    return [(one["prompt"], one["switch"]) for one in all_of(examples)]


def test_aligned_files_come_back_as_pairs_in_order(tmp_path):
    first = write(tmp_path / "a.txt", [f"élan {n}" for n in range(30)])
    second = write(tmp_path / "b.txt", [f"夜 {n}" for n in range(30)])

    got = pairs(tmp_path, path=first, switch_path=second)

    assert got == [(f"élan {n}", f"夜 {n}") for n in range(30)]


def test_lines_of_one_file_switch_to_another_text_drawn_by_seed(tmp_path):
    path = write(tmp_path / "a.txt", ["same"] * 20 + [f"line {n}" for n in range(20)])

    got, again, other = (pairs(tmp_path, path=path, seed=seed) for seed in (0, 0, 1))

    assert [prompt for prompt, _ in got] == path.read_text().splitlines()
    assert all(prompt != switch for prompt, switch in got)
    assert got == again
    assert got != other


def test_json_lines_hold_both_forms(tmp_path):
    lines = [{"prompt": "a", "switch": "b"}, {"prompts": ["c", "d", "e"]}]
    path = write(tmp_path / "a.jsonl", map(json.dumps, lines))

    assert pairs(tmp_path, path=path) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    "first, second, message",
    [
        (b"a\nb\nc\n", b"d\ne\n", r"b.txt: 2 lines, expected 3 .* line 3 is the first"),
        (b"a\n\nc\n", b"d\ne\nf\n", r"a.txt, line 2: empty"),
        (b"a\nb\n", b"c\n\xff\n", r"b.txt, line 2: not UTF-8"),
        (b"a\nb\n", b"a\nb\n", r"two files are equal"),
        (b"a\nb\n", b"a \r\nb", r"two files are equal"),
        (b"a\nb\n", b"c\n" + b"x" * 10_001 + b"\n", r"line 2: 10001 characters"),
        (b"", b"a\n", r"a.txt: the file has no lines"),
        (b"a\n", None, r"needs at least two different prompts"),
        (b"a\na\n", None, r"needs at least two different prompts"),
    ],
)
def test_wrong_text_files_are_refused(tmp_path, first, second, message):
    (tmp_path / "a.txt").write_bytes(first)
    switch_path = None if second is None else tmp_path / "b.txt"
    if second is not None:
        switch_path.write_bytes(second)

    with pytest.raises(UserError, match=message):
        pairs(tmp_path, path=tmp_path / "a.txt", switch_path=switch_path)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1: bad JSON"),
        ("[1]", "expected"),
        ('{"prompt": "a"}', "needs at least two different prompts"),
        ('{"prompts": ["a"]}', "needs at least two different prompts"),
        ('{"prompt": "a", "switch": 3}', "expected"),
        ('{"prompt": "a", "switch": " "}', "line 1: empty"),
        (json.dumps({"prompts": ["a", "x" * 10_001]}), "10001 characters"),
    ],
)
def test_wrong_json_lines_are_refused(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", [line])

    with pytest.raises(UserError, match=message):
        pairs(tmp_path, path=path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", "id,prompt,switch\n1,a,b\n2,c,d\n"),
        ("a.tsv", "prompt\tswitch\na\tb\nc\td\n"),
        ("a.json", '[\n{"prompt": "a", "switch": "b"},\n{"prompts": ["c", "d"]}\n]'),
        ("a.txt", '{"prompt": "a", "switch": "b"}\n{"prompts": ["c", "d"]}\n'),
    ],
)
def test_tables_and_documents_hold_both_prompts(tmp_path, name, content):
    (tmp_path / name).write_text(content)

    assert pairs(tmp_path, path=tmp_path / name) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", "prompt\na\n#b\n"),
        ("a.json", '[{"prompt_en": "a"}, {"prompt_en": "#b"}]'),
        ("a.jsonl", '{"prompt": "a"}\n{"prompts": ["#b"]}\n'),
        ("a.txt", b"\xef\xbb\xbfa\r\n#b\r\n\r\n"),
        ("a.txt", "a\n#b".encode("utf-16")),
    ],
)
def test_prompts_without_a_switch_get_another_from_any_file(tmp_path, name, content):
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(data)

    assert pairs(tmp_path, path=tmp_path / name) == [("a", "#b"), ("#b", "a")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "id,words\n1,a\n", "no column of prompts"),
        ("a.json", '[{"prompt": "a", "switch": "b"}, {"prompt": "c"}]', "1 of 2"),
        ("a.jsonl", '{"prompt": "a", "switch": "\\ud800"}\n', r"line 1: U\+D800"),
        ("a.txt", "a\nb\0\n", "not text, or UTF-16 text"),
        ("a.txt", "a\nb\x07\n", r"line 2: U\+0007"),
        ("a.yaml", "- a\n- b\n", "YAML"),
        ("a.txt", "id,prompt\n1,a\n", "header of a table"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)

    with pytest.raises(UserError, match=message):
        pairs(tmp_path, path=tmp_path / name)
    assert not list((tmp_path / "built").glob("prompt_pairs-*"))


def test_a_file_is_read_for_the_first_start_only(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", ["a", "b"])
    first = pairs(tmp_path, path=path)
    monkeypatch.setattr(
        datasets.pairs.PairFiles, "read", lambda *given: pytest.fail("read again")
    )

    assert pairs(tmp_path, path=path) == first


def test_missing_and_mixed_files_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", ["{}"])

    with pytest.raises(UserError, match="no such file"):
        pairs(tmp_path, path=tmp_path / "none.txt")
    with pytest.raises(UserError, match="holds both prompts"):
        pairs(tmp_path, path=path, switch_path=write(tmp_path / "b.txt", ["a"]))


def clip(number):
    rng = np.random.default_rng(number)
    return {
        "latents": rng.normal(size=(2, 3, 3, 4)).astype(np.float16),
        "captions": [f"clip {number}", "and more"][: 1 + number % 2],
        "position": np.arange(2, dtype=np.int32) + number,
        "weight": np.float32(number / 3),
    }


def clip_arguments(make=clip, size=5, **made_from):
    return {
        "examples": lambda: map(make, range(5)),
        "size": size,
        "shape": (2, 3, 3, 4),
        "made_from": made_from,
        "arrays": {"position": ((2,), "int32"), "weight": ((), "float32")},
    }


def test_clips_come_back_equal(tmp_path):
    examples = datasets.prepare(datasets.Clips, tmp_path, **clip_arguments())

    assert len(examples) == 5
    for number, got in enumerate(all_of(examples)):
        expected = clip(number)
        assert got.pop("captions") == expected.pop("captions")
        for name, value in expected.items():
            assert got[name].dtype == value.dtype
            np.testing.assert_array_equal(got[name], value)


def test_wrong_clips_leave_no_dataset(tmp_path):
    def broken(number):
        return {**clip(number), "latents": np.full((2, 3, 3, 4), np.inf)}

    for arguments in (clip_arguments(broken), clip_arguments(size=6)):
        with pytest.raises(ValueError, match="not finite|5 clips, expected 6"):
            datasets.prepare(datasets.Clips, tmp_path, **arguments)

    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_preparing_again_only_opens(tmp_path):
    made = []

    def counted(number):
        made.append(number)
        return clip(number)

    for seed in (1, 1, 2):
        datasets.prepare(datasets.Clips, tmp_path, **clip_arguments(counted, seed=seed))

    assert len(made) == 10


def test_a_build_leaves_no_temporary_files(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", ["one", "two"])
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    pairs(tmp_path, path=path)

    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_half_built_folder_is_built_again(tmp_path):
    datasets.prepare(datasets.Clips, tmp_path, **clip_arguments())
    (built,) = tmp_path.glob("clips-*")
    (built / "ready.json").unlink()
    for shard in built.rglob("*array_record*"):
        shard.write_bytes(b"")

    examples = datasets.prepare(datasets.Clips, tmp_path, **clip_arguments())

    assert examples[4]["captions"] == ["clip 4"]


KILLED_BUILD = """
import os, signal, sys
import numpy as np
from anchor_jax.training.data import datasets

def examples():
    yield {"latents": np.zeros((2, 3, 3, 4)), "captions": ["a"]}
    if sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    yield {"latents": np.ones((2, 3, 3, 4)), "captions": ["b"]}

made = {"examples": examples, "size": 2, "shape": (2, 3, 3, 4), "made_from": {}}
clips = datasets.prepare(datasets.Clips, sys.argv[1], **made)
assert len(clips) == 2 and clips[1]["captions"] == ["b"]
"""


@pytest.mark.slow
def test_a_killed_build_leaves_no_dataset_and_the_next_succeeds(tmp_path):
    killed = run(KILLED_BUILD, tmp_path, "kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list(tmp_path.glob("clips-*"))

    done = run(KILLED_BUILD, tmp_path, "live")

    assert done.returncode == 0, done.stderr
    (kept,) = tmp_path.glob("clips-*")
    left = {path.name for path in tmp_path.iterdir()} - {kept.name}
    assert left == set()


def states(number):
    rng = np.random.default_rng(number)
    return rng.normal(size=SHAPE).astype(np.float16)


KILLED = """
import os, signal, sys
import numpy as np
from anchor_jax.training.data.trajectories import TrajectoryWriter
writer = TrajectoryWriter(sys.argv[1], 0, 2, (5, 2, 3, 3, 4), shard=2)
for number in (0, 2, 4):
    rng = np.random.default_rng(number)
    writer.add(number, rng.normal(size=(5, 2, 3, 3, 4)), f"prompt {number}")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_resumes_with_nothing_lost_or_doubled(tmp_path):
    killed = run(KILLED, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    for process in (0, 1):
        writer = TrajectoryWriter(tmp_path, process, 2, SHAPE, shard=2)
        if process == 0:
            assert writer.done() == {0, 2}
            assert writer.remaining(9) == [4, 6, 8]
        for number in writer.remaining(9):
            writer.add(number, states(number), f"prompt {number}")
        writer.flush()

    read = Trajectories(tmp_path)
    assert read.numbers == tuple(range(9))
    for number in range(9):
        got = read.by_number(number)
        assert got["prompt"] == f"prompt {number}"
        np.testing.assert_array_equal(got["states"], states(number))
    writer.close()
    assert not [path for path in tmp_path.glob(".*") if path.name != ".owner"]


SECOND = """
import sys
import numpy as np
from anchor_jax.errors import UserError
from anchor_jax.training.data.trajectories import TrajectoryWriter
try:
    writer = TrajectoryWriter(sys.argv[1], int(sys.argv[2]), 2, (5, 2, 3, 3, 4))
except UserError as error:
    print(error)
    sys.exit(2)
writer.add(1, np.zeros((5, 2, 3, 3, 4)), "a")
writer.flush()
writer.close()
"""


@pytest.mark.slow
def test_a_second_writer_of_a_process_is_refused_while_the_first_lives(tmp_path):
    first = TrajectoryWriter(tmp_path, 0, 2, SHAPE, shard=2)
    first.add(0, states(0), "a")

    for process, status in ((0, 2), (1, 0)):
        other = run(SECOND, tmp_path, str(process))
        assert other.returncode == status, other.stderr
        assert ("is in use by process" in other.stdout) == bool(status)
    first.add(2, states(2), "a")
    first.close()

    assert TrajectoryWriter(tmp_path, 0, 2, SHAPE).done() == {0, 1, 2}


def test_writers_of_another_job_are_refused_while_one_lives(tmp_path):
    first = TrajectoryWriter(tmp_path, 0, 2, SHAPE)

    for process, processes in ((1, 3), (1, 1)):
        with pytest.raises(UserError, match="in use|process=1: must be from"):
            TrajectoryWriter(tmp_path, process, processes, SHAPE)
    first.close()
    TrajectoryWriter(tmp_path, 1, 3, SHAPE).close()


def test_many_shards_are_read_with_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "_OPEN", 2)
    writer = TrajectoryWriter(tmp_path, 0, 1, SHAPE, shard=1)
    for number in range(5):
        writer.add(number, states(number), "a")

    read = Trajectories(tmp_path)
    for number in (0, 4, 1, 3, 2, 0):
        np.testing.assert_array_equal(read[number]["states"], states(number))
    here = pathlib.Path("/proc/self/fd")
    if here.is_dir():
        opened = [os.readlink(one) for one in here.iterdir() if one.exists()]
        assert sum(str(tmp_path) in one and "record" in one for one in opened) <= 2


def test_wrong_trajectories_are_refused(tmp_path):
    writer = TrajectoryWriter(tmp_path, 1, 2, SHAPE, inputs={"seed": 1})
    writer.add(1, states(1), "a")

    for number, value, message in [
        (1, states(1), "already"),
        (2, states(2), "does not belong to process 1 of 2"),
        (3, states(3)[:4], "shape"),
        (3, np.full(SHAPE, 1e6, np.float32), "360 of 360 values are not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.add(number, value, "b")
    with pytest.raises(UserError, match="holds trajectories of"):
        TrajectoryWriter(tmp_path, 0, 2, SHAPE, inputs={"seed": 2})
    with pytest.raises(
        UserError, match="holds no finished trajectories; write them first"
    ):
        Trajectories(tmp_path)


def test_a_shard_cut_within_an_example_is_left_out(tmp_path, monkeypatch):
    writer = TrajectoryWriter(tmp_path, 0, 1, SHAPE, shard=2)
    for number in (0, 1, 2):
        writer.add(number, states(number), "a")

    class Interrupted(list):
        def append(self, number):
            raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_numbers", Interrupted(writer._numbers))
    with pytest.raises(KeyboardInterrupt):
        writer.add(3, states(3), "a")
    writer.flush()
    writer.close()

    assert TrajectoryWriter(tmp_path, 0, 1, SHAPE).done() == {0, 1}


def test_a_damaged_shard_is_named(tmp_path):
    writer = TrajectoryWriter(tmp_path, 0, 1, SHAPE, shard=1)
    writer.add(0, states(0), "a")
    (shard,) = tmp_path.glob("*.array_record")
    shard.write_bytes(shard.read_bytes()[:-50])

    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        Trajectories(tmp_path)


@pytest.mark.parametrize("record", [0, 1])
def test_a_damaged_example_is_named_when_it_is_read(tmp_path, record):
    writer = TrajectoryWriter(tmp_path, 0, 1, SHAPE)
    for number in (0, 1):
        writer.add(number, states(number), "a")
    writer.flush()
    (shard,) = tmp_path.glob("*.array_record")
    content = bytearray(shard.read_bytes())
    place = 200 + 1000 * record
    content[place : place + 40] = bytes(40)
    shard.write_bytes(content)
    stored = Trajectories(tmp_path)

    with pytest.raises(UserError, match=f"{shard.name} is damaged.*move it away"):
        stored[record]
    assert stored[1 - record]["prompt"] == "a"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b"[]",
        b"\xff",
        b'{"format": 2, "shape": [5, 2, 3, 3, 4]}',
        b'{"format": 1, "shape": "52334"}',
        b'{"format": 1, "shape": [5, 2, 3, 3]}',
        b'{"format": 1, "shape": [5, 2, 3, 3, 4.0]}',
        b'{"format": 1, "shape": [5, 2, 3, 3, 4], "inputs": [1]}',
    ],
)
def test_a_damaged_spec_is_named(tmp_path, content):
    (tmp_path / "spec.json").write_bytes(content)

    with pytest.raises(UserError, match="spec.json") as caught:
        Trajectories(tmp_path)
    assert len(str(caught.value)) < 600


def damaged_clips(tmp_path, pattern, change):
    """Prepares a dataset whose file was changed."""
    datasets.prepare(datasets.Clips, tmp_path, **clip_arguments())
    (place,) = tmp_path.glob(f"clips-*/{pattern}")
    place.write_bytes(change(place.read_bytes()))
    return datasets.prepare(datasets.Clips, tmp_path, **clip_arguments())


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_a_dataset_with_a_cut_shard_is_named(tmp_path, keep):
    with pytest.raises(UserError, match="clips-.* is damaged.*remove this folder"):
        all_of(
            damaged_clips(
                tmp_path, "**/*.array_record*", lambda x: x[: int(keep * len(x))]
            )
        )


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"[]", b"\xff"])
def test_a_dataset_with_a_damaged_description_is_named(tmp_path, content):
    with pytest.raises(UserError, match="clips-.* is damaged") as caught:
        all_of(damaged_clips(tmp_path, "**/dataset_info.json", lambda x: content))
    assert len(str(caught.value)) < 600


def test_a_dataset_imports_no_module_that_its_files_name(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(tmp_path)

    def change(content):
        names = json.loads(content)
        names["pythonClassName"] = "hostile.Feature"
        return json.dumps(names).encode()

    assert len(damaged_clips(tmp_path, "**/features.json", change)) == 5
    assert "hostile" not in sys.modules


def epoch(order, number):
    start = number * order.size
    return [order.index(start + place) for place in range(order.size)]


def test_an_epoch_has_every_example_once():
    order = Order(12, 3)

    for number in range(3):
        assert sorted(epoch(order, number)) == list(range(12))


def test_every_epoch_and_seed_has_an_order_of_its_own():
    order = Order(50, 3)

    assert epoch(order, 0) != epoch(order, 1)
    assert epoch(order, 0) != epoch(Order(50, 4), 0)
    assert epoch(order, 1) == epoch(Order(50, 3), 1)


@pytest.mark.parametrize("arguments", [(0, 0), (3, -1)])
def test_impossible_orders_are_refused(arguments):
    with pytest.raises(UserError):
        Order(*arguments)


WITHOUT_TENSORFLOW = """
import pathlib, sys
import anchor_jax
from anchor_jax.training.data import order
assert "tensorflow_datasets" not in sys.modules
from anchor_jax.training.data import datasets, trajectories
import numpy as np
root = pathlib.Path(sys.argv[1])
(root / "a.txt").write_text("a\\nb\\n")
pairs = datasets.prepare(datasets.PromptPairs, root / "built", path=root / "a.txt")
assert pairs[0] == {"prompt": "a", "switch": "b"}
writer = trajectories.TrajectoryWriter(root / "ode", 0, 1, (2, 1, 1, 1, 1))
writer.add(0, np.zeros((2, 1, 1, 1, 1)), "a")
writer.flush()
assert trajectories.Trajectories(root / "ode")[0]["prompt"] == "a"
assert "tensorflow" not in sys.modules
"""


@pytest.mark.slow
def test_no_tensorflow_is_loaded(tmp_path):
    done = run(WITHOUT_TENSORFLOW, tmp_path)

    assert done.returncode == 0, done.stderr
