"""Prompts from a user's files, each with the prompt that it is switched to."""

import pathlib

from anchor_jax.training.data import datasets
from anchor_jax.training.data.kinds import DataConfig, PromptKind, Texts, path_of
from anchor_jax.training.data.order import Order

_READS = "a prompt a line, or JSON lines with prompt and switch"


class PromptFileKind(PromptKind):
    """The kind `prompts`: one file or two, in another order in every epoch."""

    columns = ("prompt",)
    is_free_text = True

    def open_texts(self, data: DataConfig, folder: pathlib.Path) -> Texts:
        """Returns number -> a pair of prompts of the files."""
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
