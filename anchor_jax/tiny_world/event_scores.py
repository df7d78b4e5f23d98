"""Scores videos of tiny-world scripts, segment by segment and across events.

As in `detect`, measurement does not know what a video should show. Only the number of
objects to look for, one or two, depends on the script.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from anchor_jax.tiny_world import detect, events, score
from anchor_jax.tiny_world import scene as scenes
from anchor_jax.tiny_world.events import Scene

BLOCK = 3
"""Latent frames per block, the unit of `adopted`."""
NEAR = scenes.LATTICE / 2
"""Largest distance in pixels of an object from its path."""
SOON = 2
"""Number of blocks within which an event should be seen."""
GOOD_IOU = 0.6
"""Lower than in `detect`: a moving ring on gray has 0.68 after a 16-channel codec."""
COLORS, BACKGROUNDS = tuple(scenes.COLORS), tuple(scenes.BACKGROUNDS)
_FRONT = np.array([*scenes.COLORS.values()], np.float32)
_BACK = np.array([*scenes.BACKGROUNDS.values()], np.float32)
_TEMPLATES = tuple((shape, size) for shape in scenes.SHAPES for size in detect.RADII)
_SPAN = scenes.PIXEL_FRAMES_PER_LATENT


class SceneSpan(NamedTuple):
    """A scene, its first pixel frame in the video, and the frame after its last."""

    scene: Scene
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Object:
    """One object in pixel frames.

    Attributes:
      color: Numbers of the object colour, -1 without an object, [F].
      visible: Whether there is an object, [F].
      xy: Centre of the object in pixels, arbitrary without an object, [F, 2].
      iou: Intersection over union with each shape at each radius, [F, template].
    """

    color: np.ndarray
    visible: np.ndarray
    xy: np.ndarray
    iou: np.ndarray


@dataclasses.dataclass(frozen=True)
class Shown:
    """The content of pixel frames.

    Attributes:
      begin: Number of the first pixel frame in the video.
      background: Numbers of the background, -1 if it is unclear, [F].
      count: Number of object colours with the area of an object, [F]; -1 without a
        background.
      objects: Everything that differs from the background, as one object; if two
        objects are expected, one object per object colour.
    """

    begin: int
    background: np.ndarray
    count: np.ndarray
    objects: tuple[Object, ...]

    def cut(self, begin: int, end: int) -> "Shown":
        """Returns the content of the video's pixel frames from `begin` to `end`."""
        part = slice(begin - self.begin, end - self.begin)
        objects = (
            Object(one.color[part], one.visible[part], one.xy[part], one.iou[part])
            for one in self.objects
        )
        return Shown(begin, self.background[part], self.count[part], tuple(objects))

    def object(self, color: str) -> Object:
        """Returns the object of a colour, or the only object."""
        if len(self.objects) == 1:
            return self.objects[0]
        return self.objects[COLORS.index(color)]


@dataclasses.dataclass(frozen=True)
class SegmentResult:
    """The scores of one segment.

    Attributes:
      event: The kind of the event that leads to it; `start` for the first.
      flags: Whether each criterion is met.
      numbers: `jumps`, the share of the latent borders with a jump; if the object is
        seen and should move, `speed`, signed and relative to the commanded speed; and
        `adopted`, the number of the segment's blocks before the first that shows the
        event's change, missing if no block shows it.
    """

    event: str
    flags: dict[str, bool]
    numbers: dict[str, float]


def lay_out(script: Sequence[tuple[Scene, int]]) -> list[SceneSpan]:
    """Returns the segments of scenes and their numbers of pixel frames."""
    ends = np.cumsum([frames for _, frames in script]).tolist()
    return [
        SceneSpan(one, end - frames, end)
        for (one, frames), end in zip(script, ends, strict=True)
    ]


def measure(frames: np.ndarray, segments: Sequence[SceneSpan]) -> list[Shown]:
    """Returns the content of each segment of a video, uint8 [F, 64, 64, 3]."""
    _check(frames, segments)
    return [
        measure_frames(frames[begin:end], begin, 1 + (one.second is not None))
        for one, begin, end in segments
    ]


def measure_frames(frames: np.ndarray, begin: int, num_objects: int) -> Shown:
    """Returns what pixel frames show.

    Args:
      frames: Pixel frames, uint8 [F, 64, 64, 3].
      begin: Number of the first one in its video.
      num_objects: Number of objects to look for, 1 or 2. `count` counts all objects.
    """
    pixels = frames.astype(np.float32)
    color, background = detect.dominant_colors(pixels)
    labels = color_labels(pixels, background)
    area = np.stack([(labels == one).sum((1, 2)) for one in range(len(COLORS))], 1)
    count = (area >= detect.MIN_AREA).sum(axis=1)
    count = np.where(background < 0, -1, count)
    if num_objects == 2:
        objects = _pair(pixels, background, labels, area)
    else:
        mask = detect.object_mask(pixels, color, background)
        objects = (_object(mask, color),)
    return Shown(begin, background, count, objects)


def color_labels(pixels: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Returns each pixel's object colour as a number, -1 for none, [F, 64, 64].

    A pixel has the colour towards which it departs furthest from the background, and
    at least half of the way. Unlike the nearest colour, the direction is right also
    for the mixed pixels of an edge and of a codec's blur.

    Args:
      pixels: Pixel frames, [F, 64, 64, 3].
      background: Background numbers [F]; a frame with -1 has no objects.
    """
    back = _BACK[np.maximum(background, 0)]
    span = _FRONT - back[:, None]
    length = np.sqrt((span**2).sum(axis=-1))
    offset = (pixels - back[:, None, None]).reshape(len(pixels), -1, 3)
    away = offset @ (span / length[..., None]).transpose(0, 2, 1)
    away = np.where(away > length[:, None] / 2, away, -np.inf)
    found = np.isfinite(away.max(axis=-1)) & (background >= 0)[:, None]
    labels = np.where(found, away.argmax(axis=-1), -1)
    return labels.reshape(pixels.shape[:3])


def _pair(pixels, background, labels, area) -> tuple[Object, ...]:
    """Returns an object for each colour, seen where it is one of a frame's largest two.

    A colour's labels say where an object is; its mask is then all that differs from
    the background and is nearer to it than to the other, independent of its hue.
    Therefore a codec's change of hues does not affect the outlines.
    """
    rank = np.argsort(np.argsort(-area, axis=1, kind="stable"), axis=1)
    seen = (rank < 2) & (area >= detect.MIN_AREA)
    numbers = range(len(COLORS))
    spots = np.stack([detect.track(labels == one) for one in numbers])
    grid = np.arange(scenes.SIZE) + 0.5
    offset = scenes.wrap(grid - spots[..., None]) ** 2
    distance = offset[:, :, 0, None, :] + offset[:, :, 1, :, None]
    distance = np.where(seen.T[..., None, None], distance, np.inf)
    owner = distance.argmin(axis=0)
    objects = []
    for one in numbers:
        color = np.where(seen[:, one], one, -1)
        mask = detect.object_mask(pixels, color, background) & (owner == one)
        objects.append(_object(mask, color))
    return tuple(objects)


def _object(mask: np.ndarray, color: np.ndarray) -> Object:
    """Returns the object with masks [F, 64, 64] and colour numbers [F]."""
    visible = (color >= 0) & (mask.sum(axis=(1, 2)) >= detect.MIN_AREA)
    xy = detect.track(mask)
    iou = np.zeros((len(mask), len(_TEMPLATES)))
    if visible.any():
        for number, (shape, radius) in enumerate(_TEMPLATES):
            template = scenes.coverage(shape, xy[visible], radius) > 0.5
            both = (mask[visible] & template).sum(axis=(1, 2))
            either = (mask[visible] | template).sum(axis=(1, 2))
            iou[visible, number] = both / either
    return Object(color, visible, xy, iou)


def criteria(shown: Shown, scene: Scene) -> dict[str, bool]:
    """Returns whether pixel frames show a scene, by criterion.

    `background`, and `count`, the number of objects of different colours, in 80 % of
    the pixel frames; unless hidden also `color`, `shape` and `direction` of the first
    object and with a second one `second_color` and `second_shape`. `shape_iou` and
    `second_shape_iou` also require an IoU above 0.6, which an object shown twice in one
    colour does not reach; `all` is all of these. Each of two objects has the attributes
    found at its colour, so an unseen colour has no shape. A single object is everything
    that differs from the background.
    """
    wanted = 0 if scene.hidden else 1 + (scene.second is not None)
    background = _most(shown.background)
    flags = {
        "background": background == BACKGROUNDS.index(scene.first.background),
        "count": float((shown.count == wanted).mean()) >= detect.PRESENT,
    }
    if not scene.hidden:
        first = shown.object(scene.first.color)
        flags["color"] = _has_color(first, scene.first.color)
        shape, iou = best_shape(first)
        flags["shape"] = shape == scene.first.shape
        flags["shape_iou"] = flags["shape"] and iou > GOOD_IOU
        _, motion = detect.classify_motion(first.xy, first.visible)
        flags["direction"] = motion == scene.first.motion
    if scene.second is not None:
        second = shown.object(scene.second[0])
        flags["second_color"] = _has_color(second, scene.second[0])
        shape, iou = best_shape(second)
        flags["second_shape"] = shape == scene.second[1]
        flags["second_shape_iou"] = flags["second_shape"] and iou > GOOD_IOU
    return flags | {"all": all(flags.values())}


def _has_color(found: Object, color: str) -> bool:
    return _most(found.color) == COLORS.index(color)


def _most(numbers: np.ndarray) -> int:
    """Returns the value of 80 % of the pixel frames, or -1."""
    number, count = Counter(numbers.tolist()).most_common(1)[0]
    return number if count >= detect.PRESENT * len(numbers) else -1


def best_shape(found: Object) -> tuple[str, float]:
    """Returns the shape that fits the visible pixel frames best, and its mean IoU."""
    if not found.visible.any():
        return detect.UNCLEAR, 0.0
    iou = found.iou[found.visible].mean(axis=0)
    return _TEMPLATES[iou.argmax()][0], float(iou.max())


def numbers(shown: Shown, scene: Scene) -> dict[str, float]:
    """Returns a scene's `jumps` and `speed`, where they are defined."""
    if scene.hidden:
        return {}
    first = shown.object(scene.first.color)
    jumps, _ = detect.jump_shares(first.xy, first.visible, shown.begin)
    result = {"jumps": jumps}
    seen = first.visible[_SPAN:] & first.visible[:-_SPAN]
    if scene.first.motion != "still" and seen.size and seen.mean() >= 0.5:
        displacement, _ = detect.classify_motion(first.xy, first.visible)
        along = np.dot(displacement, scenes.MOTIONS[scene.first.motion])
        result["speed"] = float(along) / (_SPAN * scenes.SPEED)
    return result


def motion_continues(before: Shown, after: Shown, old: Scene, new: Scene) -> bool:
    """Returns whether the first object's motion continues across a switch.

    Its first latent frame under the new scene must be, on average, within half a
    lattice step of the place that the old motion leads to.
    """
    last, first = before.object(old.first.color), after.object(new.first.color)
    frames = min(_SPAN, len(last.xy), len(first.xy))
    turning = np.arange(frames)[:, None] + 1
    step = scenes.SPEED * np.asarray(scenes.MOTIONS[new.first.motion])
    ahead = scenes.SPEED * np.asarray(scenes.MOTIONS[old.first.motion])
    way = turning * step + (frames - turning) * ahead
    seen = last.visible[-frames:] & first.visible[:frames]
    if seen.mean() < 0.5:
        return False
    away = scenes.wrap(first.xy[:frames] - last.xy[-frames:] - way)[seen]
    return float(np.hypot(*away.T).mean()) < NEAR


def changed(kind: str) -> tuple[str, ...]:
    """Returns the criteria that show that an event has happened."""
    if kind == "motion":
        return ("direction",)
    if kind == "enter":
        return ("count", "second_color", "second_shape")
    return (kind,) if kind in scenes.KINDS else ("count",)


def adopted(shown: Shown, scene: Scene, kind: str) -> int | None:
    """Returns the number of blocks before the first that shows an event's change.

    None if no block does. An incomplete block at the segment's end does not count.
    """
    length = BLOCK * _SPAN
    for number in range(len(shown.count) // length):
        begin = shown.begin + number * length
        flags = criteria(shown.cut(begin, begin + length), scene)
        if all(flags[name] for name in changed(kind)):
            return number
    return None


def score_shown(shown: Sequence[Shown], script: Sequence[Scene]) -> list[SegmentResult]:
    """Returns the scores of each segment of a video.

    After an event, `adopted` is whether any block shows it, `adopted_soon` whether one
    of the first `SOON` blocks does, and `on_its_way` whether the first object's motion
    continues, if it is seen before and after. After `enter`, `persists` covers the
    first object's colour, shape and motion. `_recall` has the criteria of `return`.
    """
    results = []
    for number, (seen, one) in enumerate(zip(shown, script, strict=True)):
        flags, values, kind = criteria(seen, one), numbers(seen, one), "start"
        if number:
            kind = events.event(script[number - 1], one)
            blocks = adopted(seen, one, kind)
            flags["adopted"] = blocks is not None
            flags["adopted_soon"] = blocks is not None and blocks < SOON
            values |= {} if blocks is None else {"adopted": blocks}
        if kind == "return":
            flags |= _recall(shown[: number + 1], flags)
        elif kind not in ("start", "hide"):
            way = motion_continues(shown[number - 1], seen, script[number - 1], one)
            flags["on_its_way"] = way
            if kind == "enter":
                flags["persists"] = flags["color"] and flags["shape"] and way
        results.append(SegmentResult(kind, flags, values))
    return results


def _recall(shown: Sequence[Shown], flags: dict[str, bool]) -> dict[str, bool]:
    """Returns whether a video, cut after a return, shows the hidden object again.

    `recalled_color` and `recalled_shape` compare with the script, and `recalled`
    requires both. `recalled_when_hidden` is the same for videos that did hide the
    object. `returns_as_shown` compares with the object that the video itself showed
    before, so it does not depend on the script.
    """
    both = flags["color"] and flags["shape"]
    result = {"recalled_color": flags["color"], "recalled_shape": flags["shape"]}
    result["recalled"] = both
    if float((shown[-2].count == 0).mean()) >= detect.PRESENT:
        result["recalled_when_hidden"] = both
    if len(shown) > 2 and len(shown[-3].objects) == 1:
        before, after = shown[-3].objects[0], shown[-1].objects[0]
        color, shape = _most(before.color), best_shape(before)[0]
        same = color == _most(after.color) and shape == best_shape(after)[0]
        result["returns_as_shown"] = color >= 0 and same
    return result


def share(flags: Sequence[bool]) -> dict[str, float]:
    """Returns a fraction as `rate`, `n` and its Wilson interval, `low` and `high`."""
    return dataclasses.asdict(score.rate(list(flags)))


def mean(values: Sequence[float]) -> dict[str, float | None]:
    """Returns `mean`, `n` and the normal 95 % interval, None for a single value."""
    array = np.asarray(values, float)
    middle = float(array.mean())
    if len(array) == 1:
        return {"mean": middle, "n": 1, "low": None, "high": None}
    reach = 1.96 * float(array.std(ddof=1)) / np.sqrt(len(array))
    low, high = float(middle - reach), float(middle + reach)
    return {"mean": middle, "n": len(array), "low": low, "high": high}


def difference(last: Sequence[bool], first: Sequence[bool]) -> dict[str, float]:
    """Returns the increase of a fraction from the first to the last segment.

    The interval is the one for independent fractions. It is too wide if the same videos
    succeed, but not empty if all do.

    Source: Newcombe, Statistics in Medicine 17 (1998) 873-890, method 10.
    """
    a, b = score.rate(list(last)), score.rate(list(first))
    rise = a.rate - b.rate
    low = rise - float(np.hypot(a.rate - a.low, b.high - b.rate))
    high = rise + float(np.hypot(a.high - a.rate, b.rate - b.low))
    return {"difference": rise, "n": a.n, "low": low, "high": high}


def aggregate(results: Sequence[Sequence[SegmentResult]]) -> dict[str, dict]:
    """Returns the scores of many videos, ready for JSON.

    `by_event` groups them by the event before a segment, `by_segment` by the segment's
    number, and `drift` is the difference between the last segment and the first. Each
    cell has n and a 95 % interval. A criterion that applies to no segment has no cell.
    Segments of one video are not independent of each other: an interval over several
    events of the same video is too narrow.
    """
    every = [one for video in results for one in video]
    kinds = [k for k in ("start", *events.EVENTS) if any(k == r.event for r in every)]
    length = max(len(video) for video in results)
    return {
        "by_event": {
            kind: cells([one for one in every if one.event == kind]) for kind in kinds
        },
        "by_segment": {
            str(number): cells([one[number] for one in results if number < len(one)])
            for number in range(length)
        },
        "drift": drift(results),
    }


def cells(results: Sequence[SegmentResult]) -> dict[str, dict]:
    """Returns a cell for each criterion and each number of any segment.

    The number `adopted` is named `blocks_to_adopt`, because a criterion has the same
    name.
    """
    flags = {
        name: share([one.flags[name] for one in results if name in one.flags])
        for name in _names(one.flags for one in results)
    }
    means = {
        name: mean([one.numbers[name] for one in results if name in one.numbers])
        for name in _names(one.numbers for one in results)
    }
    if "adopted" in means:
        means["blocks_to_adopt"] = means.pop("adopted")
    return flags | means


def drift(results: Sequence[Sequence[SegmentResult]]) -> dict[str, dict]:
    """Returns the difference between the last segment and the first, by criterion.

    It covers videos of at least two segments whose first and last segment both have the
    criterion or number.
    """
    ends = [(video[0], video[-1]) for video in results if len(video) > 1]
    result = {}
    for name in _names(first.flags for first, _ in ends):
        pairs = [
            (a.flags, b.flags) for a, b in ends if name in a.flags.keys() & b.flags
        ]
        if pairs:
            last, first = ([pair[i][name] for pair in pairs] for i in (1, 0))
            result[name] = difference(last, first)
    for name in _names(first.numbers for first, _ in ends):
        rises = [
            b.numbers[name] - a.numbers[name]
            for a, b in ends
            if name in a.numbers.keys() & b.numbers
        ]
        if rises:
            result[name] = mean(rises)
    return result


def _names(groups: Iterable[dict]) -> list[str]:
    """Returns every key once, in order of appearance."""
    return list(dict.fromkeys(name for group in groups for name in group))


def score_videos(
    videos: Sequence[np.ndarray], segments: Sequence[Sequence[SceneSpan]]
) -> dict[str, dict]:
    """Returns the scores of videos that should show segments, from `aggregate`."""
    return aggregate(
        [
            score_shown(measure(*pair), [one.scene for one in pair[1]])
            for pair in zip(videos, segments, strict=True)
        ]
    )


def mismatch_control(
    rng: np.random.Generator,
    measured: Sequence[Sequence[Shown]],
    scripts: Sequence[Sequence[Scene]],
    draws: int = 1,
) -> dict[str, dict]:
    """Returns the scores of videos against other scripts with the same events.

    On videos that show their own captions, chance is 1/4 for colour and background,
    1/3 for shape, 1/5 for direction; of two objects 1/2 for each colour, which either
    may have, and 1/6 for each shape. Criteria that only the events decide, such as
    `count`, do not change. With several draws the intervals are too narrow, because
    draws share their videos.

    Args:
      rng: Generator that draws the other scripts.
      measured: Each video's segments, from `measure`.
      scripts: Each video's scenes.
      draws: Number of other scripts for each video.
    """
    return aggregate(
        [
            score_shown(shown, events.redraw(rng, script))
            for _ in range(draws)
            for shown, script in zip(measured, scripts, strict=True)
        ]
    )


def rendered(
    rng: np.random.Generator,
    script: Sequence[Scene],
    latent_lengths: Sequence[int],
    roundtrip: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, list[SceneSpan]]:
    """Returns a script's true video after a codec, and its segments.

    Args:
      rng: Generator that draws the first object's place on the lattice.
      script: The scenes.
      latent_lengths: Each scene's latent frames.
      roundtrip: Function that encodes and decodes one video, uint8 [F, 64, 64, 3].
    """
    frames = scenes.segment_pixel_frames(latent_lengths)
    played = list(zip(script, frames, strict=True))
    x, y = scenes.LATTICE * rng.integers(scenes.SIZE // scenes.LATTICE, size=2)
    return roundtrip(events.render(played, (float(x), float(y)))), lay_out(played)


def ceiling(
    rng: np.random.Generator,
    roundtrip: Callable[[np.ndarray], np.ndarray],
    scripts: Sequence[Sequence[Scene]],
    latent_length: int,
) -> dict[str, dict]:
    """Returns the scores of true videos after a codec, which no model can beat.

    Args:
      rng: Generator that draws the objects' places.
      roundtrip: Function that encodes and decodes one video, uint8 [F, 64, 64, 3].
      scripts: Each video's scenes.
      latent_length: Latent frames of every segment.
    """
    pairs = [
        rendered(rng, script, [latent_length] * len(script), roundtrip)
        for script in scripts
    ]
    return score_videos(*zip(*pairs, strict=True))


def _check(frames: np.ndarray, segments: Sequence[SceneSpan]) -> None:
    expected = (scenes.SIZE, scenes.SIZE, 3)
    if frames.ndim != 4 or frames.shape[1:] != expected or frames.dtype != np.uint8:
        raise ValueError(
            f"got {frames.dtype} {frames.shape}; expected uint8 [F, 64, 64, 3];"
            " pass one video, through codec.to_bytes if its pixels are in [-1, 1]"
        )
    borders = [0, *(one.end for one in segments)]
    begins = [one.begin for one in segments]
    if begins != borders[:-1] or borders[-1] > len(frames) or _is_empty(segments):
        raise ValueError(
            f"segments begin at {begins} and end at {borders[1:]} in a video of"
            f" {len(frames)} pixel frames; they must follow one another, each not"
            " empty; make them with lay_out"
        )


def _is_empty(segments: Sequence[SceneSpan]) -> bool:
    return not segments or any(one.begin >= one.end for one in segments)
