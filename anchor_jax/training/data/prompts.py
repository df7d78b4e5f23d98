"""Prompts and their switch prompts from a user's files."""

import pathlib

from anchor_jax.training.data import datasets
from anchor_jax.training.data.kinds import DataConfig, PromptKind, Texts, path_of
from anchor_jax.training.data.order import Order

_READS = "one prompt per line, or JSON lines with prompt and switch"


class PromptFileKind(PromptKind):
    """The kind `prompts`: one or two files, in a different order in every epoch."""

    columns = ("prompt",)
    is_free_text = True

    def open_texts(self, data: DataConfig, folder: pathlib.Path) -> Texts:
        """Returns a function from a number to a pair of prompts of the files."""
        pairs = datasets.prepare(
            datasets.PromptPairs,
            data.cache_in(folder),
            path=path_of(data, _READS),
            switch_path=data.switch_path,
            seed=data.seed,
        )
        order = Order(len(pairs), data.seed)

        def draw(number: int) -> tuple[str, str]:
            pair = pairs[order.index(number)]
            return pair["prompt"], pair["switch"]

        return draw


PROMPTS = PromptFileKind()
