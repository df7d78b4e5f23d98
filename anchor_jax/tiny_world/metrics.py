"""A metric: whether tiny-world clips show the content of their captions."""

from collections.abc import Sequence

import numpy as np

from anchor_jax.evaluation.protocol import Row
from anchor_jax.tiny_world import detect, scene


def world_match(pixels: np.ndarray, prompts: Sequence[str]) -> list[Row]:
    """Returns 0 or 1 for each criterion of `detect.matches`.

    Args:
      pixels: uint8 [video, frame, 64, 64, 3].
      prompts: captions. A video whose prompt is not the caption of a scene has no
        numbers.
    """
    wanted = [scene.parse_caption(prompt) for prompt in prompts]
    return [
        {}
        if attributes is None
        else {
            name: float(value)
            for name, value in detect.matches(detect.measure(video), attributes).items()
        }
        for video, attributes in zip(pixels, wanted, strict=True)
    ]
