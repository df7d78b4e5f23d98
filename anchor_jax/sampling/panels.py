"""Shows videos side by side, each below a strip with its name."""

import itertools
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from anchor_jax import media
from anchor_jax.errors import UserError

_COLUMNS = 4
_GAP = 4  # pixels
_MARGIN = 3
_FONT_SIZES = range(20, 6, -1)


def side_by_side(
    paths: Sequence[str | os.PathLike], names: Sequence[str]
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Yields the frames of videos of the same size and length.

    Args:
      paths: the videos.
      names: their names.

    Yields:
      For each moment, the frame of each video, uint8 [height, width, 3], and one frame
      that shows them all. It has at most four videos in a row.

    Raises:
      UserError: A video cannot be read, or differs in size or length.
    """
    strips: list[np.ndarray] = []
    videos = map(media.decoded, paths)
    for frames in itertools.zip_longest(*videos):
        shapes = {None if frame is None else frame.shape for frame in frames}
        if len(shapes) > 1:
            raise UserError(
                f"{paths[0]} and the other videos differ in size or length; make them"
                " again with --overwrite, or choose another --out"
            )
        if not strips:
            strips = [label(name, frames[0].shape[1]) for name in names]
        yield list(frames), _grid(frames, strips)


def label(name: str, width: int) -> np.ndarray:
    """Returns a strip with a name, uint8 [height, width, 3].

    The letters are as large as the width allows, within limits.
    """
    room = width - 2 * _MARGIN
    fonts = map(ImageFont.load_default, _FONT_SIZES)
    fitting = (font for font in fonts if font.getlength(name) <= room)
    font = next(fitting, ImageFont.load_default(_FONT_SIZES[-1]))
    strip = Image.new("RGB", (width, sum(font.getmetrics()) + 2 * _MARGIN), "black")
    ImageDraw.Draw(strip).text((_MARGIN, _MARGIN), name, fill="white", font=font)
    return np.asarray(strip)


def _grid(frames: Sequence[np.ndarray], strips: Sequence[np.ndarray]) -> np.ndarray:
    """Returns one image of all frames, each below its strip."""
    height = max(len(strip) for strip in strips)
    tiles = []
    for frame, strip in zip(frames, strips, strict=True):
        above = ((height - len(strip), 0), (0, _GAP), (0, 0))
        below = ((0, _GAP), (0, _GAP), (0, 0))
        tiles.append(np.concatenate([np.pad(strip, above), np.pad(frame, below)]))
    rows = math.ceil(len(tiles) / _COLUMNS)
    columns = math.ceil(len(tiles) / rows)
    tiles += [np.zeros_like(tiles[0])] * (rows * columns - len(tiles))
    starts = range(0, len(tiles), columns)
    lines = [np.concatenate(tiles[at : at + columns], axis=1) for at in starts]
    return np.concatenate(lines)[:-_GAP, :-_GAP]
