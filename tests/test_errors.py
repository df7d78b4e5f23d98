import pytest

from anchor_jax.errors import UserError, changes, damaged, shown, some, suggest


@pytest.mark.parametrize("value", ["a red ring", 3, None, (1, 2), {"a": 1}, 0.5])
def test_short_values_are_shown_as_they_are(value):
    assert shown(value) == repr(value)


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        ({"seed": 0, "lora": "a"}, {"seed": 1, "lora": "a"}, ["seed: 0 -> 1"]),
        (
            {"a": {"b": [1, {"c": 2}]}},
            {"a": {"b": [1, {"c": 3}]}},
            ["a.b[1].c: 2 -> 3"],
        ),
        ({"a": [1]}, {"a": [1, 2]}, ["a: [1] -> [1, 2]"]),
        (
            {"p": {"kind": "A", "x": 1}},
            {"p": {"kind": "B", "y": 2}},
            ["p.kind: 'A' -> 'B'"],
        ),
        ({"new": 1}, {"old": 2}, ["new: 1 -> None", "old: None -> 2"]),
        ({"a": {"b": 1}}, {"a": 3}, ["a: {'b': 1} -> 3"]),
        ({"a": 1}, {"a": 1}, []),
    ],
)
def test_changes_name_the_fields_that_differ(before, after, lines):
    assert changes(before, after) == lines


def test_long_values_and_names_of_changes_are_shortened():
    (line,) = changes({"k" * 999: "x" * 20_000}, {"k" * 999: 1})

    assert len(line) < 200 and line.endswith(" -> 1")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "x" * 20_000,
        b"x" * 20_000,
        "\0" * 20_000,
        10**5000,
        [1] * 10**6,
        {"a" * 999: 1},
        nested(900),
    ],
    ids=["text", "bytes", "zeros", "number", "list", "dict", "nested"],
)
def test_long_values_are_shortened(value):
    assert len(shown(value)) <= 110


def test_a_long_text_keeps_both_ends_and_tells_its_length():
    text = shown("begin" + "x" * 20_000 + "end")

    assert text.startswith("'begin") and "end'" in text
    assert text.endswith("(20008 characters)")


def test_a_message_is_bounded_for_any_content():
    message = str(UserError("\n".join([f"what {'x' * 20_000} to do"] * 97)))

    lines = message.split("\n")
    assert len(lines) == 12 and lines[-1] == "and 86 more lines"
    assert max(map(len, lines)) <= 1000
    assert lines[0].startswith("what") and lines[0].endswith("to do")
    assert str(UserError(message)) == message


def test_a_terminal_is_not_given_orders():
    message = str(UserError("a\x1b[31m b\x07 c\ud800 d\u202e é 色"))

    assert message == r"a\x1b[31m b\x07 c\ud800 d\u202e é 色"


def test_the_rest_of_many_is_counted():
    assert some(["a", "b"], 2) == ["a", "b"]
    assert some(list("abcd"), 2) == ["a", "b", "and 2 more"]
    names = [f"name{number}" for number in range(500)]
    assert suggest("nam7", names, "names").endswith("and 476 more")


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ValueError("it has\n  no records"), "it has no records"),
        (OSError(5, "gone"), "[Errno 5] gone"),
        (KeyError("x"), "KeyError: 'x'"),
        (Exception(), "Exception"),
        (Exception("y" * 1000), f"Exception: {'y' * 289}"),
    ],
)
def test_what_a_library_raises_names_the_file_and_the_remedy(error, cause):
    with pytest.raises(UserError) as caught, damaged("a/b", "copy it"):
        raise error

    assert str(caught.value) == f"a/b is damaged: {cause}; copy it"
    assert caught.value.__cause__ is error


def test_a_message_is_passed_on_or_gets_the_name_of_the_file():
    with pytest.raises(UserError) as caught, damaged("a/b", "copy it"):
        raise UserError("a/b/c: a message")
    assert str(caught.value) == "a/b/c: a message"

    with (
        pytest.raises(UserError) as caught,
        damaged("a/b", "copy it", "is not a dog", wraps=True),
    ):
        raise UserError("c=3, expected 4")
    assert str(caught.value) == "a/b is not a dog: c=3, expected 4; copy it"
