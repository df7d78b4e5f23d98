"""Stored states of a teacher's trajectories, each block at its own noise level.

Source: training/README.md, "Trajectories".
"""

from typing import Any

import numpy as np

from anchor_jax.errors import UserError
from anchor_jax.io import expand
from anchor_jax.training.data.kinds import (
    Batches,
    ClipKind,
    ClipRequest,
    DataConfig,
    path_of,
)
from anchor_jax.training.data.order import Order
from anchor_jax.training.data.trajectories import Trajectories

_READS = "the folder that anchor-jax trajectories wrote"


class TrajectoryKind(ClipKind):
    """The kind `trajectories`."""

    has_states = True

    def open_clips(self, request: ClipRequest) -> Batches:
        """Returns batches of `noisy` at `sigma`, `target` and `embedding`."""
        path = path_of(request.data, _READS)
        stored = Trajectories(path)
        _check_shape(path, stored, request)
        sigma = _levels(path, stored)
        order = Order(len(stored), request.data.seed)
        share, block, bundle = request.share, request.block, request.bundle

        def draw(number: int) -> dict[str, np.ndarray]:
            rng = np.random.default_rng((request.data.seed, 30, number))
            examples = [stored[order.index(place)] for place in share.places(number)]
            states = np.stack([one["states"] for one in examples]).astype(np.float32)
            drawn = (share.size, request.frames // block)
            level = rng.integers(len(sigma), size=drawn)[share.rows]
            of_frame = np.repeat(level, block, axis=1)
            rows, columns = np.arange(len(states))[:, None], np.arange(request.frames)
            embedding = bundle.encode_prompts([one["prompt"] for one in examples])
            return {
                "noisy": states[rows, of_frame, columns],
                "sigma": sigma[level],
                "target": states[:, -1],
                "embedding": np.asarray(embedding)[:, None],
            }

        return draw

    def identity(self, data: DataConfig) -> dict[str, Any]:
        """Returns the number of trajectories, and the inputs that made them."""
        stored = Trajectories(data.path)
        return {"count": len(stored), "made_from": stored.inputs}

    def first_texts(self, data: DataConfig, num: int) -> list[tuple[str, str]]:
        """Returns the first stored prompts, each as its own switch prompt."""
        if data.path is None or not expand(data.path).is_dir():
            return []
        stored = Trajectories(data.path)
        texts = [stored[place]["prompt"] for place in range(min(num, len(stored)))]
        return [(text, text) for text in texts]


TRAJECTORIES = TrajectoryKind()


def _check_shape(path: str, stored: Trajectories, request: ClipRequest) -> None:
    grid, channels = request.bundle.grid, request.bundle.model.latent_channels
    shape = (request.frames, grid.height, grid.width, channels)
    if stored.shape[1:] != shape:
        raise UserError(
            f"{path}: trajectories of {stored.shape[1:]} (frame, height, width,"
            f" channel), expected {shape}; choose the same size and number of frames"
        )


def _levels(path: str, stored: Trajectories) -> np.ndarray:
    """Returns the noise level in [0, 1] of each stored state except the last."""
    found = stored.inputs.get("sigma")
    is_list = isinstance(found, list) and len(found) == stored.shape[0]
    if not is_list or not all(
        type(one) in (int, float) and 0 <= one <= 1 for one in found
    ):
        raise UserError(
            f"{path}/spec.json: sigma={str(found)[:60]}, expected {stored.shape[0]}"
            " noise levels from 0 to 1; restore the file, or write the trajectories"
            " again"
        )
    return np.asarray(found, np.float32)
