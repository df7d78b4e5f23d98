"""Batches of every stage, by the kind of data that a config names.

A source is a pure function of a batch's number.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from anchor_jax.bundle import Bundle
from anchor_jax.errors import UserError, suggest
from anchor_jax.training import world_clips, world_windows
from anchor_jax.world import events

Batches = Callable[[int], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The section `data`.

    Attributes:
      kind: of `KINDS`.
      path: of files, where the kind reads some.
      switch_path: of the second prompts, where the kind takes them from a file.
      size: examples of a generated world.
      dropout: share of prompts left out, for guidance.
      seed: of what is generated and of the order.
    """

    kind: str = "world_prompts"
    path: str | None = None
    switch_path: str | None = None
    size: int = 4096
    dropout: float = 0.1
    seed: int = 0


def open_source(
    data: DataConfig, bundle: Bundle, batch: int, frames: int, negative_prompt: str
) -> Batches:
    """Returns the batches of a stage.

    Args:
      data: what they are made of.
      bundle: its tokenizer, text encoder and codec.
      batch: videos.
      frames: latent frames of a clip.
      negative_prompt: what guidance leads away from.

    Raises:
      UserError: The kind is unknown, or a file is wrong.
    """
    if data.kind not in KINDS:
        known = suggest(data.kind, KINDS, "kinds")
        raise UserError(f"config.data.kind={data.kind!r}{known}")
    if not 0 <= data.dropout < 1:
        raise UserError(f"config.data.dropout={data.dropout}: expected 0 to below 1")
    return KINDS[data.kind](data, bundle, batch, frames, negative_prompt)


def _world_clips(data, bundle, batch, frames, negative_prompt) -> Batches:
    del negative_prompt
    codec = {name: np.asarray(value) for name, value in bundle.codec_params.items()}
    clips = world_clips.sample_clips(codec, data.seed, data.size, frames)
    return world_clips.ClipBatches(
        clips, bundle.tokenizer, batch, frames, data.seed, data.dropout
    )


def _world_windows(data, bundle, batch, frames, negative_prompt) -> Batches:
    del negative_prompt
    if frames != world_windows.FRAMES:
        raise UserError(
            f"config.data.kind='world_windows': windows have {world_windows.FRAMES}"
            f" latent frames, got regression.block x regression.blocks = {frames}"
        )
    codec = {name: np.asarray(value) for name, value in bundle.codec_params.items()}
    windows = world_windows.sample_windows(codec, data.seed, data.size)
    draw = world_windows.WindowBatches(
        windows, bundle.tokenizer, batch, data.seed, data.dropout
    )

    def encoded(number: int) -> Mapping[str, Any]:
        """The text encoder is not trained along: its embeddings are data."""
        found = draw(number)
        ids, mask = found.pop("ids"), found.pop("mask")
        embedding = bundle.encode_prompts.encode_ids(
            ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, mask.shape[-1])
        )
        shape = (*ids.shape, embedding.shape[-1])
        return {**found, "embedding": np.asarray(embedding).reshape(shape)}

    return encoded


def _world_prompts(data, bundle, batch, frames, negative_prompt) -> Batches:
    """Two scenes of the world a video, an event between them."""
    del frames
    negative = np.asarray(bundle.encode_prompts([negative_prompt] * batch))

    def draw(number: int) -> Mapping[str, Any]:
        rng = np.random.default_rng((data.seed, 11, number))
        played = [world_clips.pair(rng) for _ in range(batch)]
        texts = [[events.caption(one, rng) for one in two] for two in played]
        first, second = zip(*texts, strict=True)
        return {
            "prompt": np.asarray(bundle.encode_prompts(list(first))),
            "switch": np.asarray(bundle.encode_prompts(list(second))),
            "negative": negative,
        }

    return draw


KINDS: dict[str, Callable[..., Batches]] = {
    "world_clips": _world_clips,
    "world_prompts": _world_prompts,
    "world_windows": _world_windows,
}


def check_folder(path: str) -> pathlib.Path:
    """Returns a folder that can be written to.

    Raises:
      UserError: It cannot.
    """
    folder = pathlib.Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"config.out={path!r}: cannot be written to ({error.strerror}); choose"
            " another folder"
        ) from error
    return folder
