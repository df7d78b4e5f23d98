"""Reports on texts before a training: which are cut, and how files were read."""

import json

import bundles
import pytest

from anchor_jax.training import reports
from anchor_jax.training.data.kinds import DataConfig

LONG = "a blue square moves up a red ring"


@pytest.fixture
def tokenizer():
    return bundles.load().tokenizer


def test_prompts_that_are_cut_are_named_with_their_line(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(f"a red ring\n{LONG}\n# a green ring\n")

    lines = reports.report_texts(DataConfig("prompts", str(path)), tokenizer)

    assert lines[0].startswith("warning: 1 prompt is longer than the 6 tokens")
    assert f"{path}, line 2: {LONG!r}: 6 of 9 tokens are read" in lines[1]
    assert "cut after 'a blue square moves up'" in lines[1]
    assert "1 line that starts with # is read as a prompt; line 3" in lines[2]
    assert len(lines) == 3


def test_captions_switches_and_own_texts_are_looked_at(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "switch": LONG}))
    (tmp_path / "v.csv").write_text(f"video,caption\na.mp4,{LONG}\n")
    own = [("config.samples", LONG + " a")]
    switches = DataConfig("prompts", str(tmp_path / "a.jsonl"))
    captions = DataConfig("videos", str(tmp_path / "v.csv"))

    assert "a.jsonl, line 1" in reports.report_texts(switches, tokenizer)[1]
    assert "v.csv, line 2" in reports.report_texts(captions, tokenizer)[1]
    assert "config.samples" in reports.report_texts(DataConfig(), tokenizer, own)[1]
    assert reports.report_texts(DataConfig(), tokenizer) == []


def test_of_a_large_file_the_first_texts_are_looked_at(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(reports, "LOOKED_AT", 50)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{LONG} {number}\n" for number in range(60)))

    lines = reports.report_texts(DataConfig("prompts", str(path)), tokenizer)

    assert lines[0].startswith("warning: 50 prompts are longer")
    assert "and 45 more" in lines[-2]
    assert lines[-1].startswith("note: only the first 50 texts were checked")
    assert len(lines) <= 12


def test_durations_of_streams_are_not_words_of_a_training(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("a red ring[5s]\na | b[20f#]\na [red] ring\n")

    (line,) = reports.report_texts(DataConfig("prompts", str(path)), tokenizer)

    assert line.startswith("warning: 2 texts contain a duration such as [5s]")
