"""Reports about a training's texts: how files were read, and which texts are cut."""

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
    """Returns log lines about texts that are cut or contain durations, and about files.

    Generated texts, such as those of the tiny world, are reported when they are
    encoded.

    Args:
      data: the data section with the files.
      tokenizer: the text encoder's tokenizer.
      others: further (location, text) pairs.
    """
    files = kinds.find_kind(data).text_files(data)
    named = itertools.chain(others, *map(named_texts, files))
    looked = list(itertools.islice(named, LOOKED_AT))
    cuts = report_cuts(tokenizer, watched(looked, "checking lengths"))
    lines = [f"warning: {line}" for line in (tokenizer.note, *cuts) if line]
    timed = sum(_DURATION.search(text) is not None for _, text in looked)
    if timed:
        lines.append(
            f"warning: {timed} texts contain a duration such as [5s], which a training"
            " reads as words of the prompt; remove it"
        )
    if next(named, None) is not None:
        lines.append(
            f"note: only the first {LOOKED_AT} texts were checked; later texts that are"
            " too long are reported when they are encoded"
        )
    return [*lines, *(f"note: {one}" for file in files for one in file.notes())]


def named_texts(file: PromptFile) -> Iterator[tuple[str, str]]:
    """Yields the location of each text of a file, and the text."""
    for number, value in file:
        for text in texts_in(value, file.kind):
            yield file.place(number), text
