"""The tiny world: one plain object on a 64 x 64 pixel torus, and its captions.

A video has 16 pixel frames per second. Its first latent frame is one pixel frame, and
every other latent frame is four. A moving object moves 4 pixels per pixel frame, which
is 16 pixels, or one token of the model, per latent frame.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from anchor_jax.wan.spec import WAN_2_1

SIZE = 64
FPS = WAN_2_1.frames_per_second
SPEED = 4.0
PIXEL_FRAMES_PER_LATENT, CELL, _ = WAN_2_1.strides
LATTICE = 16
"""Distance in pixels between objects' possible places at a latent frame's start."""
RADIUS = 13.0

COLORS = {
    "red": (225, 45, 40),
    "green": (40, 190, 70),
    "blue": (50, 85, 240),
    "yellow": (245, 215, 45),
}
SHAPES = ("square", "triangle", "ring")
MOTIONS = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "still": (0, 0),
}
BACKGROUNDS = {
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "gray": (130, 130, 130),
    "brown": (105, 60, 25),
}

HELD_OUT = 5
"""A combination is held out where (color + 2 shape + motion) is a multiple of this."""

KINDS = ("color", "shape", "motion", "background")

_MOVING = (
    "a {color} {shape} moves {motion} on a {background} background",
    "a {color} {shape} moving {motion} on a {background} background",
    "{color} {shape} moving {motion}, {background} background",
    "on a {background} background a {color} {shape} moves {motion}",
    "a {color} {shape} moves {motion} on {background}",
)
_STILL = (
    "a {color} {shape} stays {motion} on a {background} background",
    "a {motion} {color} {shape} on a {background} background",
    "{motion} {color} {shape}, {background} background",
    "on a {background} background a {color} {shape} stays {motion}",
    "a {motion} {color} {shape} on {background}",
)


@dataclasses.dataclass(frozen=True, order=True)
class Attributes:
    """The meaning of a caption: names of colour, shape, motion and background."""

    color: str
    shape: str
    motion: str
    background: str

    def __post_init__(self):
        for kind, names in _names().items():
            if getattr(self, kind) not in names:
                raise ValueError(
                    f"{kind}={getattr(self, kind)!r} is not in the world;"
                    f" choose one of {names}"
                )


def _names() -> dict[str, tuple[str, ...]]:
    """Returns the names that each attribute can take."""
    return {
        "color": tuple(COLORS),
        "shape": SHAPES,
        "motion": tuple(MOTIONS),
        "background": tuple(BACKGROUNDS),
    }


def is_held_out(attributes: Attributes) -> bool:
    """Returns whether training never shows this colour, shape and motion together."""
    color = tuple(COLORS).index(attributes.color)
    shape = SHAPES.index(attributes.shape)
    motion = tuple(MOTIONS).index(attributes.motion)
    return (color + 2 * shape + motion) % HELD_OUT == 0


@functools.cache
def all_attributes(held_out: bool) -> tuple[Attributes, ...]:
    """Returns the 48 held-out or the 192 training combinations, backgrounds included.

    12 of the 60 colour x shape x motion combinations are held out.
    """
    every = (
        Attributes(color, shape, motion, background)
        for color in COLORS
        for shape in SHAPES
        for motion in MOTIONS
        for background in BACKGROUNDS
    )
    return tuple(one for one in every if is_held_out(one) == held_out)


def sample_attributes(rng: np.random.Generator, held_out: bool) -> Attributes:
    """Returns a uniform draw from the held-out or the training combinations."""
    choices = all_attributes(held_out)
    return choices[rng.integers(len(choices))]


def switch_attributes(
    rng: np.random.Generator,
    attributes: Attributes,
    kind: str,
    held_out: bool | None = None,
) -> Attributes:
    """Returns `attributes` with exactly the one named `kind` changed.

    Args:
      rng: Random generator of the draw.
      attributes: Attributes before the switch.
      kind: `color`, `shape`, `motion` or `background`; `any` changes two or more.
      held_out: Draws from that split only; None draws from both.

    Raises:
      ValueError: The kind is unknown, or the split holds no such combination.
    """
    if kind != "any" and kind not in KINDS:
        raise ValueError(f"kind={kind!r}; choose one of {(*KINDS, 'any')}")
    splits = (False, True) if held_out is None else (held_out,)
    choices = [
        other
        for split in splits
        for other in all_attributes(split)
        if _is_switch(changed(attributes, other), kind)
    ]
    if not choices:
        raise ValueError(
            f"no combination with held_out={held_out} differs from {attributes} in"
            f" {kind} only; pass held_out=None or another kind"
        )
    return choices[rng.integers(len(choices))]


def changed(before: Attributes, after: Attributes) -> tuple[str, ...]:
    """Returns the kinds of attribute in which two combinations differ."""
    return tuple(
        kind for kind in KINDS if getattr(before, kind) != getattr(after, kind)
    )


def _is_switch(kinds: tuple[str, ...], kind: str) -> bool:
    return len(kinds) > 1 if kind == "any" else kinds == (kind,)


def latent_to_pixel_frames(latent_frames: int) -> int:
    """Returns the number of pixel frames of `latent_frames` (at least 1)."""
    return WAN_2_1.pixel_frames(latent_frames)


def segment_pixel_frames(latent_lengths: Sequence[int]) -> tuple[int, ...]:
    """Returns each segment's pixel frames in a video of segments of latent frames.

    The video's first latent frame is one pixel frame, and every other is four.
    """
    if min(latent_lengths, default=0) < 1:
        raise ValueError(
            f"latent_lengths={tuple(latent_lengths)}; each must be at least 1"
        )
    rest = (PIXEL_FRAMES_PER_LATENT * length for length in latent_lengths[1:])
    return (latent_to_pixel_frames(latent_lengths[0]), *rest)


@dataclasses.dataclass(frozen=True)
class Track:
    """An object's path through a video.

    Attributes:
      segments: Attributes with their numbers of pixel frames.
      start_xy: Position in pixels of the object's centre in pixel frame 0.
      radius: Size in pixels.
    """

    segments: tuple[tuple[Attributes, int], ...]
    start_xy: tuple[float, float]
    radius: float

    def render(self) -> np.ndarray:
        """Returns the pixel frames, uint8 [F, 64, 64, 3]."""
        return render(self.segments, self.start_xy, self.radius)


def sample_track(
    rng: np.random.Generator, segments: Sequence[tuple[Attributes, int]]
) -> Track:
    """Returns a track with a start drawn from a lattice of 16 pixels.

    A latent frame moves an object by one step of the lattice, so it stays on the
    lattice. The few resulting patterns are what a small model can learn on a laptop.
    """
    x, y = LATTICE * rng.integers(SIZE // LATTICE, size=2)
    return Track(tuple(segments), (float(x), float(y)), RADIUS)


def centers(
    segments: Sequence[tuple[Attributes, int]], start_xy: tuple[float, float]
) -> np.ndarray:
    """Returns the object's centre (x, y) in pixels on the torus, [F, 2].

    The step into a pixel frame is that of the frame's segment.
    """
    steps = [np.tile(MOTIONS[one.motion], (frames, 1)) for one, frames in segments]
    steps = SPEED * np.concatenate(steps).astype(np.float64)
    steps[0] = start_xy
    return np.cumsum(steps, axis=0) % SIZE


def wrap(difference: np.ndarray) -> np.ndarray:
    """Returns a difference of positions in pixels as the shortest one, [-32, 32)."""
    return (difference + SIZE / 2) % SIZE - SIZE / 2


def coverage(shape: str, xy: np.ndarray, radius: float) -> np.ndarray:
    """Returns the share of each pixel that the shape covers, [F, 64, 64] in [0, 1].

    It is the signed distance to the outline, clipped to a soft edge of one pixel. Pixel
    (i, j) has its centre at x = j + 0.5, y = i + 0.5.

    Args:
      shape: One of `SHAPES`.
      xy: Centres in pixels, [F, 2].
      radius: Outer radius of the ring, whose hole has half of it. The square's half
        side is 0.88 and the upright triangle's circumradius 1.2 times as long.
    """
    grid = np.arange(SIZE) + 0.5
    offset = wrap(grid - xy[:, :, None]).astype(np.float32)
    x, y = offset[:, 0, None, :], offset[:, 1, :, None]
    if shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - np.float32(0.88 * radius)
    elif shape == "triangle":
        slope = np.float32(np.sqrt(0.75))
        sides = slope * np.abs(x) - np.float32(0.5) * y
        distance = np.maximum(sides, y) - np.float32(0.6 * radius)
    else:
        distance = np.abs(np.sqrt(x * x + y * y) - np.float32(0.75 * radius))
        distance -= np.float32(0.25 * radius)
    return np.clip(np.float32(0.5) - distance, 0, 1)


def render(
    segments: Sequence[tuple[Attributes, int]],
    start_xy: tuple[float, float],
    radius: float,
) -> np.ndarray:
    """Returns the pixel frames of a video, uint8 [F, 64, 64, 3].

    The position is continuous across segments; the other attributes change with a
    segment's first pixel frame.

    Args:
      segments: Attributes with their numbers of pixel frames.
      start_xy: Position in pixels of the object's centre in pixel frame 0.
      radius: Size in pixels.
    """
    xy = centers(segments, start_xy)
    video = np.empty((len(xy), SIZE, SIZE, 3), np.uint8)
    begin = 0
    for one, frames in segments:
        part = slice(begin, begin + frames)
        share = coverage(one.shape, xy[part], radius)
        front, back = COLORS[one.color], BACKGROUNDS[one.background]
        for channel in range(3):
            span = np.float32(front[channel] - back[channel])
            video[part, ..., channel] = share * span + np.float32(back[channel] + 0.5)
        begin += frames
    return video


def caption(attributes: Attributes, rng: np.random.Generator | None = None) -> str:
    """Returns a caption: the canonical one, or with `rng` one of five paraphrases."""
    templates = _STILL if attributes.motion == "still" else _MOVING
    chosen = 0 if rng is None else rng.integers(len(templates))
    return templates[chosen].format(**dataclasses.asdict(attributes))


def words(text: str) -> list[str]:
    """Returns a caption's words in lower case, without its punctuation."""
    return re.findall(r"[a-z]+", text.lower())


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Returns all words that captions can have, sorted."""
    filler = re.sub(r"{\w+}", " ", " ".join(_MOVING + _STILL))
    names = (name for group in _names().values() for name in group)
    return tuple(sorted({*words(filler), *names}))


def parse_caption(text: str) -> Attributes | None:
    """Returns the meaning of a caption, or None if it is outside the world.

    A caption is inside when all its words are in the vocabulary and it names exactly
    one each of colour, shape, motion and background.
    """
    parts = words(text)
    if not set(parts) <= set(vocabulary()):
        return None
    found = {
        kind: [word for word in parts if word in names]
        for kind, names in _names().items()
    }
    if any(len(one) != 1 for one in found.values()):
        return None
    return Attributes(**{kind: one[0] for kind, one in found.items()})
