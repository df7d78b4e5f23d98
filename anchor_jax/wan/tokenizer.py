"""Prompts to token ids, as the text encoder was trained with them."""

import html
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

PAD = 0
END = 1
UNKNOWN = 2


class Tokenizer(Protocol):
    """Anything that turns prompts into padded ids and a mask."""

    text_len: int

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and mask, both int32 [B, text_len]; each row ends in `</s>`."""


def clean_prompt(text: str) -> str:
    """Returns the prompt with broken text mended and runs of whitespace made one space.

    Case is kept. Source: algorithm.md, section 9.2 (cleaning mode "whitespace").
    """
    import ftfy

    # Twice: captions scraped from the web are often escaped twice.
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def pad_ids(
    rows: Sequence[Sequence[int]], text_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids and mask, int32 [B, text_len], of rows without their end token.

    Each row is cut to make room for `</s>`, which is then appended.
    """
    ids = np.full((len(rows), text_len), PAD, np.int32)
    mask = np.zeros_like(ids)
    for number, row in enumerate(rows):
        kept = [*row[: text_len - 1], END]
        ids[number, : len(kept)] = kept
        mask[number, : len(kept)] = 1
    return ids, mask


class SentencePieceTokenizer:
    """A tokenizer backed by a sentencepiece model, from a file or its bytes."""

    def __init__(self, model: str | pathlib.Path | bytes, text_len: int):
        import sentencepiece

        if isinstance(model, bytes):
            source = {"model_proto": model}
        else:
            source = {"model_file": str(model)}
        self._processor = sentencepiece.SentencePieceProcessor(**source)
        self.text_len = text_len
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
        """The model, as its file holds it."""
        return self._processor.serialized_model_proto()

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and mask, int32 [B, text_len]."""
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        return pad_ids(self._processor.encode(cleaned), self.text_len)

    def unknown_words(self, prompt: str) -> list[str]:
        """Returns the words of a prompt that are not wholly in the vocabulary.

        Each is named once, in order. A word is what stands between spaces.
        """
        words = dict.fromkeys(clean_prompt(prompt).split())
        return [word for word in words if UNKNOWN in self._processor.encode(word)]


class FastTokenizer:
    """A tokenizer backed by a `tokenizer.json` of the package `tokenizers`."""

    def __init__(self, path: str | pathlib.Path, text_len: int):
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # The file may ask for its own lengths; ours are those of the encoder.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.text_len = text_len

    @property
    def vocab(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids and mask, int32 [B, text_len]."""
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        found = self._tokenizer.encode_batch(cleaned, add_special_tokens=False)
        return pad_ids([row.ids for row in found], self.text_len)


def load_tokenizer(folder: str | pathlib.Path, text_len: int = 512) -> Tokenizer:
    """Returns the tokenizer stored in a folder.

    Prefers `tokenizer.json`, which needs the package `tokenizers`, to `spiece.model`.

    Raises:
      FileNotFoundError: The folder holds neither, or only one that cannot be read here.
    """
    folder = pathlib.Path(folder)
    fast, pieces = folder / "tokenizer.json", folder / "spiece.model"
    can_read_fast = importlib.util.find_spec("tokenizers") is not None
    if fast.exists() and can_read_fast:
        return FastTokenizer(fast, text_len)
    if pieces.exists():
        return SentencePieceTokenizer(pieces, text_len)
    if fast.exists():
        raise FileNotFoundError(
            f"{folder} holds tokenizer.json but the package `tokenizers` is not"
            " installed, and there is no spiece.model; run `pip install tokenizers`"
            " or put spiece.model of google/umt5-xxl there"
        )
    raise FileNotFoundError(
        f"no tokenizer in {folder}: expected tokenizer.json or spiece.model; download"
        " one of them from google/umt5-xxl into that folder"
    )
