"""What is said of a training's texts: how their files were read, and which are cut."""

import itertools
import re
from collections.abc import Iterable, Iterator

from anchor_jax.prompt_files import PromptFile, watched
from anchor_jax.training.data import kinds
from anchor_jax.training.data.kinds import DataConfig
from anchor_jax.training.data.pairs import texts_in
from anchor_jax.wan.tokenizer import Tokenizer, report_cuts

LOOKED_AT = 100_000  # texts
_DURATION = re.compile(r"\[[\d.]+[sf]#?\]")


def report_texts(
    data: DataConfig, tokenizer: Tokenizer, others: Iterable[tuple[str, str]] = ()
) -> list[str]:
    """Returns lines about texts that are not read as they stand, and on their files.

    Texts that no file holds, as the world's, are reported when they are encoded.

    Args:
      data: whose files are read.
      tokenizer: of the text encoder.
      others: further texts, each after where it stands.
    """
    files = kinds.find_kind(data).text_files(data)
    named = itertools.chain(others, *map(named_texts, files))
    looked = list(itertools.islice(named, LOOKED_AT))
    cuts = report_cuts(tokenizer, watched(looked, "looks at lengths"))
    lines = [f"warning: {line}" for line in (tokenizer.note, *cuts) if line]
    timed = sum(_DURATION.search(text) is not None for _, text in looked)
    if timed:
        lines.append(
            f"warning: {timed} texts hold a duration such as [5s], which a training"
            " reads as words; remove it"
        )
    if next(named, None) is not None:
        lines.append(
            f"note: the first {LOOKED_AT} texts were looked at; others that are too"
            " long are named when they are encoded"
        )
    return [*lines, *(f"note: {one}" for file in files for one in file.notes())]


def named_texts(file: PromptFile) -> Iterator[tuple[str, str]]:
    """Yields where each text of a file stands, and the text."""
    for number, value in file:
        for text in texts_in(value, file.kind):
            yield file.place(number), text
