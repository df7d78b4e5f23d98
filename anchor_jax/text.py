"""Text from users and files: what is no text is refused where it is read."""

import re

from anchor_jax.errors import UserError

# Tabs and line ends are blanks; C1 controls come from text that was decoded wrongly,
# which the cleaning of prompts mends.
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")


def check_text(text: str, where: str) -> None:
    """Raises unless a string is text that can be encoded, without control characters.

    Args:
      text: what was given.
      where: what the message calls it: a field, a flag, or a file with its line.

    Raises:
      UserError: There is a control character, half of a surrogate pair, or a byte that
        is not UTF-8.
    """
    # Most text is printable, and this is faster than the search.
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
        problem = f"U+{code:04X} at character {place} is half of a surrogate pair"
        remedy = "write the whole character"
    else:
        problem = f"U+{code:04X} at character {place} is a control character"
        remedy = "remove it"
    raise UserError(f"{where}: {problem}, so this is no text; {remedy}")
