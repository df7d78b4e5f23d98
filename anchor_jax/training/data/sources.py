"""Batches of prompts and of clips, from the kind of data that a config names.

A source is a pure function of a batch's number.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from anchor_jax.errors import UserError, suggest
from anchor_jax.training.data import kinds
from anchor_jax.training.data.kinds import (
    CLIPS,
    PROMPTS,
    Batches,
    ClipKind,
    ClipRequest,
    DataConfig,
    Texts,
)
from anchor_jax.training.data.order import Share
from anchor_jax.weights.bundle import Bundle

LOOKED_AT = 1000  # pairs


def identity(data: DataConfig) -> dict[str, Any]:
    """Returns JSON values that change if the data of a training changes.

    Raises:
      UserError: The folder holds no trajectories.
    """
    return kinds.find_kind(data).identity(data)


def open_texts(data: DataConfig, folder: pathlib.Path) -> Texts:
    """Returns a function from a number to a prompt and its switch prompt.

    Args:
      data: config section `data`, whose kind is in `PROMPTS`.
      folder: folder of the training. Datasets are built there unless the config names
        another folder.

    Raises:
      UserError: The kind does not give prompts, or a file is wrong.
    """
    if data.kind not in PROMPTS:
        known = suggest(data.kind, PROMPTS, "kinds with prompts")
        raise UserError(f"config.data.kind={data.kind!r}{known}")
    return PROMPTS[data.kind].open_texts(data, folder)


def check_kind(data: DataConfig, known: Mapping[str, Any], stage: str) -> None:
    """Raises UserError if a stage cannot use the data."""
    if data.kind not in known:
        found = suggest(data.kind, known, f"kinds for stage {stage}")
        raise UserError(f"config.data.kind={data.kind!r}{found}")
    if not 0 <= data.dropout < 1:
        raise UserError(
            f"config.data.dropout={data.dropout}: must be at least 0 and below 1"
        )


def open_prompts(
    texts: Texts, bundle: Bundle, share: Share, negative_prompt: str
) -> Batches:
    """Returns batches of encoded prompts.

    Each batch has `prompt`, `switch` and `negative`, all [row, text, dim].
    """
    negative = _negative(bundle, negative_prompt, share)

    def draw(number: int) -> Mapping[str, Any]:
        first, second = zip(*map(texts, share.places(number)), strict=True)
        return {
            "prompt": np.asarray(bundle.encode_prompts(list(first))),
            "switch": np.asarray(bundle.encode_prompts(list(second))),
            "negative": negative,
        }

    return draw


def check_switching(texts: Texts) -> None:
    """Raises UserError unless a switch changes the prompt of some sequences."""
    if all(first == second for first, second in map(texts, range(LOOKED_AT))):
        raise UserError(
            "config.data: every prompt equals its switch prompt, so that no switch"
            " would change anything; give different ones in `switch` of the JSON lines"
            " or in data.switch_path"
        )


def open_clips(
    request: ClipRequest, trains_text: bool, negative_prompt: str | None = None
) -> Batches:
    """Returns batches of clips.

    Args:
      request: the stage's request, whose kind is in `CLIPS`.
      trains_text: whether batches hold token ids, for a text encoder that is trained
        too. If false, the ids are encoded here.
      negative_prompt: prompt whose embedding each batch holds as `negative`, or None.

    Raises:
      UserError: A file is wrong, or the data do not suit the request.
    """
    kind: ClipKind = CLIPS[request.data.kind]
    draw = kind.open_clips(request)
    if not trains_text:
        draw = _encoding(draw, request.bundle)
    if negative_prompt is None:
        return draw
    negative = _negative(request.bundle, negative_prompt, request.share)
    return lambda number: {**draw(number), "negative": negative}


def _negative(bundle: Bundle, prompt: str, share: Share) -> np.ndarray:
    """Returns the embedding of the negative prompt, [row, text, dim]."""
    return np.asarray(bundle.encode_prompts([prompt] * len(share.rows)))


def _encoding(draw: Batches, bundle: Bundle) -> Batches:
    """Returns batches with embeddings in place of token ids."""

    def encoded(number: int) -> Mapping[str, Any]:
        found = dict(draw(number))
        if "ids" not in found:
            return found
        ids, mask = found.pop("ids"), found.pop("mask")
        embedding = bundle.encode_prompts.encode_ids(
            ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, mask.shape[-1])
        )
        shape = (*ids.shape, embedding.shape[-1])
        return {**found, "embedding": np.asarray(embedding).reshape(shape)}

    return encoded
