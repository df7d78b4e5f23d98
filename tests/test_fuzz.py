"""500 changed files of others: each is read or refused, and nothing else happens."""

import importlib.util
import json
import pathlib
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from anchor_jax.errors import UserError

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"


@pytest.fixture(scope="module")
def launched():
    """The program and its mutations, as modules."""
    sys.path.insert(0, str(LAUNCH))
    found = []
    for name in ("fuzz", "mutations"):
        spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(module)
    yield found
    sys.path.remove(str(LAUNCH))


@pytest.mark.slow
def test_500_changed_files_are_read_or_refused(launched, tmp_path):
    fuzz, _ = launched
    base = tmp_path / "work"
    base.mkdir()
    kinds = list(fuzz.targets().KINDS)

    report = fuzz.fuzz(500, 2, kinds, base, tmp_path / "kept")

    assert report["findings"] == []
    done = sum(
        count
        for counts in report["outcomes"].values()
        for name, count in counts.items()
        if name != "seconds"
    )
    assert done == 500
    assert report["outcomes"].keys() == set(kinds)


@pytest.mark.slow
def test_the_memory_of_the_process_that_starts_it_does_not_count():
    ballast = np.ones(2**28, np.uint8)

    done = subprocess.run(
        [sys.executable, "-c", "import fuzz; print(fuzz._peak())"],
        cwd=LAUNCH,
        capture_output=True,
        text=True,
        check=True,
    )

    assert 0 < int(done.stdout) < ballast.size


class Kind:
    """A reading function that does what it must not."""

    def __init__(self, does):
        self.does = does

    def read(self, path, seeds):
        self.does(path)


def writes(path):
    path.with_name("new").write_text("x")


def starts(path):
    subprocess.run(["true"], check=False)


def hides(path):
    """What is done is noticed even where the error is caught."""
    try:
        path.unlink()
    except Exception as error:
        raise UserError("refused") from error


def bombs(path):
    try:
        raise MemoryError
    except MemoryError as error:
        raise UserError("refused") from error


@pytest.fixture(scope="module")
def watch(launched):
    return launched[0].Watch()


@pytest.mark.parametrize(
    ("does", "part"),
    [
        (lambda path: path.read_bytes(), "read"),
        (lambda path: 1 / 0, "ZeroDivisionError"),
        (writes, "had side effects besides reading: open"),
        (starts, "had side effects besides reading: subprocess.Popen"),
        (hides, "had side effects besides reading: os.remove"),
        (bombs, "ran out of memory"),
    ],
)
def test_what_is_more_than_reading_is_a_finding(launched, watch, tmp_path, does, part):
    path = tmp_path / "a"
    path.write_text("x")

    outcome = launched[0].read_one(watch, Kind(does), path, tmp_path)

    assert part in outcome
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_the_same_numbers_give_the_same_changes(launched):
    mutations = launched[1]
    data = safetensors.numpy.save({"x": np.zeros(3)}, {"a": "{}"})
    pickle = b"\x80\x02}q\x00X\x01\x00\x00\x00aK\x01s."
    boxes = struct.pack(">I4s", 12, b"moov") + b"a" * 4
    ways = [
        lambda rng: mutations.change_bytes(rng, b"abc" * 99),
        lambda rng: mutations.change_json(rng, {"a": [1, {"b": "c"}], "d": None}),
        lambda rng: mutations.change_text(rng, b'{"prompts": ["a"]}\na red ring[1s]'),
        lambda rng: mutations.change_safetensors(rng, data, ("a",)),
        lambda rng: mutations.change_pickle(rng, pickle),
        lambda rng: mutations.change_boxes(rng, boxes),
    ]
    for way in ways:
        first = [way(random.Random(number)) for number in range(200)]
        assert first == [way(random.Random(number)) for number in range(200)]
        assert len(set(first)) > 20


def test_changed_documents_are_of_many_kinds(launched):
    texts = [
        launched[1].change_json(random.Random(n), {"a": [1], "b": {"c": "d"}})
        for n in range(400)
    ]

    wrong = 0
    for text in texts:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            wrong += 1
    assert 5 < wrong < 200
