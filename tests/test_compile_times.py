import json

import pytest

from anchor_jax import compile_times
from anchor_jax.compile_times import FILE, CompileTimes


@pytest.fixture
def clock(monkeypatch):
    """Seconds that each compilation takes, in order."""
    readings = [0.0]
    monkeypatch.setattr(compile_times.time, "monotonic", lambda: readings[0])

    def run(times, seconds, about="setup", what="the block"):
        lines = []
        with times.reported(what, about, lines.append):
            readings[0] += seconds
        return lines

    return run


def test_the_last_compile_time_is_printed(tmp_path, clock):
    times = CompileTimes(tmp_path)

    assert clock(times, 40) == ["compiling the block: the first time"]
    assert clock(times, 130) == ["compiling the block: it took 40 s last time"]
    assert clock(times, 0.2) == ["compiling the block: it took 2 min last time"]
    assert clock(times, 1) == ["compiling the block: it took 1 s last time"]
    assert clock(times, 1, "other") == ["compiling the block: the first time"]


def test_without_a_folder_nothing_is_stored(tmp_path, clock):
    for folder in (None, tmp_path / "missing"):
        times = CompileTimes(folder)
        clock(times, 40)
        assert clock(times, 40) == ["compiling the block: the first time"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": "b"}', '{"a": -1.0}'])
def test_a_damaged_file_is_written_again(tmp_path, clock, content):
    (tmp_path / FILE).write_text(content)
    times = CompileTimes(tmp_path)

    assert clock(times, 40) == ["compiling the block: the first time"]
    assert clock(times, 40) == ["compiling the block: it took 40 s last time"]


def test_old_entries_are_dropped(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(compile_times, "_MOST", 2)
    times = CompileTimes(tmp_path)
    for name in ("a", "b", "c"):
        clock(times, 5, name)

    assert len(json.loads((tmp_path / FILE).read_text())) == 2
    assert "first time" in clock(times, 5, "a")[0]
    assert "5 s last time" in clock(times, 5, "c")[0]


def test_a_failed_compilation_stores_no_time(tmp_path):
    times = CompileTimes(tmp_path)
    with pytest.raises(KeyboardInterrupt), times.reported("it", 1, lambda line: None):
        raise KeyboardInterrupt
    assert times.load() == {}
