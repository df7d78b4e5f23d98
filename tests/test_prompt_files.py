"""Files of prompts from many sources: tables, JSON documents, encodings, mistakes."""

import gzip
import json
import os
import threading

import pytest

from anchor_jax import prompt_files
from anchor_jax.errors import UserError
from anchor_jax.prompts import Timing, read_scripts

BLOCK = Timing(block=3)


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def prompts_of(path):
    read = read_scripts(BLOCK, path=path)
    return [script.prompts for script in read.all]


def refused(path, *parts):
    with pytest.raises(UserError) as caught:
        read_scripts(BLOCK, path=path)
    text = str(caught.value)
    assert [part for part in parts if part not in text] == [], text
    return text


VIDPROM = (
    "\ufeffuuid,Prompt,time\r\n"
    '00-11,"a red ring, slowly\nin two lines",2023-09-01\r\n'
    "00-12,a | b [red] sign,2023-09-02\r\n"
)


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", VIDPROM),
        ("a.CSV", VIDPROM.encode("utf-16")),
        ("a.csv", VIDPROM.replace(",2", ";2").replace("11,", "11;")
         .replace("12,", "12;").replace("uuid,Prompt,", "uuid;Prompt;")),
        ("a.tsv", 'x\tprompt\n1\t"a red ring, slowly\nin two lines"\n\n'
         "2\ta | b [red] sign\n"),
    ],
)  # fmt: skip
def test_the_column_of_prompts_is_read_from_a_table(write, name, content):
    path = write(name, content)

    read = read_scripts(BLOCK, path=path)

    assert [one.prompts for one in read.all] == [
        ("a red ring, slowly\nin two lines",),
        ("a | b [red] sign",),
    ]
    assert "the column 'prompt'" in read.notes[0]
    assert read.place(0) == f"{path}, line 2"
    assert read.place(1) in (f"{path}, line 4", f"{path}, line 5")


def test_another_column_is_read_where_it_is_the_only_one(write):
    assert prompts_of(write("a.csv", "id,Caption\n1,a ring,\n")) == [("a ring",)]
    assert prompts_of(write("a.csv", "text\na ring\n")) == [("a ring",)]


@pytest.mark.parametrize(
    "content, parts",
    [
        ("id,words\n1,a\n", ["no column of prompts", "'id', 'words'", "'prompt'"]),
        ("", ["no column of prompts", "got none"]),
        ("caption,text\na,b\n", ["2 columns of prompts"]),
        ("prompt,x,prompt\na,b,c\n", ["2 columns of prompts"]),
        ("prompt\n", ["the file has no prompts"]),
        ("x,prompt\n1,a\n2\n", ["line 3: 1 columns, expected 2"]),
        ("prompt\na ring, red\n", ["line 2: 2 columns, expected 1"]),
        ('x,prompt\n1,"a\n2,b\n', ["line 2: the table is damaged"]),
        ('x,prompt\n1,"a"b\n', ["line 2: the table is damaged"]),
        ("x,prompt\n1, \n", ["line 2: segment 1: the prompt is empty"]),
        ("x,prompt\n1,a\x00b\n", ["not text, or UTF-16 text"]),
        ("x,prompt\n1,a\x1bb\n", ["line 2, column 'prompt': U+001B"]),
        ("x,prompt\n1," + "a" * 200_000 + "\n", ["line 2: the table is damaged"]),
        (b"x,prompt\n1,caf\xe9\n", ["line 2: not UTF-8 text (byte 0xe9)"]),
    ],
)
def test_a_wrong_table_is_refused(write, content, parts):
    refused(write("a.csv", content), *parts)


def test_a_table_under_another_name_is_refused(write):
    path = write("a.txt", "uuid,prompt,time\n1,a red ring,2\n")
    refused(path, "header of a table", "rename the file to .csv")
    assert len(prompts_of(write("a.txt", "a prompt, with a comma\nb\n"))) == 2


@pytest.mark.parametrize(
    "header", ["prompt", "uuid\tText Prompt\tx", "video_id,caption", "text\tlabel"]
)
def test_the_header_of_a_table_never_becomes_a_video(write, header):
    refused(write("a.txt", f"{header}\n1,a red ring,2\n"), "header of a table")


def test_words_between_commas_are_a_prompt(write):
    for content in ("a sign, text, caption\nblurry\n", "text,watermark\nblurry\n"):
        assert len(prompts_of(write("a.txt", content))) == 2


@pytest.mark.parametrize("name", ["Text Prompt", "text_prompt", "prompt_en"])
def test_columns_of_prompts_under_other_names_are_read(write, name):
    read = read_scripts(BLOCK, path=write("a.csv", f"id,{name}\n1,a red ring\n"))

    assert read.all[0].prompts == ("a red ring",)
    assert any("not 'id'" in note for note in read.notes)


@pytest.mark.parametrize("name", ["full_info.json", "full_info.txt", "f.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_objects_is_read(write, name, indent):
    entries = [
        {"prompt_en": "a red ring", "dimension": ["color"]},
        {"prompts": ["a", "b"], "switch_frames": [9]},
        {"prompt": "c"},
        "d",
    ]
    path = write(name, json.dumps(entries, indent=indent))

    read = read_scripts(BLOCK, path=path)

    assert [one.prompts for one in read.all] == [
        ("a red ring",),
        ("a", "b"),
        ("c",),
        ("d",),
    ]
    assert read.place(1) == f"{path}, entry 2"
    assert "one JSON document" in read.notes[0] and "'prompt_en' (1)" in read.notes[0]


def test_one_object_over_several_lines_is_read(write):
    text = json.dumps({"prompts": ["a", "b"], "seed": 3}, indent=1)
    for name in ("a.json", "a.txt"):
        (script,) = read_scripts(BLOCK, path=write(name, text)).all
        assert (script.prompts, script.seed) == (("a", "b"), 3)


@pytest.mark.parametrize(
    "value",
    [
        [{"caption_of_it": "a"}] * 50,
        [{"prompt": "a", "prompt_en": "b"}] * 50,
        [{"prompt": 3}] * 50,
        [[1]] * 50,
        {"videos": [{"prompt": "a"}]},
        {"prompt": {"0": "a", "1": "b"}},
        [1, 2],
        3,
    ],
)
def test_a_document_without_prompts_gets_one_error(write, value):
    text = refused(
        write("a.json", json.dumps(value, indent=1)),
        "one JSON document",
        "one object per line",
    )
    assert "\n" not in text


def test_a_damaged_document_gets_one_error(write):
    whole = json.dumps([{"prompt": "a"}] * 20, indent=1)
    for text in (whole[:-5], "[", whole.replace('"prompt"', "prompt"), "[" * 100_000):
        assert "\n" not in refused(write("a.json", text), "one JSON document")


def test_json_lines_are_still_distinguished_from_documents(write):
    text = '{"prompts": ["a"]\n{"prompts": ["b"]}\n{"prompt": "c"}\n'
    refused(write("a.json", text), "a.json, line 1: bad JSON")
    text = text.partition("\n")[2]
    assert prompts_of(write("a.json", text)) == [("b",), ("c",)]


def test_comments_are_counted(write):
    path = write("a.txt", "#cinematic a ring[1s]\n\na\n # more\n")

    (note,) = read_scripts(BLOCK, path=path).notes

    assert "2 lines that start with # are skipped as comments" in note
    assert "line 1: '#cinematic a ring[1s]'" in note
    assert read_scripts(BLOCK, path=write("b.txt", "a\n")).notes == ()


@pytest.mark.parametrize(
    "content",
    [
        "a\u00e9\nb\n".encode("utf-8-sig"),
        "a\u00e9\r\nb\r\n".encode(),
        "a\u00e9\rb\r".encode(),
        "a\u00e9\nb".encode("utf-16"),
        b"\xfe\xff" + "a\u00e9\r\nb".encode("utf-16-be"),
        "a\u00e9\nb\n".encode("utf-32"),
    ],
)
def test_marks_and_line_ends_of_all_systems_are_read(write, content):
    assert prompts_of(write("a.txt", content)) == [("a\u00e9",), ("b",)]


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("a.txt", "a\nb\ncaf\xe9\n".encode("latin-1"), "line 3: not UTF-8 text"),
        (
            "a.txt",
            "a\u732b".encode("utf-16-le"),
            "UTF-16 text without a byte order mark",
        ),
        ("a.txt", b"\xff\xfea\0b", "not utf-16-le text"),
        ("a.txt", gzip.compress(b"a ring", mtime=0), "compressed by gzip"),
        ("a.csv", b"PK\x03\x04xl/workbook", "a spreadsheet"),
        ("a.txt", b"PAR1\x15\x04", "Parquet"),
        ("a.txt", b"\0\0\0\x20ftypisom", "a video"),
        ("a.yaml", b"- a ring\n", "YAML"),
        ("a.xlsx", b"", "a spreadsheet"),
        ("a.parquet", b"", "a binary table"),
        ("a.txt", b"a\nb\x07\n", "line 2: U+0007"),
    ],
)
def test_what_holds_no_prompts_is_refused_once(write, name, content, part):
    assert "\n" not in refused(write(name, content), part)


def test_a_path_that_is_not_text_is_refused(tmp_path):
    refused(tmp_path / "a\0b", "cannot contain a NUL")
    refused(tmp_path / "a\ud800", "U+D800")
    refused(tmp_path / ("a" * 5000), "cannot be read")


@pytest.mark.parametrize(
    "line",
    [
        '{"prompts": ["a\\ud800"]}',
        '{"prompts": ["a\\u0000"]}',
        '{"prompt": "\\udcff"}',
    ],
)
def test_escapes_of_json_that_spell_no_text_are_refused(write, line):
    refused(write("a.jsonl", f'{{"prompts": ["b"]}}\n{line}\n'), "line 2", "not text")


def test_a_line_of_any_length_is_not_read(write, monkeypatch):
    monkeypatch.setattr(prompt_files, "_MOST_LINE", 100)
    refused(write("a.txt", "a\n" + "b" * 101), "line 2: more than 100 bytes")
    wide = ("a\n" + "b" * 101).encode("utf-16")
    refused(write("a.txt", wide), "line 2: more than 100 bytes")


def test_a_document_of_any_size_is_not_read(write, monkeypatch):
    monkeypatch.setattr(prompt_files, "_MOST_DOCUMENT", 100)
    path = write("a.json", json.dumps([{"prompt": "a"}] * 20, indent=1))
    refused(path, "one JSON document of more than 100 characters")


def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=path.write_text, args=("a\nb\n",), daemon=True).start()

    assert prompts_of(path) == [("a",), ("b",)]


def test_a_header_of_a_table_without_end_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt," + "x" * 200_000 + "\na,b\n")

    with pytest.raises(UserError, match=r"a\.csv, line 1: the table is damaged"):
        read_scripts(Timing(block=3), path=path)


def test_a_json_line_among_plain_prompts_is_refused(write):
    mixed = write("a.txt", 'a red ring\n{"prompts": ["a", "b"]}\n')
    braces = write("b.txt", "a red ring\n{braces} stay\n")

    with pytest.raises(UserError, match="line 2: a JSON object, but earlier lines"):
        list(prompt_files.PromptFile(mixed))
    assert [text for _, text in prompt_files.PromptFile(braces)] == [
        *("a red ring", "{braces} stay"),
    ]
