"""Clips and windows of the tiny world, as kinds of data.

The examples are generated once and then stored.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from anchor_jax.errors import UserError
from anchor_jax.tiny_world import clips, scene, windows
from anchor_jax.tiny_world import data as world_data
from anchor_jax.tiny_world.prompts import sample_texts
from anchor_jax.training.data import datasets
from anchor_jax.training.data.kinds import Batches, ClipKind, ClipRequest, DataConfig


class WorldKind(ClipKind):
    """A kind of data that is generated."""

    version = world_data.VERSION

    def first_texts(self, data: DataConfig, num: int) -> list[tuple[str, str]]:
        """Returns captions that do not depend on the data."""
        del data
        return sample_texts(num)


class WorldClipKind(WorldKind):
    """The kind `world_clips`: short clips, for the bidirectional teacher."""

    def open_clips(self, request: ClipRequest) -> Batches:
        """Returns batches of generated clips."""
        data, frames = request.data, request.frames

        def make(codec):
            return clips.make_clips(codec, data.seed, data.size, frames)

        draw = clips.ClipBatches(
            clips.gather(_kept(request, make)),
            request.bundle.tokenizer,
            request.share.size,
            frames,
            data.seed,
            data.dropout,
        )
        return lambda number: request.share.of(draw(number))


class WorldWindowKind(WorldKind):
    """The kind `world_windows`: windows of streams, for teacher forcing."""

    def open_clips(self, request: ClipRequest) -> Batches:
        """Returns batches of generated windows."""
        data = request.data
        if request.frames != windows.FRAMES:
            raise UserError(
                f"config.data.kind='world_windows': windows have {windows.FRAMES}"
                f" latent frames, but the stage takes clips of {request.frames}; give"
                " it clips of that length, such as regression.block x"
                f" regression.blocks = {windows.FRAMES}"
            )

        def make(codec):
            return windows.make_windows(codec, data.seed, data.size)

        draw = windows.WindowBatches(
            windows.gather(_kept(request, make, windows.ARRAYS)),
            request.bundle.tokenizer,
            request.share.size,
            data.seed,
            data.dropout,
        )
        return lambda number: request.share.of(draw(number))


CLIPS = WorldClipKind()
WINDOWS = WorldWindowKind()


def _kept(request: ClipRequest, make, arrays=None) -> Iterator[Mapping[str, Any]]:
    """Yields generated examples, which are made once and then stored."""
    codec = {
        name: np.asarray(value) for name, value in request.bundle.codec_params.items()
    }
    side = scene.SIZE // scene.CELL
    values = [codec[name].tobytes() for name in sorted(codec)]
    made_from = {
        "kind": [request.data.kind, world_data.VERSION],
        "seed": request.data.seed,
        "codec": hashlib.sha256(b"".join(values)).hexdigest(),
    }
    examples = datasets.prepare(
        datasets.Clips,
        request.cache,
        examples=lambda: make(codec),
        size=request.data.size,
        shape=(request.frames, side, side, codec["encode"].shape[1]),
        made_from=made_from,
        arrays=arrays,
    )
    return (examples[number] for number in range(len(examples)))
