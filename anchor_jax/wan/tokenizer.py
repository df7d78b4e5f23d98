"""Converts prompts to token ids as in the text encoder's training."""

import abc
import dataclasses
import functools
import html
import pathlib
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32

from anchor_jax.axes import Array
from anchor_jax.wan.spec import WAN_2_1

Ids = Int32[Array, "batch text"]

PAD = 0
END = 1
UNKNOWN = 2
SPECIAL = ("<pad>", "</s>", "<unk>")
"""The pieces of the special ids in `tokenizer.json`."""
MOST_BYTES = 256 * 2**20
"""Size limit of a `tokenizer.json` in bytes; that of UMT5-XXL has 17 MB."""

_NAMED = 5  # prompts in a report
_LISTED = 20  # words in a message
_WARNED = 10  # prompts with a warning
_TAIL = 40  # characters shown before the cut
_FIRST = 60  # characters of a prompt in a message


class CutWarning(UserWarning):
    """Warns that a prompt is longer than the text encoder reads."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """A prompt of which the text encoder reads only the beginning.

    Attributes:
      tokens: number of tokens, with the end token.
      kept: number of tokens that are read, with the end token.
      beginning: the text that is read.
    """

    tokens: int
    kept: int
    beginning: str

    def __str__(self) -> str:
        tail = self.beginning.rstrip()
        dots = "..." if len(tail) > _TAIL else ""
        return (
            f"{self.kept} of {self.tokens} tokens are read; it is cut after"
            f" {dots + tail[-_TAIL:]!r}"
        )


class Tokenizer(abc.ABC):
    """Turns prompts into padded ids and a mask.

    Attributes:
      text_len: number of tokens per row.
      note: note for the user on the source of the ids, or "".
    """

    def __init__(self, text_len: int, note: str = ""):
        self.text_len, self.note = text_len, note
        self._reported: set[int] = set()
        self._warned = 0
        self._is_known = functools.lru_cache(100_000)(self._has)

    @property
    @abc.abstractmethod
    def vocab(self) -> int:
        """Number of ids."""

    @abc.abstractmethod
    def _rows(self, cleaned: Sequence[str]) -> list[Sequence[int]]:
        """Returns the ids of texts without their end tokens."""

    @abc.abstractmethod
    def _beginning(self, cleaned: str, row: Sequence[int]) -> str:
        """Returns the beginning of a text, as its first ids spell it."""

    def encode(self, prompts: Sequence[str]) -> tuple[Ids, Ids]:
        """Returns ids and mask; each row of ids ends in `</s>`.

        A longer prompt is cut, with a `CutWarning` unless `cut` was called for it.
        """
        rows = self._rows([clean_prompt(prompt) for prompt in prompts])
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) >= self.text_len and hash(prompt) not in self._reported:
                self._warn(prompt)
        return pad_ids(rows, self.text_len)

    def cut(self, prompt: str) -> Cut | None:
        """Returns the part of a prompt that is read, or None if all of it is read."""
        cleaned = clean_prompt(prompt)
        (row,) = self._rows([cleaned])
        if len(row) < self.text_len:
            return None
        self._reported.add(hash(prompt))
        kept = row[: self.text_len - 1]
        return Cut(len(row) + 1, self.text_len, self._beginning(cleaned, kept))

    def unknown_words(self, prompt: str) -> list[str]:
        """Returns the words of a prompt with parts outside the vocabulary.

        Each is listed once, in order. Words are separated by spaces.
        """
        words = dict.fromkeys(clean_prompt(prompt).split())
        return [word for word in words if not self._is_known(word)]

    def _has(self, word: str) -> bool:
        return UNKNOWN not in self._rows([word])[0]

    def _warn(self, prompt: str) -> None:
        """Warns about the first prompts that are cut, and later about their number."""
        found = self.cut(prompt)
        self._warned += 1
        if self._warned <= _WARNED:
            text = f"{_shortened(prompt)}: {found}"
        elif self._warned in (100, 1000, 10_000, 100_000, 1_000_000):
            text = f"{self._warned} prompts have been cut so far"
        else:
            return
        warnings.warn(text, CutWarning, stacklevel=3)


def report_cuts(
    tokenizer: Tokenizer, texts: Iterable[tuple[str, str]], most: int = _NAMED
) -> list[str]:
    """Returns lines about prompts that are cut.

    Args:
      tokenizer: tokenizer of the text encoder.
      texts: pairs of a prompt's place and the prompt.
      most: number of prompts to list; the others are counted.
    """
    known: dict[str, Cut | None] = {}
    found, count = [], 0
    for where, text in texts:
        if text not in known:
            known[text] = tokenizer.cut(text)
            if known[text] is not None:
                count += 1
                found += [(where, text)] * (len(found) < most)
    if not count:
        return []
    many = "1 prompt is" if count == 1 else f"{count} prompts are"
    lines = [
        f"{many} longer than the {tokenizer.text_len} tokens that the text encoder"
        " reads; the rest has no effect"
    ]
    lines += [f"  {where}: {_shortened(text)}: {known[text]}" for where, text in found]
    return lines + [f"  and {count - most} more"] * (count > most)


def listed(words: Sequence[str]) -> str:
    """Returns the first words as text, with the number of the others."""
    more = len(words) - _LISTED
    shown = ", ".join(word[:_FIRST] for word in words[:_LISTED])
    return f"{shown} and {more} more" if more > 0 else shown


def _shortened(text: str) -> str:
    text = " ".join(text[: 4 * _FIRST].split())
    return repr(text if len(text) <= _FIRST else f"{text[: _FIRST - 3]}...")


def clean_prompt(text: str) -> str:
    """Returns the prompt with encoding errors repaired and whitespace collapsed.

    Case is kept. Source: wan/README.md, "Tokenizer".
    """
    # Neither call changes printable ASCII without entities, and both are slow.
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split())
    import ftfy

    # Twice: captions scraped from the web are often escaped twice.
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def pad_ids(rows: Sequence[Sequence[int]], text_len: int) -> tuple[Ids, Ids]:
    """Returns ids and mask for rows without end tokens.

    Each row is cut to leave room for `</s>`, which is then appended.
    """
    ids = np.full((len(rows), text_len), PAD, np.int32)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        kept = [*row[: text_len - 1], END]
        ids[number, : len(kept)] = kept
        mask[number, : len(kept)] = 1
    return ids, mask


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer with a sentencepiece model, from a file or its bytes."""

    def __init__(
        self, model: str | pathlib.Path | bytes, text_len: int, note: str = ""
    ):
        import sentencepiece

        super().__init__(text_len, note)
        if isinstance(model, bytes):
            source = {"model_proto": model}
        else:
            source = {"model_file": str(model)}
        self._processor = sentencepiece.SentencePieceProcessor(**source)
        pad, end = self._processor.pad_id(), self._processor.eos_id()
        unknown = self._processor.unk_id()
        if (pad, end, unknown) != (PAD, END, UNKNOWN):
            raise ValueError(
                f"the model's pad, end and unknown ids are {(pad, end, unknown)},"
                f" expected {(PAD, END, UNKNOWN)}; train it with pad_id=0, eos_id=1,"
                " unk_id=2, bos_id=-1"
            )

    @property
    def vocab(self) -> int:
        return self._processor.get_piece_size()

    @property
    def content(self) -> bytes:
        """The model as the bytes of its file."""
        return self._processor.serialized_model_proto()

    def _rows(self, cleaned: Sequence[str]) -> list[Sequence[int]]:
        return self._processor.encode(list(cleaned))

    def _beginning(self, cleaned: str, row: Sequence[int]) -> str:
        del cleaned
        return self._processor.decode(list(row))


class FastTokenizer(Tokenizer):
    """A tokenizer with a `tokenizer.json` of the package `tokenizers`."""

    def __init__(self, path: str | pathlib.Path, text_len: int):
        """Reads the file.

        Raises:
          ValueError: The file is damaged or too large, or has other special ids.
        """
        super().__init__(text_len)
        self._tokenizer = _open_json(pathlib.Path(path))
        found = tuple(map(self._tokenizer.token_to_id, SPECIAL))
        if found != (PAD, END, UNKNOWN):
            raise ValueError(
                f"{path}: the ids of {', '.join(SPECIAL)} are {found}, expected"
                f" {(PAD, END, UNKNOWN)}; use the file of google/umt5-xxl"
            )
        # The file may set its own lengths; the encoder's replace them.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @property
    def vocab(self) -> int:
        return self._tokenizer.get_vocab_size()

    def _rows(self, cleaned: Sequence[str]) -> list[Sequence[int]]:
        found = self._tokenizer.encode_batch(list(cleaned), add_special_tokens=False)
        return [row.ids for row in found]

    def _beginning(self, cleaned: str, row: Sequence[int]) -> str:
        found = self._tokenizer.encode(cleaned, add_special_tokens=False)
        return cleaned[: max((end for _, end in found.offsets[: len(row)]), default=0)]


def _open_json(path: pathlib.Path):
    """Returns the tokenizer in an untrusted file.

    Raises:
      ValueError: It is damaged or too large.
    """
    import tokenizers

    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{path} has {size} bytes; the limit is {MOST_BYTES}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    # The package raises plain exceptions, and its own class for internal failures.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | OSError | MemoryError):
            raise
        raise ValueError(f"{path} is damaged: {str(error)[:200]}") from error


def load_tokenizer(
    folder: str | pathlib.Path, text_len: int = WAN_2_1.text_len
) -> Tokenizer:
    """Returns the tokenizer stored in a folder.

    A `tokenizer.json` is preferred, as in transformers. Without it sentencepiece reads
    `spiece.model`. Its ids differ for special tokens in a prompt, and for characters
    that only bytes can spell; the tokenizer's `note` says so.

    Raises:
      FileNotFoundError: The folder holds neither.
      ValueError: The file is damaged, or does not belong to a T5 encoder.
    """
    folder = pathlib.Path(folder)
    fast, pieces = folder / "tokenizer.json", folder / "spiece.model"
    if fast.exists():
        return FastTokenizer(fast, text_len)
    if pieces.exists():
        return SentencePieceTokenizer(pieces, text_len, SPIECE_NOTE)
    raise FileNotFoundError(
        f"no tokenizer in {folder}: needs tokenizer.json or spiece.model; download"
        " one of them from google/umt5-xxl into that folder"
    )


SPIECE_NOTE = (
    "token ids come from spiece.model, since the weights have no tokenizer.json; ids of"
    " characters outside the vocabulary may differ from those of transformers; port the"
    " weights again with tokenizer.json of google/umt5-xxl to have the same"
)
"""Note for tokenizers that have only `spiece.model`."""
