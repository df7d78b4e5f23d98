"""Training prompts with their switch prompts, from files of any kind."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from anchor_jax.errors import UserError
from anchor_jax.prompt_files import PromptFile, decode, prompt_field, watched
from anchor_jax.prompts import MAX_PROMPT_CHARACTERS
from anchor_jax.text import check_text

Pair = tuple[str, str]
_FIELDS = ("prompt", "prompt_en", "switch", "caption")
_KINDS = {"text": False, "lines": True}
_EXPECTED = (
    'expected {"prompt": TEXT, "switch": TEXT}, {"prompts": [TEXT, TEXT]}, or'
    ' {"prompt": TEXT} in every line'
)


class PairFiles:
    """A file of prompts, and optionally a second file with their switch prompts."""

    def __init__(self, paths: Sequence[pathlib.Path]):
        """Opens the files.

        Raises:
          UserError: A file cannot be read, or the two are incompatible.
        """
        self.files = [open_file(path) for path in paths]
        first, *second = self.files
        if second and any(_holds_objects(file) for file in self.files):
            raise UserError(
                f"{first.path}, {second[0].path}: a file of JSON lines holds both"
                " prompts; leave the switch path out"
            )

    @property
    def kind(self) -> bool | str:
        """The kind of file as part of a dataset's hash."""
        kind = self.files[0].kind
        return _KINDS.get(kind, kind)

    def read(self, seed: int) -> list[Pair]:
        """Returns the pairs; a missing switch prompt is drawn by the seed.

        Raises:
          UserError: A line is wrong; the message names it.
        """
        first, *second = self.files
        if second:
            return _aligned(first, second[0])
        found = list(entries(first))
        singles = [len(one) == 1 for one in found]
        if all(singles):
            return _drawn(first, [one[0] for one in found], seed)
        if any(singles):
            raise UserError(
                f"{first.path}: {sum(singles)} of {len(found)} entries have one prompt,"
                f" the others two; {_EXPECTED}"
            )
        return [(one[0], one[1]) for one in found]


def open_file(path: pathlib.Path, columns: Sequence[str] = ("prompt",)) -> PromptFile:
    """Returns a file that is read without comments, since line numbers matter."""
    return PromptFile(path, comments=False, columns=columns, others=("switch",))


def entries(file: PromptFile) -> Iterator[tuple[str, ...]]:
    """Yields the one or two prompts of each line.

    Raises:
      UserError: A line is wrong; the message names it.
    """
    count = 0
    for number, value in watched(file, "reads prompts"):
        where, count = file.place(number), count + 1
        texts = (value,) if file.kind == "text" else _texts(where, value)
        for text in texts:
            check_length(where, text.strip(), MAX_PROMPT_CHARACTERS)
        yield tuple(text.strip() for text in texts)
    if not count:
        raise UserError(
            f"{file.path}: the file has no lines; each line must be a prompt or a"
            " JSON object"
        )


def texts_in(value: Any, kind: str) -> tuple[str, ...]:
    """Returns the prompts or the caption of one line or entry; empty if it is wrong."""
    if kind == "text":
        return (value,) * bool(value)
    if isinstance(value, str):
        try:
            value = decode(value)
        except UserError:
            return ()
    if not isinstance(value, dict):
        return ()
    found = value.get("prompts") or [value[name] for name in _FIELDS if name in value]
    if not isinstance(found, list):
        return ()
    return tuple(text for text in found if isinstance(text, str) and text.strip())[:2]


def check_length(where: str, text: str, limit: int) -> None:
    """Raises UserError unless the text has between one character and a limit."""
    if not text:
        raise UserError(f"{where}: empty prompt; write a prompt, or remove the line")
    if len(text) > limit:
        raise UserError(
            f"{where}: {len(text)} characters, at most {limit} are allowed; shorten it"
        )
    check_text(text, where)


def _holds_objects(file: PromptFile) -> bool:
    return file.kind in ("lines", "document")


def _texts(where: str, value: Any) -> tuple[str, ...]:
    """Returns the prompts of an object, or of the JSON line that holds it."""
    try:
        entry = decode(value) if isinstance(value, str) else value
        field = prompt_field(entry) if isinstance(entry, dict) else None
    except UserError as error:
        raise UserError(f"{where}: {error}; write one object per line") from error
    texts = entry[field] if field else None
    if field and field != "prompts":
        texts = [entry[name] for name in (field, "switch") if name in entry]
    is_list = isinstance(texts, list) and 0 < len(texts)
    if not is_list or not all(isinstance(text, str) for text in texts[:2]):
        raise UserError(f"{where}: got {str(value)[:60]}, {_EXPECTED}")
    return tuple(texts[:2])


def _aligned(first: PromptFile, second: PromptFile) -> list[Pair]:
    prompts, switches = ([one[0] for one in entries(file)] for file in (first, second))
    both = f"{first.path}, {second.path}"
    if prompts == switches:
        raise UserError(
            f"{both}: the two files are equal, so that no switch would change the"
            " prompt; give a second file with the switch prompts"
        )
    if len(prompts) != len(switches):
        shorter = min(len(prompts), len(switches))
        raise UserError(
            f"{second.path}: {len(switches)} lines, expected {len(prompts)} as in"
            f" {first.path}: line k of one belongs to line k of the other; line"
            f" {shorter + 1} is the first without a partner"
        )
    return list(zip(prompts, switches, strict=True))


def _drawn(file: PromptFile, lines: Sequence[str], seed: int) -> list[Pair]:
    """Pairs every line with another line of different text."""
    if len(set(lines)) < 2:
        raise UserError(
            f"{file.path}: needs at least two different prompts, since"
            " each line is switched to another line; add lines"
        )
    rng = np.random.default_rng((seed, len(lines)))
    pairs = []
    for number, line in enumerate(watched(lines, "draws switches")):
        other = line
        while other == line:
            step = int(rng.integers(1, len(lines)))
            other = lines[(number + step) % len(lines)]
        pairs.append((line, other))
    return pairs
