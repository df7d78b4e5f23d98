"""The error class for user mistakes, and helpers that format its messages."""

import contextlib
import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, AnyStr

_MOST_LINES = 12
_LONGEST_LINE = 1000  # characters
_MOST_NAMES = 24
# Characters that control a terminal, and lone surrogates.
_UNSHOWN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UserError(ValueError):
    """An error in the user's input; the command line shows only its message.

    The message names the field, the value that was given, the values that are allowed,
    and the remedy. At most 12 lines of at most 1000 characters are shown.
    """

    def __str__(self) -> str:
        lines = super().__str__().split("\n")
        if len(lines) > _MOST_LINES:
            more = len(lines) - _MOST_LINES + 1
            lines = [*lines[: _MOST_LINES - 1], f"and {more} more lines"]
        return "\n".join(map(_shown_line, lines))


class Stopped(KeyboardInterrupt):
    """Raised when long work stopped on request, at a point where it can resume.

    The command then exits with the status of an interrupt. A calling script therefore
    does not continue with incomplete results.
    """


def shown(value: Any, limit: int = 80) -> str:
    """Returns the `repr` of a value for a message, shortened in the middle.

    Args:
      value: any value of any size.
      limit: maximum length in characters. The length note that follows a shortened
        string is not counted.
    """
    if isinstance(value, str | bytes):
        unit = "characters" if isinstance(value, str) else "bytes"
        # Escaping never shortens a text, so 2 * limit characters are enough.
        text = repr(value if len(value) <= 2 * limit else _middle(value, 2 * limit))
        length = f" ({len(value)} {unit})" if len(text) > limit else ""
        return _middle(text, limit) + length
    brief = reprlib.Repr()
    brief.maxlist = brief.maxtuple = brief.maxdict = brief.maxset = 8
    brief.maxstring = brief.maxother = limit
    try:
        return _middle(brief.repr(value), limit)
    except (ValueError, RecursionError):
        # The integer has more digits than Python converts to text.
        return f"a {type(value).__name__} too large to show"


def some(items: Sequence[str], most: int = 5) -> list[str]:
    """Returns the first `most` items, followed by a count of the others."""
    more = len(items) - most
    return [*items[:most], f"and {more} more"] if more > 0 else list(items)


def changes(before: Any, after: Any, name: str = "") -> list[str]:
    """Returns a line "NAME: OLD -> NEW" for each plain value that differs.

    Args:
      before: mappings and lists of plain values.
      after: the same, with other values.
      name: the dotted name of the value itself.
    """
    if before == after:
        return []
    dotted = f"{name}." if name else ""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        if before.get("kind") != after.get("kind"):
            return changes(before.get("kind"), after.get("kind"), f"{dotted}kind")
        return [
            line
            for key in dict.fromkeys((*before, *after))
            for line in changes(
                before.get(key), after.get(key), f"{dotted}{shown(key, 40)[1:-1]}"
            )
        ]
    lists = isinstance(before, list) and isinstance(after, list)
    if lists and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [
            line
            for number, (old, new) in pairs
            for line in changes(old, new, f"{name}[{number}]")
        ]
    return [f"{name}: {shown(before, 40)} -> {shown(after, 40)}"]


def closest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns a question for the known name that is most similar, or ""."""
    close = difflib.get_close_matches(name[:1000], list(known), n=1, cutoff=0.5)
    return f"; did you mean {shown(prefix + close[0])}?" if close else ""


def suggest(name: str, known: Iterable[str], kind: str) -> str:
    """Returns the end of a message about an unknown name: similar names, then all."""
    known = list(known)
    hint = closest(name, known) or ";"
    return f"{hint} {kind}: {', '.join(some(known, _MOST_NAMES)) or 'none'}"


@contextlib.contextmanager
def naming(field: str) -> Iterator[None]:
    """Prefixes the config field to errors whose message does not name one."""
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
    """Turns any error of a reading library into one message that names the file.

    Args:
      path: the file or folder that is read.
      remedy: what the user can do, put at the end of the message.
      fault: the message's statement about the file.
      wraps: whether to add the file's name to a UserError too.
    """
    try:
        yield
    # Libraries raise all errors of their parsers, and sometimes a plain Exception.
    except Exception as error:
        names_place = isinstance(error, UserError)
        if names_place and not wraps:
            raise
        cause = error if names_place else reason(error)
        raise UserError(f"{path} {fault}: {cause}; {remedy}") from error


def reason(error: Exception) -> str:
    """Returns a library's message in one line.

    The kind of the error is put before it, unless its text is a sentence by itself.
    """
    kind = "" if isinstance(error, OSError | ValueError) else type(error).__name__
    text = " ".join(str(error).split())
    return ": ".join(part for part in (kind, text) if part)[:300]


def _shown_line(line: str) -> str:
    line = _middle(line, _LONGEST_LINE)
    return _UNSHOWN.sub(lambda found: ascii(found[0])[1:-1], line)


def _middle(text: AnyStr, limit: int) -> AnyStr:
    """Returns a text, with its middle cut out if it is longer than `limit`."""
    if len(text) <= limit:
        return text
    end = limit // 3
    gap = "..." if isinstance(text, str) else b"..."
    return text[: limit - end - 3] + gap + text[-end:]
