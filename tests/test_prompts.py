import json
import os

import pytest

from anchor_jax.errors import UserError
from anchor_jax.prompts import (
    MAX_PROMPT_CHARACTERS,
    Script,
    Segment,
    Timing,
    load_scripts,
    parse_inline,
    parse_json,
)

BLOCK = Timing(block=3)


def refused(action, *parts):
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert [part for part in parts if part not in text] == [], text


def test_inline_text_gives_prompts_switch_frames_and_cuts():
    text = "a red ball rolls[5s] | it bounces[10s] | night falls[5s#]"

    assert parse_inline(text, BLOCK) == Script(
        segments=(
            Segment("a red ball rolls", 0, False),
            Segment("it bounces", 20, False),
            Segment("night falls", 60, True),
        ),
        frames=81,
    )


@pytest.mark.parametrize(
    "text, switches, frames",
    [
        ("a", (), 21),
        ("a[18f]|b[3f]", (18,), 21),
        ("a[20f]|b[1f]", (20,), 24),
        ("a[1.1s]|b[1.1s]|c[1.1s]", (4, 9), 15),  # 4.4, 8.8, 13.2 latent frames
        ("a[20f] | b[2.5s] | c", (20, 30), 51),
        ("a[5s] | b[#]", (20,), 42),
        ("a [0.1s]", (), 3),
    ],
)
def test_durations_become_latent_frames_in_whole_blocks(text, switches, frames):
    script = parse_inline(text, BLOCK)
    assert (script.switch_frames, script.frames) == (switches, frames)


@pytest.mark.parametrize("text", ["a", "a[18f]|b[4s#]|c d[2f]"])
def test_a_script_is_its_inline_text_again(text):
    script = parse_inline(text, BLOCK)
    assert parse_inline(script.inline(), BLOCK) == script


def test_a_given_length_replaces_the_sum_of_durations():
    assert parse_inline("a[5s]|b[5s]", Timing(block=3, frames=30)).frames == 30


def test_a_segment_without_duration_gets_the_default_seconds():
    assert parse_inline("a|b", Timing(block=1, seconds=2.0)).switch_frames == (8,)


def test_brackets_within_a_prompt_are_text():
    script = parse_inline("a [red] ball[5s] | and [blue] sky", BLOCK)
    assert script.prompts == ("a [red] ball", "and [blue] sky")


@pytest.mark.parametrize(
    "text, parts",
    [
        ("", ["segment 1", "empty"]),
        ("a | | b", ["segment 2", "empty"]),
        ("a[5s] | [5s]", ["segment 2", "empty"]),
        ("a[5s", ["segment 1", "unbalanced brackets", "[5s]"]),
        ("a 5s]", ["segment 1", "unbalanced brackets"]),
        ("a [[5s]]", ["segment 1", "unbalanced brackets"]),
        ("a[5m]", ["segment 1", "[5m] is not a duration", "[5s]", "[20f]"]),
        ("a[]", ["[] is not a duration"]),
        ("a[1.5.1s]", ["is not a duration"]),
        ("a[0s] | b", ["segment 1", "0 latent frames", "more than 0"]),
        ("a | b[-2s]", ["segment 2", "-8 latent frames"]),
        (f"a[{'9' * 400}s]", ["segment 1", "at most 1000000"]),
        ("a[5s#] | b", ["segment 1", "scene cut", "before it"]),
        ("a[5s] b[5s]", ["the duration [5s] is inside the prompt", "put | after it"]),
        ("a[20f] | b[0.1s] | c", ["segment 3", "switch frame 20", "increase"]),
        ("a[1f] | b[1f] | c", ["segment 2 would never be shown", "frame 3"]),
        ("x" * (MAX_PROMPT_CHARACTERS + 1), ["10001 characters", "at most 10000"]),
    ],
)
def test_wrong_inline_text_is_refused_with_the_segment(text, parts):
    refused(lambda: parse_inline(text, BLOCK), *parts)


def test_a_switch_at_or_past_the_end_is_refused():
    timing = Timing(block=3, frames=21)
    parse_inline("a[18f] | b", timing)
    for frame in (19, 21, 40):  # 19 takes effect at 21, the end
        text = f"a[{frame}f] | b"
        refused(
            lambda text=text: parse_inline(text, timing), "at or past the end", "21"
        )


@pytest.mark.parametrize(
    "timing, parts",
    [
        ({"block": 3, "frames": 40}, ["frames=40", "multiple", "nearest is 39"]),
        ({"block": 3, "frames": -3}, ["frames=-3", "nearest is 3"]),
        ({"block": 0}, ["block=0"]),
        ({"block": 3, "seconds": 0}, ["seconds=0"]),
    ],
)
def test_timing_that_cannot_be_is_refused(timing, parts):
    refused(lambda: Timing(**timing), *parts)


def test_a_published_entry_switches_every_forty_latent_frames():
    script = parse_json(json.dumps({"prompts": list("abcdef"), "seed": 7}), BLOCK)

    assert script.switch_frames == (40, 80, 120, 160, 200)
    assert (script.frames, script.seed) == (240, 7)


def test_a_configured_list_of_switch_frames_is_used_as_far_as_needed():
    timing = Timing(block=3, frames=60, switch_frames=(10, 20, 30))
    script = parse_json('{"prompts": ["a", "b", "c"]}', timing)
    assert (script.switch_frames, script.frames) == ((10, 20), 60)


@pytest.mark.parametrize(
    "entry, switches, frames",
    [
        ({"prompts": ["a", "b"], "switch_frames": [9]}, (9,), 51),
        ({"prompts": ["a", "b"], "durations": [2, 2.5]}, (8,), 18),
        ({"prompts": ["a"], "seed": None}, (), 42),
    ],
)
def test_an_entry_s_own_times_are_used(entry, switches, frames):
    script = parse_json(json.dumps(entry), BLOCK)
    assert (script.switch_frames, script.frames) == (switches, frames)


@pytest.mark.parametrize(
    "text, parts",
    [
        ('{"prompts": ["a"', ["bad JSON", "column"]),
        ("[" * 100_000, ["bad JSON"]),
        ('["a"]', ["expected an object"]),
        ("{}", ["'prompts' is missing"]),
        ('{"prompts": null}', ["'prompts': got None", "list of strings"]),
        ('{"prompts": "a"}', ["'prompts': got 'a'", "list of strings"]),
        ('{"prompts": ["a", 3]}', ["'prompts': got 3", "strings"]),
        ('{"prompts": []}', ["'prompts' is empty"]),
        ('{"prompts": ["a", " "]}', ["segment 2", "empty"]),
        ('{"prompts": ["a"], "sed": 1}', ["unknown key 'sed'", "did you mean 'seed'?"]),
        ('{"prompts": ["a"], "seed": "1"}', ["'seed': got '1'"]),
        ('{"prompts": ["a"], "seed": true}', ["'seed': got True"]),
        (
            '{"prompts": ["a"], "seed": -1}',
            ["'seed': got -1", "from 0 to 9223372036854775807"],
        ),
        ('{"prompts": ["a", "b"], "switch_frames": 9}', ["'switch_frames': got 9"]),
        ('{"prompts": ["a", "b"], "switch_frames": [9.5]}', ["got 9.5"]),
        ('{"prompts": ["a", "b"], "switch_frames": [0, 9]}', ["2 entries, expected 1"]),
        ('{"prompts": ["a", "b"], "switch_frames": [0]}', ["must increase"]),
        (
            '{"prompts": ["a", "b", "c"], "switch_frames": [30, 12]}',
            [
                "segment 3",
                "switch frame 12",
                "not after the previous one, 30",
                "must increase",
            ],
        ),
        ('{"prompts": ["a", "b"], "durations": [5]}', ["1 entries, expected 2"]),
        ('{"prompts": ["a"], "durations": [NaN]}', ["'durations': got nan"]),
        ('{"prompts": ["a"], "durations": [0]}', ["more than 0"]),
        (
            '{"prompts": ["a", "b"], "durations": [5, 5], "switch_frames": [9]}',
            ["not both"],
        ),
    ],
)
def test_a_wrong_entry_is_refused(text, parts):
    refused(lambda: parse_json(text, BLOCK), *parts)


def test_too_many_prompts_for_the_length_are_refused():
    entry = json.dumps({"prompts": list("abcdef")})
    timing = Timing(block=3, frames=120)
    refused(
        lambda: parse_json(entry, timing),
        "too many prompts: the last of 6",
        "120",
        "at most 3",
    )
    timing = Timing(block=3, frames=120, switch_frames=(40, 80))
    refused(lambda: parse_json(entry, timing), "6 prompts need 5", "has 2")


def test_a_text_file_holds_a_script_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(
        "\ufeff# comment\n\na[5s] | b[5s]\r\n  # more\nc\n", encoding="utf-8"
    )

    scripts = load_scripts(BLOCK, path=path)

    assert [script.prompts for script in scripts] == [("a", "b"), ("c",)]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.json", "prompts.txt"])
def test_a_json_file_holds_an_entry_a_line(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"prompts": ["a | b[sic]"]}\n\n{"prompts": ["c", "d"]}\n')

    scripts = load_scripts(BLOCK, path=path)

    assert [script.prompts for script in scripts] == [("a | b[sic]",), ("c", "d")]


def test_every_wrong_line_is_named_with_file_and_number(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("good\n# comment\nbad[5x]\n\na || b\n")

    refused(
        lambda: load_scripts(BLOCK, path=path),
        f"{path}, line 3: segment 1: [5x]",
        f"{path}, line 5: segment 2: the prompt is empty",
    )


def test_only_the_first_errors_of_a_wrong_file_are_shown(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a[5x]\n" * 25)
    refused(lambda: load_scripts(BLOCK, path=path), "line 10", "and 15 more")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    refused(lambda: load_scripts(BLOCK, path=tmp_path / "no.txt"), "no such file")
    refused(lambda: load_scripts(BLOCK, path=tmp_path), "cannot be read")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    refused(
        lambda: load_scripts(BLOCK, path=tmp_path / "empty.txt"),
        "the file has no prompts",
    )
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    refused(lambda: load_scripts(BLOCK, path=tmp_path / "latin.txt"), "not UTF-8")


def test_a_prompt_or_a_file_is_needed_and_not_both():
    refused(lambda: load_scripts(BLOCK), "either a prompt or a file")
    refused(lambda: load_scripts(BLOCK, inline="a", path=os.devnull), "not both")
    assert load_scripts(BLOCK, inline="a")[0].prompts == ("a",)
    refused(lambda: load_scripts(BLOCK, inline=""), "prompt: segment 1", "empty")


def test_a_duration_inside_a_json_prompt_is_refused():
    with pytest.raises(UserError, match="durations"):
        parse_json('{"prompts": ["a red ring[1s]", "a blue ring[2s#]"]}', BLOCK)


def test_other_brackets_in_a_json_prompt_are_words():
    script = parse_json('{"prompts": ["a sign [sic] in red"]}', BLOCK)

    assert script.prompts == ("a sign [sic] in red",)


def test_the_keys_of_published_files_do_no_harm():
    text = '{"prompts": ["a", "b"], "seed": 6979, "num": 3, "prompts_list": []}'

    script = parse_json(text, BLOCK)

    assert (script.seed, script.switch_frames) == (6979, (40,))


HUGE = "1" + "0" * 400
LONG = "9" * 5000


@pytest.mark.parametrize(
    "text, parts",
    [
        (f'{{"prompts": ["a"], "durations": [{HUGE}]}}', ["'durations'", "at most"]),
        ('{"prompts": ["a"], "durations": [1e400]}', ["'durations': got inf"]),
        ('{"prompts": ["a"], "durations": [-1e400]}', ["'durations': got -inf"]),
        ('{"prompts": ["a"], "durations": [-5]}', ["more than 0"]),
        ('{"prompts": ["a"], "durations": [250001]}', ["at most 250000"]),
        ('{"prompts": ["a"], "durations": [true]}', ["got True"]),
        (f'{{"prompts": ["a"], "durations": [{LONG}]}}', ["bad JSON"]),
        (f'{{"prompts": ["a", "b"], "switch_frames": [{HUGE}]}}', ["'switch_frames'"]),
        ('{"prompts": ["a", "b"], "switch_frames": [20000000]}', ["10000000"]),
        (
            '{"prompts": ["a", "b"], "switch_frames": [10000000]}',
            ["latent frames; at most 10000000"],
        ),
        ('{"prompts": ["a", "b"], "switch_frames": [true]}', ["got True"]),
        (f'{{"prompts": ["a"], "seed": {HUGE}}}', ["'seed'", "from 0 to"]),
        ('{"prompts": ["a"], "seed": 1.0}', ["'seed': got 1.0"]),
        (f'{{"prompts": ["a"], "seed": {LONG}}}', ["bad JSON"]),
        (
            json.dumps({"prompts": ["a"] * 50, "durations": [250000] * 50}),
            ["latent frames; at most 10000000"],
        ),
    ],
)
@pytest.mark.parametrize("block", [1, 3])
def test_numbers_without_measure_are_refused_when_read(tmp_path, text, parts, block):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompts": ["a"]}}\n{text}\n')
    refused(lambda: load_scripts(Timing(block), path=path), "line 2", *parts)


@pytest.mark.parametrize(
    "text", [f"a[{'9' * 11}s]", f"a[{LONG}f]", "|".join(["a[1000000f]"] * 11)]
)
def test_durations_without_measure_are_refused(text):
    refused(lambda: parse_inline(text, BLOCK), "at most 1000000")


@pytest.mark.parametrize(
    "timing",
    [
        {"block": 3, "frames": 10**400},
        {"block": 3, "frames": -(10**400)},
        {"block": 3, "frames": 30_000_000},
        {"block": 3, "seconds": float("inf")},
        {"block": 3, "seconds": float("nan")},
        {"block": 3, "seconds": 10**400},
    ],
)
def test_lengths_without_measure_are_refused(timing):
    refused(lambda: Timing(**timing), "at most")


def test_invalid_text_is_refused_with_its_segment():
    refused(lambda: parse_inline("a | b\ud800", BLOCK), "segment 2: U+D800")


def test_one_prompt_may_stand_alone():
    for field in ("prompt", "prompt_en"):
        assert parse_json(json.dumps({field: "a"}), BLOCK).prompts == ("a",)
    both = json.dumps({"prompt": "a", "prompt_en": "b"})
    refused(lambda: parse_json(both, BLOCK), "several prompt fields: prompt, prompt_en")
