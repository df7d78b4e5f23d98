"""The error for mistakes that a user can put right."""

import contextlib
import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, AnyStr

_MOST_LINES = 12
_LONGEST_LINE = 1000  # characters
_MOST_NAMES = 24
# What a terminal obeys instead of showing, and halves of characters.
_UNSHOWN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UserError(ValueError):
    """A mistake in what the user gave; the command line shows only its message.

    The message names the field, what was got, what is expected, and the remedy. It is
    shown with at most 12 lines of at most 1000 characters, whatever it embeds.
    """

    def __str__(self) -> str:
        lines = super().__str__().split("\n")
        if len(lines) > _MOST_LINES:
            more = len(lines) - _MOST_LINES + 1
            lines = [*lines[: _MOST_LINES - 1], f"and {more} more lines"]
        return "\n".join(map(_shown_line, lines))


class Stopped(KeyboardInterrupt):
    """Long work that was asked to stop, and did where it can go on.

    A command has an interrupt's status then, so that a script does not go on with what
    is half done.
    """


def shown(value: Any, limit: int = 80) -> str:
    """Returns a value as a message shows it: its `repr`, shortened in the middle.

    Args:
      value: anything, however large.
      limit: characters of the result, but for the length that is stated after it.
    """
    if isinstance(value, str | bytes):
        unit = "characters" if isinstance(value, str) else "bytes"
        # More than `limit` characters are never needed, whatever is escaped.
        text = repr(value if len(value) <= 2 * limit else _middle(value, 2 * limit))
        length = f" ({len(value)} {unit})" if len(text) > limit else ""
        return _middle(text, limit) + length
    brief = reprlib.Repr()
    brief.maxlist = brief.maxtuple = brief.maxdict = brief.maxset = 8
    brief.maxstring = brief.maxother = limit
    try:
        return _middle(brief.repr(value), limit)
    except (ValueError, RecursionError):
        # An integer of more digits than Python prints.
        return f"a {type(value).__name__} too large to show"


def some(items: Sequence[str], most: int = 5) -> list[str]:
    """Returns the first of many items, and how many more there are."""
    more = len(items) - most
    return [*items[:most], f"and {more} more"] if more > 0 else list(items)


def suggest(name: str, known: Iterable[str], kind: str) -> str:
    """Returns the end of a message about an unknown name: the nearest, and all."""
    known = list(known)
    close = difflib.get_close_matches(name[:1000], known, n=1, cutoff=0.5)
    hint = f" did you mean {shown(close[0])}?" if close else ""
    return f";{hint} {kind}: {', '.join(some(known, _MOST_NAMES)) or 'none'}"


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """Says of which field of the config a mistake is, where its message does not."""
    try:
        yield
    except UserError as error:
        if str(error).startswith("config."):
            raise
        raise UserError(f"{field}: {error}") from error


@contextlib.contextmanager
def damaged(
    path: str | os.PathLike,
    remedy: str,
    fault: str = "is damaged",
    wraps: bool = False,
) -> Iterator[None]:
    """Turns what a reading library raises into one message that names the file.

    Args:
      path: the file or folder that is read.
      remedy: what the user can do, put at the end of the message.
      fault: what the message says of the file.
      wraps: whether a UserError gets the file's name too; else it has it already.
    """
    try:
        yield
    # Libraries raise whatever their parsers do, and sometimes a plain Exception.
    except Exception as error:
        is_told = isinstance(error, UserError)
        if is_told and not wraps:
            raise
        said = error if is_told else reason(error)
        raise UserError(f"{path} {fault}: {said}; {remedy}") from error


def reason(error: Exception) -> str:
    """Returns what a library says in one line.

    The kind of the error is put before it, unless its text is a sentence by itself.
    """
    kind = "" if isinstance(error, OSError | ValueError) else type(error).__name__
    text = " ".join(str(error).split())
    return ": ".join(part for part in (kind, text) if part)[:300]


def _shown_line(line: str) -> str:
    line = _middle(line, _LONGEST_LINE)
    return _UNSHOWN.sub(lambda found: ascii(found[0])[1:-1], line)


def _middle(text: AnyStr, limit: int) -> AnyStr:
    """Returns a text without its middle if it is longer than `limit`."""
    if len(text) <= limit:
        return text
    end = limit // 3
    gap = "..." if isinstance(text, str) else b"..."
    return text[: limit - end - 3] + gap + text[-end:]
