"""Prompts of the tiny world, as a kind of data: `world_prompts`."""

import pathlib

import numpy as np

from anchor_jax.tiny_world import clips, events
from anchor_jax.tiny_world import data as world_data
from anchor_jax.training.data.kinds import DataConfig, PromptKind, Texts


def sample_texts(num: int) -> list[tuple[str, str]]:
    """Returns prompts of sample videos, each with a prompt to switch to."""
    rng = np.random.default_rng(num)
    return [
        tuple(events.caption(one) for one in clips.stream_scenes(rng))
        for _ in range(num)
    ]


class WorldPromptKind(PromptKind):
    """Two scenes of the world, with an event between them."""

    version = world_data.VERSION

    def open_texts(self, data: DataConfig, folder: pathlib.Path) -> Texts:
        """Returns a function from a number to captions of two successive scenes."""
        del folder

        def draw(number: int) -> tuple[str, str]:
            rng = np.random.default_rng((data.seed, 11, number))
            first, second = clips.stream_scenes(rng)
            return events.caption(first, rng), events.caption(second, rng)

        return draw

    def first_texts(self, data: DataConfig, num: int) -> list[tuple[str, str]]:
        """Returns captions that do not depend on the data."""
        del data
        return sample_texts(num)


PROMPTS = WorldPromptKind()
