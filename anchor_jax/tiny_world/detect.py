"""Measures colour, shape, motion and background of a tiny world's pixels.

No function knows what a video should show: the object is everything that differs from
the estimated background.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from anchor_jax.tiny_world import scene

UNCLEAR = "unclear"
PRESENT = 0.8
"""Share of pixel frames in which a colour must dominate to be a clip's colour."""
MIN_AREA = 100
"""Pixels that an object must have to be visible; a small triangle has 270."""
JUMP = 2.3 * scene.SPEED
"""A step in pixels that counts as a jump, 2.3 times the commanded one."""
SEAM = 1.3 * scene.SPEED
"""Pixels by which a jump exceeds the commanded step."""
GOOD_IOU = 0.7
RADII = (11.0, 12.0, 13.0, 14.0, 15.0)
_PALETTE = np.array(
    [*scene.COLORS.values(), *scene.BACKGROUNDS.values()], dtype=np.float32
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The content of a clip; an attribute that cannot be determined is `unclear`.

    Attributes:
      color: The object colour with the largest area in 80 % of the pixel frames.
      shape: The best template at the tracked position.
      motion: From the displacement from one latent frame to the next.
      background: The background with the largest area in 80 % of the pixel frames.
      iou: Intersection over union with the best template, mean of visible frames.
      radius: The best template's radius in pixels.
      displacement: Mean (x, y) displacement in pixels per latent frame.
      border_jumps: Share of the latent borders where the object's step is above `JUMP`
        pixels or cannot be measured, because it is not visible.
      inner_jumps: The same for the steps inside latent frames.
      seams: Share of the latent borders across which the displacement of a whole
        latent frame departs by more than `SEAM` pixels from the clip's median.
      visible: Share of pixel frames with an object.
    """

    color: str
    shape: str
    motion: str
    background: str
    iou: float
    radius: float
    displacement: tuple[float, float]
    border_jumps: float
    inner_jumps: float
    seams: float
    visible: float


def measure(frames: np.ndarray, phase: int = 0) -> Measured:
    """Returns the content of a clip.

    Args:
      frames: Pixel frames, uint8 [F, 64, 64, 3].
      phase: Number of the clip's first pixel frame in its whole video. It locates the
        latent borders, which are before pixel frames 1, 5, 9, ...
    """
    _check(frames)
    pixels = frames.astype(np.float32)
    color, background = dominant_colors(pixels)
    mask = object_mask(pixels, color, background)
    visible = (color >= 0) & (mask.sum(axis=(1, 2)) >= MIN_AREA)
    xy = track(mask)
    shape, radius, iou = best_template(mask, xy, visible)
    displacement, motion = classify_motion(xy, visible)
    border, inner = jump_shares(xy, visible, phase)
    return Measured(
        color=_steady(tuple(scene.COLORS), color),
        shape=shape,
        motion=motion,
        background=_steady(tuple(scene.BACKGROUNDS), background),
        iou=iou,
        radius=radius,
        displacement=displacement,
        border_jumps=border,
        inner_jumps=inner,
        seams=seam_share(xy, visible, phase),
        visible=float(visible.mean()),
    )


def matches(measured: Measured, attributes: scene.Attributes) -> dict[str, bool]:
    """Returns whether a clip shows the expected content, by criterion.

    The criteria are `color`, `shape`, `motion` and `background`; `shape_iou` (the shape
    with an IoU above 0.7), `steady` (no seam), `smooth` (no jump at a latent border),
    `strict` (the motion without any jump), and `all` (the four attributes and
    `steady`). A codec that blurs the motion inside a latent frame enlarges the step at
    its border, so the ceiling of `smooth` and `strict` depends on the codec.
    """
    result = {
        kind: getattr(measured, kind) == getattr(attributes, kind)
        for kind in scene.KINDS
    }
    matched = all(result.values())
    smooth = measured.border_jumps == 0
    return result | {
        "shape_iou": result["shape"] and measured.iou > GOOD_IOU,
        "steady": measured.seams == 0,
        "smooth": smooth,
        "strict": result["motion"] and smooth and measured.inner_jumps == 0,
        "all": matched and measured.seams == 0,
    }


def dominant_colors(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each frame's object colour and background as numbers, two [F].

    The background is the background colour with the largest area, -1 below half the
    picture. The object's colour is the one with the largest area among the pixels
    nearer to an object colour than to that background, -1 below `MIN_AREA`.
    """
    distance = (_PALETTE**2).sum(axis=1) - 2 * (pixels @ _PALETTE.T)
    colors = len(scene.COLORS)
    nearest = distance.argmin(axis=-1)
    area = _areas(nearest, len(_PALETTE))[:, colors:]
    background = area.argmax(axis=1)
    own = np.take_along_axis(
        distance, (colors + background)[:, None, None, None], axis=-1
    )
    choices = np.concatenate([distance[..., :colors], own], axis=-1)
    part = _areas(choices.argmin(axis=-1), colors + 1)[:, :colors]
    half = scene.SIZE**2 / 2
    return (
        np.where(part.max(axis=1) >= MIN_AREA, part.argmax(axis=1), -1),
        np.where(area.max(axis=1) >= half, background, -1),
    )


def object_mask(
    pixels: np.ndarray, color: np.ndarray, background: np.ndarray
) -> np.ndarray:
    """Returns the pixels that differ from the background, bool [F, 64, 64].

    They differ by at least half as much as the dominant object colour. A second object
    of another colour is therefore part of the mask.

    Args:
      pixels: Pixel frames, [F, 64, 64, 3].
      color: Object colour numbers [F]; a frame with -1 has an empty mask.
      background: Background numbers [F]; a frame with -1 has an empty mask.
    """
    front = _PALETTE[color]
    back = _PALETTE[len(scene.COLORS) + np.maximum(background, 0)]
    limit = ((front - back) ** 2).sum(axis=1) / 4
    limit = np.where((color < 0) | (background < 0), np.inf, limit)
    away = ((pixels - back[:, None, None]) ** 2).sum(axis=-1)
    return away > limit[:, None, None]


def track(mask: np.ndarray) -> np.ndarray:
    """Returns the mask's centre of mass (x, y) in pixels on the torus, [F, 2].

    The circular mean locates the object, and the mean about it is exact. Empty masks
    give an arbitrary place.
    """
    grid = np.arange(scene.SIZE) + 0.5
    profiles = np.stack([mask.sum(axis=1), mask.sum(axis=2)], axis=1)
    weights = profiles / np.maximum(profiles.sum(axis=-1, keepdims=True), 1)
    wave = np.exp(2j * np.pi * grid / scene.SIZE)
    around = np.angle(weights @ wave) * scene.SIZE / (2 * np.pi)
    offset = scene.wrap(grid - around[..., None])
    return (around + (weights * offset).sum(axis=-1)) % scene.SIZE


def best_template(
    mask: np.ndarray, xy: np.ndarray, visible: np.ndarray
) -> tuple[str, float, float]:
    """Returns the shape, radius and IoU whose templates fit the visible frames best.

    One shape and radius for the clip; the IoU is the mean over its visible frames.
    """
    if not visible.any():
        return UNCLEAR, 0.0, 0.0
    mask, xy = mask[visible], xy[visible]
    iou = {}
    for shape in scene.SHAPES:
        for radius in RADII:
            template = scene.coverage(shape, xy, radius) > 0.5
            both = (mask & template).sum(axis=(1, 2))
            either = (mask | template).sum(axis=(1, 2))
            iou[shape, radius] = float((both / either).mean())
    shape, radius = max(iou, key=iou.get)
    return shape, radius, iou[shape, radius]


def classify_motion(
    xy: np.ndarray, visible: np.ndarray
) -> tuple[tuple[float, float], str]:
    """Returns the mean displacement in pixels per latent frame, and its class.

    The displacement over four pixel frames crosses one latent border. For a direction,
    the mean is 0.5 to 1.75 times the commanded displacement, at most half of it is
    across, and most displacements are in line with it. For `still`, the mean is below a
    quarter, and no movement back and forth is above three eighths. Everything else is
    unclear.
    """
    span = scene.PIXEL_FRAMES_PER_LATENT
    seen = visible[span:] & visible[:-span]
    if not seen.any() or seen.mean() < 0.5:
        return (0.0, 0.0), UNCLEAR
    steps = scene.wrap(xy[span:] - xy[:-span])[seen]
    x, y = (float(value) for value in steps.mean(axis=0))
    length, path = np.hypot(x, y), np.hypot(*steps.T).mean()
    full = span * scene.SPEED
    if length < full / 4 and path < 0.375 * full:
        return (x, y), "still"
    along, across = max(abs(x), abs(y)), min(abs(x), abs(y))
    if (
        not full / 2 <= along <= 1.75 * full
        or across > along / 2
        or length < 0.6 * path
    ):
        return (x, y), UNCLEAR
    if abs(x) > abs(y):
        return (x, y), "left" if x < 0 else "right"
    return (x, y), "up" if y < 0 else "down"


def jump_shares(xy: np.ndarray, visible: np.ndarray, phase: int) -> tuple[float, float]:
    """Returns the fractions of latent-border steps and of inner steps that jump.

    A step to or from a frame without an object counts as a jump. Without steps the
    fraction is 0.
    """
    steps = scene.wrap(np.diff(xy, axis=0))
    jumps = np.hypot(steps[:, 0], steps[:, 1]) > JUMP
    jumps |= ~(visible[1:] & visible[:-1])
    number = phase + np.arange(1, len(xy))
    border = number % scene.PIXEL_FRAMES_PER_LATENT == 1
    return _share(jumps[border]), _share(jumps[~border])


def seam_share(xy: np.ndarray, visible: np.ndarray, phase: int) -> float:
    """Returns the fraction of latent borders with a break in the motion.

    A latent frame's displacement is the mean of its pixel frames' displacements to
    those four later, each at the same place in the next latent frame, which a codec's
    blur inside latent frames leaves alone. A frame without an object counts as a seam.
    """
    span = scene.PIXEL_FRAMES_PER_LATENT
    if len(xy) <= span:
        return 0.0
    steps = scene.wrap(xy[span:] - xy[:-span])
    if phase == 0:
        # A video's first latent frame does not move, so a codec blurs it differently.
        # It is compared with the middle of the next one.
        middle = scene.wrap(xy[1 : span + 1] - xy[0]).mean(axis=0)
        steps[0] = middle + 0.375 * np.median(steps, axis=0)
    seen = visible[span:] & visible[:-span]
    number = (phase + np.arange(len(steps)) + span - 1) // span
    latents = [seen & (number == one) for one in np.unique(number)]
    means = np.array([steps[one].mean(axis=0) for one in latents if one.any()])
    if not len(means):
        return 1.0
    away = np.hypot(*(means - np.median(means, axis=0)).T)
    return 1 - float((away <= SEAM).sum()) / len(latents)


def _check(frames: np.ndarray) -> None:
    expected = (scene.SIZE, scene.SIZE, 3)
    if frames.ndim != 4 or frames.shape[1:] != expected or frames.dtype != np.uint8:
        raise ValueError(
            f"got {frames.dtype} {frames.shape}; expected uint8 [F, 64, 64, 3];"
            " pass one clip, through codec.to_bytes if its pixels are in [-1, 1]"
        )


def _areas(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns each frame's number of pixels per label, [F, count]."""
    return np.stack([(labels == one).sum(axis=(1, 2)) for one in range(count)], axis=1)


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else 0.0


def _steady(names: Sequence[str], numbers: np.ndarray) -> str:
    """Returns the name that most frames have, or `unclear` below `PRESENT`."""
    number, count = Counter(numbers.tolist()).most_common(1)[0]
    if number < 0 or count < PRESENT * len(numbers):
        return UNCLEAR
    return names[number]
