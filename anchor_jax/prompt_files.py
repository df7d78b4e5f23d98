"""Reads prompt files as streams: plain text, JSON lines, JSON documents, tables."""

import array
import codecs
import contextlib
import csv
import io
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from anchor_jax import places
from anchor_jax.errors import UserError, shown
from anchor_jax.text import check_text

Item = TypeVar("Item")
PROMPT_FIELDS = ("prompt", "prompt_en")
"""Names of the field with one prompt. The field `prompts` has a list instead."""

_MOST_LINE = 4 * 2**20  # bytes
_MOST_PIPED = 256 * 2**20  # bytes
# Characters of a JSON document. Parsing it may take 20 times as much memory.
_MOST_DOCUMENT = 32 * 2**20
_SNIFFED = 3  # lines from which the kind of a file is detected
_TABLES = {".csv": (",", ";", "\t"), ".tsv": ("\t",), ".tab": ("\t",)}
_JSON = (".json", ".jsonl", ".ndjson")
_ALIASES = {"prompt": ("prompt_en", "text_prompt", "text prompt", "caption", "text")}
# Column names that show that a text file's first line is the header of a table.
_HEADERS = {"prompt", "prompts", "prompt_en", "text_prompt", "text prompt"}
_CAPTIONS = ("caption", "text")
_SAVE_AS = (
    "save the prompts as text with one prompt per line, as JSON lines, or as a .csv"
    " with a column named prompt"
)
_CONTAINERS = {
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"7z\xbc\xaf": "a 7z archive",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\xd0\xcf\x11\xe0": "an office document",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"SQLite": "a database",
    b"%PDF": "a PDF",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
_OTHERS = {
    **dict.fromkeys((".yaml", ".yml"), "YAML"),
    **dict.fromkeys((".toml", ".xml"), "a settings file"),
    **dict.fromkeys((".html", ".htm"), "a web page"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet"),
    **dict.fromkeys((".parquet", ".arrow", ".feather"), "a binary table"),
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst", ".tar"), "an archive"),
    **dict.fromkeys((".pkl", ".pt", ".pth", ".npy", ".npz"), "a file of arrays"),
    **dict.fromkeys((".py", ".mp4", ".png", ".jpg"), "not a file of prompts"),
    **dict.fromkeys((".pdf", ".docx"), "not a file of prompts"),
}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class PromptFile:
    """A file of prompts; its kind is detected from its name and its first lines.

    Attributes:
      path: the path of the file.
      kind: "text" (one prompt per line), "lines" (one JSON object per line), "document"
        (one JSON document) or "table" (comma or tab separated values).
      comments: whether lines that start with # are skipped in text and JSON lines.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        comments: bool = True,
        columns: Sequence[str] = ("prompt",),
        others: Sequence[str] = (),
    ):
        """Opens a file and reads its first lines.

        Args:
          path: the path of the file.
          comments: whether blank lines and lines that start with # are skipped.
          columns: required columns of a table.
          others: optional columns of a table.

        Raises:
          UserError: The file cannot be read, or is not a file of prompts.
        """
        check_text(str(path), "the path of the prompts")
        self.path, self.comments = path, comments
        self._columns, self._others = columns, others
        with _explained(path):
            is_pipe = path.exists() and not path.is_file() and not path.is_dir()
        # Objects of a bucket have no lines either.
        is_whole = is_pipe or places.is_remote(path)
        self._content = self._read_whole() if is_whole else None
        self._hashes = array.array("q")
        self._first_hash = ""
        self._notes: list[str] = []
        self._check_kind()
        self.kind = self._find_kind()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Yields the number and value of each line or entry.

        The value is a string for text and for JSON lines, and a dict for a document and
        a table.

        Raises:
          UserError: The file is damaged; the message names the line.
        """
        self._hashes, self._notes = array.array("q"), []
        read = {
            "text": self._prompts,
            "lines": self._significant,
            "document": self._entries,
            "table": self._rows,
        }
        return read[self.kind]()

    def place(self, number: int) -> str:
        """Returns the name of a line or entry in messages."""
        unit = "entry" if self.kind == "document" else "line"
        return f"{self.path}, {unit} {number}"

    def notes(self) -> list[str]:
        """Returns notes about the file; call it after the file has been read."""
        notes = list(self._notes)
        if self._hashes:
            one = len(self._hashes) == 1
            what = "1 line" if one else f"{len(self._hashes)} lines"
            fate = "a prompt" if one else "prompts"
            if self.comments:
                fate = "a comment" if one else "comments"
            done = "skipped" if self.comments else "read"
            notes.append(
                f"{self.path}: {what} that {'starts' if one else 'start'} with #"
                f" {'is' if one else 'are'} {done} as {fate}; line {self._hashes[0]}:"
                f" {shown(self._first_hash)}"
            )
        return notes

    def _read_whole(self) -> bytes:
        """Returns the content of a pipe, which is read only once, or of an object."""
        with _explained(self.path), self.path.open("rb") as file:
            content = file.read(_MOST_PIPED + 1)
        if len(content) > _MOST_PIPED:
            kind = "in a bucket" if places.is_remote(self.path) else "from a pipe"
            raise UserError(
                f"{self.path}: more than {_MOST_PIPED} bytes {kind}; use a file"
            )
        return content

    def _open(self):
        if self._content is not None:
            return io.BytesIO(self._content)
        with _explained(self.path):
            return self.path.open("rb")

    def _check_kind(self) -> None:
        """Raises UserError for binary files, and for text of other known formats."""
        with self._open() as file, _explained(self.path):
            head = file.read(4096)
        found = next(
            (k for start, k in _CONTAINERS.items() if head.startswith(start)), ""
        )
        if head[4:8] == b"ftyp":
            found = "a video"
        found = found or _OTHERS.get(self.path.suffix.lower(), "")
        if not found and b"\0" in head and not _mark(head)[0]:
            found = "not text, or UTF-16 text without a byte order mark"
        if found:
            raise UserError(f"{self.path} is {found}, expected prompts; {_SAVE_AS}")

    def _find_kind(self) -> str:
        suffix = self.path.suffix.lower()
        if suffix in _TABLES:
            return "table"
        lines = itertools.islice(self._significant(), _SNIFFED)
        first = [text for _, text in lines if text]
        if not first:
            return "text"
        if suffix in _JSON or re.match(r'\{|\[$|\[\s*[{"]', first[0]):
            return _json_kind(first, suffix)
        if _is_header(first[0]):
            raise UserError(
                f"{self.path}: the first line, {shown(first[0])}, is the header of a"
                " table; rename the file to .csv or .tsv, or keep only the prompts"
            )
        return "text"

    def _significant(self) -> Iterator[tuple[int, str]]:
        """Yields the number and text of each line, without comments and blank lines.

        If the file has no comments, blank lines before the last text line are kept.
        """
        blank: list[int] = []
        for number, line in self._lines():
            text = line.strip()
            if text.startswith("#"):
                if not self._hashes:
                    self._first_hash = text
                self._hashes.append(number)
                if self.comments:
                    continue
            if not text:
                # At most two are kept, so that a file of blank lines takes no memory.
                if not self.comments and len(blank) < 2:
                    blank.append(number)
                continue
            yield from ((one, "") for one in blank)
            blank = []
            check_text(text, f"{self.path}, line {number}")
            yield number, text

    def _prompts(self) -> Iterator[tuple[int, str]]:
        """Yields the number and text of each line of a file that has no JSON lines."""
        for number, text in self._significant():
            if text.startswith("{") and isinstance(_parsed(text), dict):
                raise UserError(
                    f"{self.path}, line {number}: a JSON object, but earlier lines are"
                    " plain prompts; write every line as JSON, or none"
                )
            yield number, text

    def _entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the objects of one JSON document."""
        start = f"{self.path} is one JSON document"
        size = 0
        parts = []
        for _, line in self._lines():
            size += len(line)
            if size > _MOST_DOCUMENT:
                raise UserError(
                    f"{start} of more than {_MOST_DOCUMENT} characters; write one"
                    " object per line"
                )
            parts.append(line)
        try:
            value = json.loads("".join(parts))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{start} that is damaged ({short_line(str(error))}); expected a list"
                ' of objects {"prompt": TEXT}, or one such object per line'
            ) from error
        entries = value if isinstance(value, list) else [value]
        read: dict[str, int] = {}
        for number, entry in enumerate(entries, 1):
            try:
                yield number, self._entry(entry, read)
            except UserError as error:
                raise UserError(
                    f"{start}; expected a list of objects with one prompt each, or one"
                    f" object per line; entry {number}: {error}"
                ) from error
        fields = ", ".join(f"{field!r} ({count})" for field, count in read.items())
        self._notes.append(f"{self.path}: one JSON document; fields read: {fields}")

    def _entry(self, entry: Any, read: dict[str, int]) -> dict[str, Any]:
        if isinstance(entry, str):
            entry = {"prompt": entry}
        if not isinstance(entry, dict):
            raise UserError(f"got {shown(entry)}")
        field = prompt_field(entry)
        if field is None and not set(self._columns) <= entry.keys():
            fields = ", ".join(shown(key, 20) for key in list(entry)[:8]) or "none"
            raise UserError(f"the field 'prompt' is missing; its fields: {fields}")
        name = field or self._columns[-1]
        if not isinstance(entry[name], str | list):
            raise UserError(f"{name!r}: got {shown(entry[name])}, expected text")
        read[name] = read.get(name, 0) + 1
        return entry

    def _rows(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yields the wanted columns of a table."""
        lines = (line for _, line in self._lines())
        first = next(lines, "")
        number = 1
        try:
            header, delimiter = self._header(first)
            places = self._choose(header)
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            number = 2
            for row in rows:
                if any(cell.strip() for cell in row):
                    self._check_width(number, row, header)
                    yield number, self._cells(number, row, places)
                number = rows.line_num + 2
        except csv.Error as error:
            raise UserError(
                f"{self.path}, line {number}: the table is damaged ({error}); save it"
                " again as UTF-8 CSV"
            ) from error

    def _header(self, first: str) -> tuple[list[str], str]:
        """Returns the names of the columns, and their delimiter."""
        for delimiter in _TABLES[self.path.suffix.lower()]:
            names = next(csv.reader([first], delimiter=delimiter), [])
            names = [name.strip().lower() for name in names]
            if self._columns[0] in names or self._alias(self._columns[0], names):
                return names, delimiter
        delimiter = _TABLES[self.path.suffix.lower()][0]
        names = next(csv.reader([first], delimiter=delimiter), [])
        return [name.strip().lower() for name in names], delimiter

    def _alias(self, column: str, names: Sequence[str]) -> list[str]:
        return [name for name in _ALIASES.get(column, ()) if name in names]

    def _choose(self, header: Sequence[str]) -> dict[str, int]:
        """Returns the index of each wanted column.

        Raises:
          UserError: A column is missing, or several columns have a matching name.
        """
        names = ", ".join(shown(name, 30) for name in header[:12]) or "none"
        places = {}
        for column in self._columns:
            found = [column] * header.count(column) or self._alias(column, header)
            if len(found) != 1:
                problem = "no column" if not found else f"{len(found)} columns"
                raise UserError(
                    f"{self.path}: {problem} of prompts in this table; expected one"
                    f" named {column!r} in the first line, got {names}; rename a"
                    " column, or save the prompts as text with one prompt per line"
                )
            places[column] = header.index(found[0])
            others = [shown(name, 30) for name in header if name != found[0]]
            more = f" and {len(others) - 6} more" if len(others) > 6 else ""
            rest = f", not {', '.join(others[:6])}{more}" if others else ""
            self._notes.append(
                f"{self.path}: a table; read the column {found[0]!r}{rest}"
            )
        optional = [name for name in self._others if header.count(name) == 1]
        return places | {name: header.index(name) for name in optional}

    def _check_width(
        self, number: int, row: Sequence[str], header: Sequence[str]
    ) -> None:
        """Raises UserError if a row has another number of cells than the first line.

        Additional empty cells are allowed. Without this check a comma within a prompt
        would cut the prompt.
        """
        if len(row) < len(header) or any(cell.strip() for cell in row[len(header) :]):
            raise UserError(
                f"{self.path}, line {number}: {len(row)} columns, expected"
                f" {len(header)} as in the first line; quote cells that contain commas"
                ' ("), or remove the line'
            )

    def _cells(
        self, number: int, row: Sequence[str], places: dict[str, int]
    ) -> dict[str, str]:
        where = f"{self.path}, line {number}"
        cells = {name: row[place].strip() for name, place in places.items()}
        for name, cell in cells.items():
            check_text(cell, f"{where}, column {name!r}")
        return cells

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Yields the number and the text of each line, with its line ending."""
        with self._open() as file:
            mark, encoding = _mark(file.read(4))
            file.seek(len(mark))
            try:
                if encoding == "utf-8":
                    yield from self._utf8_lines(file)
                else:
                    yield from self._wide_lines(file, encoding)
            except OSError as error:
                raise _unreadable(self.path, error) from error

    def _utf8_lines(self, file) -> Iterator[tuple[int, str]]:
        number = 0
        while raw := file.readline(_MOST_LINE + 1):
            if len(raw) > _MOST_LINE:
                raise self._too_long(number + 1)
            # In files of old systems a carriage return alone ends a line.
            alone = b"\r" in raw.rstrip(b"\r\n")
            for part in raw.splitlines(keepends=True) if alone else (raw,):
                number += 1
                try:
                    yield number, part.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{self.path}, line {number}: not UTF-8 text (byte"
                        f" 0x{part[error.start]:02x}); save the file as UTF-8"
                    ) from error

    def _too_long(self, number: int) -> UserError:
        return UserError(
            f"{self.path}, line {number}: more than {_MOST_LINE} bytes; write one"
            " prompt per line"
        )

    def _wide_lines(self, file, encoding: str) -> Iterator[tuple[int, str]]:
        reader = io.TextIOWrapper(file, encoding=encoding, newline="")
        number = 0
        try:
            while line := reader.readline(_MOST_LINE):
                number += 1
                if len(line) == _MOST_LINE:
                    raise self._too_long(number)
                yield number, line
        except UnicodeError as error:
            raise UserError(
                f"{self.path}, line {number + 1}: not {encoding} text, although the"
                " file's byte order mark says so; save it as UTF-8"
            ) from error


def prompt_field(entry: dict[str, Any]) -> str | None:
    """Returns the name of an object's prompt field, or None.

    Raises:
      UserError: The object has several prompt fields.
    """
    if "prompts" in entry:
        return "prompts"
    found = [field for field in PROMPT_FIELDS if field in entry]
    if len(found) > 1:
        raise UserError(f"several prompt fields: {', '.join(found)}; keep only one")
    return found[0] if found else None


def watched(items: Iterable[Item], what: str, unit: str = "prompt") -> Iterable[Item]:
    """Returns the items, with a progress bar if reading takes over a second."""
    return tqdm(items, desc=what, unit=unit, delay=1, mininterval=1, leave=False)


def decode(text: str) -> Any:
    """Returns the value of a JSON line.

    Raises:
      UserError: It is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"bad JSON: {short_line(str(error))}") from error


def short_line(text: str) -> str:
    """Shortens a text to fit into one line of a message."""
    return text if len(text) <= 120 else f"{text[:117]}..."


def _json_kind(first: Sequence[str], suffix: str) -> str:
    """Returns "lines" for JSON lines, or "document" for one JSON document."""
    values = [_parsed(text) for text in first]
    if first[0].startswith("[") and values[0] is None:
        return "document"
    if any(isinstance(value, dict) for value in values):
        return "lines"
    if len(first) == 1:
        is_document = isinstance(values[0], list) or suffix == ".json"
        return "document" if is_document else "lines"
    is_open = first[0].endswith(("{", "[", ",")) and values[0] is None
    return "document" if is_open or suffix == ".json" else "lines"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_header(line: str) -> bool:
    """Returns whether a line is a table header with a prompt column."""
    for delimiter in ",;\t":
        # These names may also be words of a prompt, which has blanks or commas.
        more = [] if " " in line else ["caption"] if delimiter == "," else _CAPTIONS
        known = {*_HEADERS, *more}
        names = [name.strip(' "').lower() for name in line.split(delimiter)]
        plain = all(re.fullmatch(r"[\w -]{1,40}", name) for name in names)
        if len(names) > 1 and plain and not known.isdisjoint(names):
            return True
    return line.strip(' "').lower() in _HEADERS


def _mark(head: bytes) -> tuple[bytes, str]:
    """Returns the byte order mark at a file's start, and the encoding."""
    found = (pair for pair in _MARKS if head.startswith(pair[0]))
    return next(found, (b"", "utf-8"))


def _unreadable(path: pathlib.Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file; give the path of a file of prompts")
    return UserError(f"{path}: cannot be read: {error.strerror}")


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
    """Converts an OSError on opening or reading a file into a UserError."""
    try:
        with places.explained(path):
            yield
    except OSError as error:
        raise _unreadable(path, error) from error
