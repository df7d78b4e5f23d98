"""Damaged small files of a training: named, with the remedy, and left unchanged."""

import json

import pytest

from anchor_jax import processes, shares
from anchor_jax.errors import UserError
from anchor_jax.training import files
from anchor_jax.training.monitor import Monitor

DAMAGED = [b"", b"[1,", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"null", b'"x"']


def damage(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=str(folder / name)) as caught:
        files.check(folder)
    assert (folder / name).read_bytes() == content
    message = str(caught.value)
    assert len(message) < 600 and "\n" not in message
    return message


@pytest.mark.parametrize("content", [*DAMAGED, b"9" * 5000])
@pytest.mark.parametrize("name", [files.CONFIG, files.INPUTS, files.SKIPPED])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, name, content):
    assert "remove it" in damage(tmp_path, name, content)


@pytest.mark.parametrize(
    "content", ["{}", '["1"]', "[-1]", "[1.5]", "[true]", "[1e99]", f"[{10**30}]"]
)
def test_batches_to_skip_are_numbers(tmp_path, content):
    message = damage(tmp_path, files.SKIPPED, content.encode())

    assert "tried again" in message


@pytest.mark.parametrize("content", ["[1, 2]", "7", '"a"'])
def test_inputs_are_an_object(tmp_path, content):
    damage(tmp_path, files.INPUTS, content.encode())


def test_sections_of_a_config_are_objects(tmp_path):
    (tmp_path / files.CONFIG).write_text('{"seed": 1, "data": ["world_clips"]}')

    assert files.read_config(tmp_path, ["lora"])["seed"] == 1
    with pytest.raises(UserError, match=r"config.json: data is \['world_clips'\]"):
        files.read_config(tmp_path, ["lora", "data"])


LINE = b'{"step": 1, "loss": 0.5}\n'


@pytest.mark.parametrize(
    "line",
    [
        *(one for one in DAMAGED if one),
        b"5",
        b'{"loss": 1.0}',
        b'{"step": "1"}',
        b'{"step": 1, "loss": "low"}',
        b'{"step": 1, "loss": [1]}',
        b"\x00\x00",
    ],
)
def test_a_damaged_line_of_a_log_is_named_by_its_number(tmp_path, line):
    message = damage(tmp_path, files.LOG, LINE + line + b"\n" + LINE)

    assert "line 2" in message and "the training does not need it" in message


@pytest.mark.parametrize("torn", [b"", b'{"step": 2, "lo', b"\xff", b"\x00" * 9])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, torn):
    (tmp_path / files.LOG).write_bytes(LINE + torn)

    assert files.read_log(tmp_path) == [{"step": 1, "loss": 0.5}]
    Monitor(tmp_path, 9, 1, 1, quiet=True).close()
    assert (tmp_path / files.LOG).read_bytes() == LINE


def test_a_whole_last_line_needs_no_end(tmp_path):
    (tmp_path / files.LOG).write_bytes(LINE + LINE.strip())

    assert [line["step"] for line in files.read_log(tmp_path)] == [1, 1]


def test_lines_of_steps_that_are_run_again_are_removed(tmp_path):
    lines = [json.dumps({"step": step, "loss": 0.1 * step}) for step in range(1, 6)]
    (tmp_path / files.LOG).write_text("\n".join(lines) + "\n")

    Monitor(tmp_path, 9, 3, 1, quiet=True).close()

    assert (tmp_path / files.LOG).read_text().splitlines() == lines[:3]


@pytest.mark.parametrize("content", [*DAMAGED, b"[]"])
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "metrics/metrics"])
def test_what_tells_of_a_checkpoint_is_named(tmp_path, name, content):
    (tmp_path / "8" / "metrics").mkdir(parents=True)

    assert "8" in damage(tmp_path, f"8/{name}", content)


def test_metrics_are_numbers(tmp_path):
    (tmp_path / "8" / "metrics").mkdir(parents=True)

    damage(tmp_path, "8/metrics/metrics", b'{"loss": "low"}')


def test_a_new_folder_has_nothing_to_read(tmp_path):
    files.check(tmp_path / "new")

    assert files.read_config(tmp_path) is None
    assert files.read_inputs(tmp_path) == {}
    assert files.read_skipped(tmp_path) == files.read_log(tmp_path) == []


def test_a_folder_that_a_process_does_not_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "share", lambda name, seconds: name)
    monkeypatch.setattr(processes, "barrier", lambda name: None)
    monkeypatch.setattr(processes, "gather", lambda sees: [sees, True, True])
    files.check_shared(tmp_path)
    monkeypatch.setattr(processes, "gather", lambda sees: [sees, False, True])
    with pytest.raises(UserError) as caught:
        files.check_shared(tmp_path)

    assert "process 1 cannot see the files that process 0 writes" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_awaited_on_a_shared_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "share", lambda name, seconds: ".shared-by-first")
    monkeypatch.setattr(processes, "barrier", lambda name: None)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "gather", lambda sees: [True, sees])
    monkeypatch.setattr(shares, "SEEN_BY", 0.2)
    with pytest.raises(UserError, match="process 1 cannot see"):
        files.check_shared(tmp_path)


@pytest.mark.parametrize("out", ["s3://bucket/run", "memory://run", "gs:/bucket/run"])
def test_an_unknown_scheme_makes_no_folder(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs://BUCKET"):
        files.make_folder(out)
    assert not list(tmp_path.iterdir())
