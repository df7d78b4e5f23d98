"""How little neighbouring frames differ, from 0 to 1; 1 is a still video.

Source: VBench (arXiv:2311.17982), "Temporal Flickering".
"""

from collections.abc import Sequence

import numpy as np

from anchor_jax.errors import UserError
from anchor_jax.evaluation.protocol import Row


def temporal_flickering(pixels: np.ndarray, prompts: Sequence[str]) -> list[Row]:
    """Returns (255 - mean absolute difference of neighbouring frames) / 255.

    Args:
      pixels: uint8 [video, frame, height, width, 3], of 2 frames or more.
      prompts: not used.

    Raises:
      UserError: A video has one frame.
    """
    del prompts
    if pixels.shape[1] < 2:
        raise UserError(
            f"temporal_flickering: got videos of {pixels.shape[1]} frame; must be at"
            " least 2; generate longer videos"
        )
    return [{"temporal_flickering": _score(video)} for video in pixels]


METRIC = temporal_flickering


def _score(video: np.ndarray) -> float:
    """Returns the score of a video [frame, height, width, 3], one pair at a time."""
    frames = video.astype(np.int16)
    differences = [
        float(np.abs(after - before).mean())
        for before, after in zip(frames, frames[1:], strict=False)
    ]
    return (255 - float(np.mean(differences))) / 255
