"""Checks that strings from users and files are valid text."""

import re

from anchor_jax.errors import UserError

# Tabs and line ends count as blanks. C1 control characters come from text that was
# decoded wrongly; cleaning of prompts repairs them.
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")


def check_text(text: str, where: str) -> None:
    """Raises UserError unless a string is valid text without control characters.

    Args:
      text: the given string.
      where: its name in the message: a field, a flag, or a file and line.

    Raises:
      UserError: The string has a control character, a lone surrogate, or a byte that is
        not UTF-8.
    """
    # Most text is printable, and this test is faster than the search.
    if text.isprintable():
        return
    found = _NO_TEXT.search(text)
    if found is None:
        return
    code, place = ord(found[0]), found.start() + 1
    if 0xDC80 <= code <= 0xDCFF:
        problem = f"byte 0x{code - 0xDC00:02x} at character {place} is not UTF-8"
        remedy = "write it in UTF-8"
    elif code >= 0xD800:
        problem = f"U+{code:04X} at character {place} is a lone surrogate"
        remedy = "write the whole character"
    else:
        problem = f"U+{code:04X} at character {place} is a control character"
        remedy = "remove it"
    raise UserError(f"{where}: {problem}, so this is not text; {remedy}")
