"""What is text, and what is refused as none."""

import pytest

from anchor_jax.errors import UserError
from anchor_jax.text import check_text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red ring",
        "a\ttab\r\nline",
        "caf\u00e9 \u732b \U0001f642\u200d",
        "\x85\u2028",
    ],
)
def test_text_of_any_script_passes(text):
    check_text(text, "here")


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\ud800", r"here: U\+D800 at character 2 is a lone surrogate"),
        ("\udfff a", r"U\+DFFF at character 1"),
        ("caf\udce9", "byte 0xe9 at character 4 is not UTF-8"),
        ("a\0b", r"U\+0000 at character 2 is a control character"),
        ("\x1b[31m", r"U\+001B"),
        ("a\x7f", r"U\+007F"),
    ],
)
def test_invalid_text_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        check_text(text, "here")
