"""Events of the tiny world: a second object, hiding, and returning unnamed.

A stream is a list of scenes, one per segment. The switch from one to the next is an
event: an attribute changes, a second object enters or leaves, everything hides or
returns.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from anchor_jax.tiny_world import scene as scenes
from anchor_jax.tiny_world.scene import Attributes

EVENTS = (*scenes.KINDS, "enter", "leave", "hide", "return")
APART = 32.0
"""Pixels from the first object's centre to the second's: half the torus."""

_PAIR_MOVING = (
    "a {color} {shape} and a {color2} {shape2} move {motion}"
    " on a {background} background",
    "a {color} {shape} and a {color2} {shape2} moving {motion}"
    " on a {background} background",
    "{color} {shape} and {color2} {shape2} moving {motion}, {background} background",
    "on a {background} background a {color} {shape} and a {color2} {shape2}"
    " move {motion}",
    "a {color} {shape} and a {color2} {shape2} move {motion} on {background}",
)
_PAIR_STILL = (
    "a {color} {shape} and a {color2} {shape2} stay {motion}"
    " on a {background} background",
    "a {motion} {color} {shape} and {color2} {shape2} on a {background} background",
    "{motion} {color} {shape} and {color2} {shape2}, {background} background",
    "on a {background} background a {color} {shape} and a {color2} {shape2}"
    " stay {motion}",
    "a {motion} {color} {shape} and {color2} {shape2} on {background}",
)
_IT_MOVING = (
    "it returns and moves {motion} on a {background} background",
    "it returns moving {motion} on a {background} background",
    "it comes back moving {motion}, {background} background",
    "on a {background} background it returns and moves {motion}",
    "it comes back and moves {motion} on {background}",
)
_IT_STILL = (
    "it returns and stays {motion} on a {background} background",
    "it returns, {motion} on a {background} background",
    "it comes back {motion}, {background} background",
    "on a {background} background it returns and stays {motion}",
    "it comes back and stays {motion} on {background}",
)
_NOTHING = (
    "nothing on a {background} background",
    "there is nothing on a {background} background",
    "nothing, {background} background",
    "on a {background} background nothing",
    "an empty {background} background",
)
_SAYS_NOTHING = ("nothing", "empty")
_SAYS_IT = ("it",)


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of a segment.

    Attributes:
      first: The first object and the background. While hidden, the object is not
        visible.
      second: Colour and shape of a second object, which moves like the first.
      hidden: Whether only the background is seen.
      named: Whether the caption names the first object's colour and shape. If not, only
        memory can supply them.
    """

    first: Attributes
    second: tuple[str, str] | None = None
    hidden: bool = False
    named: bool = True

    def __post_init__(self):
        if self.second is not None:
            dataclasses.replace(self.first, color=self.second[0], shape=self.second[1])
            if self.second[0] == self.first.color:
                raise ValueError(f"second={self.second} has the first object's colour")
        if self.hidden + (not self.named) + (self.second is not None) > 1:
            raise ValueError(
                f"second={self.second}, hidden={self.hidden}, named={self.named}:"
                " a scene has a second object, or is hidden, or is unnamed; choose one"
            )


@dataclasses.dataclass(frozen=True)
class Meaning:
    """The meaning of a caption; attributes that it leaves open are None.

    `motion` is None if the caption describes an empty scene. `color` and `shape` are
    None also if it says `it`.
    """

    background: str
    motion: str | None = None
    color: str | None = None
    shape: str | None = None
    second: tuple[str, str] | None = None


def meaning(scene: Scene) -> Meaning:
    """Returns the meaning of all captions of a scene."""
    first = scene.first
    if scene.hidden:
        return Meaning(first.background)
    if not scene.named:
        return Meaning(first.background, first.motion)
    return Meaning(
        first.background, first.motion, first.color, first.shape, scene.second
    )


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Returns a caption: the canonical one, or with `rng` one of five paraphrases."""
    if scene.named and not scene.hidden and scene.second is None:
        return scenes.caption(scene.first, rng)
    templates = _templates(scene)
    chosen = 0 if rng is None else rng.integers(len(templates))
    color2, shape2 = scene.second or ("", "")
    names = dataclasses.asdict(scene.first) | {"color2": color2, "shape2": shape2}
    return templates[chosen].format(**names)


def _templates(scene: Scene) -> tuple[str, ...]:
    still = scene.first.motion == "still"
    if scene.hidden:
        return _NOTHING
    if scene.second is None:
        return _IT_STILL if still else _IT_MOVING
    return _PAIR_STILL if still else _PAIR_MOVING


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Returns all words that captions can have, sorted."""
    templates = (*_PAIR_MOVING, *_PAIR_STILL, *_IT_MOVING, *_IT_STILL, *_NOTHING)
    filler = re.sub(r"{\w+}", " ", " ".join(templates))
    return tuple(sorted({*scenes.words(filler), *scenes.vocabulary()}))


def parse(text: str) -> Meaning | None:
    """Returns the meaning of a caption, or None if it is outside the world.

    A caption is inside when all its words are in the vocabulary and it names one
    background and either nothing, or one motion and `it`, or one motion and one or
    two objects, a colour before each shape. The object named first is the first.
    """
    alone = scenes.parse_caption(text)
    if alone is not None:
        return meaning(Scene(alone))
    words = scenes.words(text)
    if not set(words) <= set(vocabulary()):
        return None
    backgrounds = [word for word in words if word in scenes.BACKGROUNDS]
    motions = [word for word in words if word in scenes.MOTIONS]
    nouns = [word for word in words if word in (*scenes.COLORS, *scenes.SHAPES)]
    nothing = any(word in _SAYS_NOTHING for word in words)
    unnamed = any(word in _SAYS_IT for word in words)
    counts = (len(backgrounds), len(motions), len(nouns), nothing, unnamed)
    if counts == (1, 0, 0, True, False):
        return Meaning(*backgrounds)
    if counts == (1, 1, 0, False, True):
        return Meaning(*backgrounds, *motions)
    if counts == (1, 1, 4, False, False) and _are_objects(nouns):
        return Meaning(*backgrounds, *motions, *nouns[:2], tuple(nouns[2:]))
    return None


def _are_objects(nouns: Sequence[str]) -> bool:
    """Returns whether words are a colour and a shape, then another colour's."""
    colors, shapes = nouns[0::2], nouns[1::2]
    named = set(colors) <= set(scenes.COLORS) and set(shapes) <= set(scenes.SHAPES)
    return named and len(set(colors)) == len(colors)


def kinds(scene: Scene, held_out: bool | None = None) -> tuple[str, ...]:
    """Returns the events that can follow a scene and lead to a scene in the split."""
    return tuple(kind for kind in EVENTS if _followers(scene, kind, held_out))


def follow(
    rng: np.random.Generator, scene: Scene, kind: str, held_out: bool | None = None
) -> Scene:
    """Returns a uniform draw from the scenes to which an event can lead.

    Args:
      rng: Random generator of the draw.
      scene: The scene before the event.
      kind: One of `EVENTS`.
      held_out: Draws from that split of the first object's colour, shape and motion;
        None draws from both.

    Raises:
      ValueError: The event is unknown or cannot follow the scene.
    """
    if kind not in EVENTS:
        raise ValueError(f"kind={kind!r}; choose one of {EVENTS}")
    choices = _followers(scene, kind, held_out)
    if not choices:
        raise ValueError(
            f"{kind!r} with held_out={held_out} cannot follow {scene}; possible are"
            f" {kinds(scene, held_out)} with it, and {kinds(scene)} in either split"
        )
    return choices[rng.integers(len(choices))]


@functools.cache
def _followers(scene: Scene, kind: str, held_out: bool | None) -> tuple[Scene, ...]:
    """Returns every scene in the split to which an event can lead."""
    first, second = scene.first, scene.second
    if scene.hidden:
        every = _unnamed(first) if kind == "return" else ()
    elif kind in scenes.KINDS:
        every = _changed(scene, kind)
    elif kind == "leave":
        every = [Scene(first)] if second else []
    elif second or kind == "return":
        every = []
    else:
        every = [Scene(first, hidden=True)] if kind == "hide" else _entered(first)
    return tuple(
        one
        for one in every
        if held_out is None or scenes.is_held_out(one.first) == held_out
    )


def _unnamed(first: Attributes) -> list[Scene]:
    """Returns the hidden object with each motion, its own included."""
    return [
        Scene(dataclasses.replace(first, motion=motion), named=False)
        for motion in scenes.MOTIONS
    ]


def _changed(scene: Scene, kind: str) -> list[Scene]:
    """Returns the named scenes in which only that attribute differs."""
    every = scenes.all_attributes(False) + scenes.all_attributes(True)
    taken = scene.second[0] if scene.second else None
    return [
        Scene(one, scene.second)
        for one in every
        if scenes.changed(scene.first, one) == (kind,) and one.color != taken
    ]


def _entered(first: Attributes) -> list[Scene]:
    """Returns the scenes with each second object of another colour."""
    return [
        Scene(first, (color, shape))
        for color in scenes.COLORS
        for shape in scenes.SHAPES
        if color != first.color
    ]


def event(before: Scene, after: Scene) -> str:
    """Returns the kind of the event between two scenes.

    Raises:
      ValueError: No single event leads from one to the other.
    """
    for kind in EVENTS:
        if after in _followers(before, kind, None):
            return kind
    raise ValueError(f"no event leads from {before} to {after}; use follow")


def script(
    rng: np.random.Generator,
    num_segments: int,
    held_out: bool | None,
    kinds: Sequence[str] | None = None,
) -> list[Scene]:
    """Returns the scenes of a stream with random events between them.

    A hidden scene is never the last, and only the event `return` follows it, even if
    `kinds` lacks it. Each event is drawn from those that can follow.

    Args:
      rng: Random generator of the draws.
      num_segments: Number of scenes.
      held_out: The split of all scenes; None draws from both. No change of colour,
        shape or motion leads from one held-out combination to another.
      kinds: The events to draw from; None draws from all.

    Raises:
      ValueError: An event is unknown, or none of `kinds` can follow.
    """
    chosen = EVENTS if kinds is None else tuple(kinds)
    if num_segments < 1 or not set(chosen) <= set(EVENTS):
        raise ValueError(
            f"num_segments={num_segments}, kinds={chosen}; must be at least 1"
            f" segment, and kinds among {EVENTS}"
        )
    splits = (False, True) if held_out is None else (held_out,)
    start = [one for split in splits for one in scenes.all_attributes(split)]
    result = [Scene(start[rng.integers(len(start))])]
    while len(result) < num_segments:
        is_last = len(result) == num_segments - 1
        kind = _draw_kind(rng, result[-1], held_out, chosen, is_last)
        result.append(follow(rng, result[-1], kind, held_out))
    return result


def _draw_kind(rng, scene, held_out, chosen, is_last) -> str:
    """Returns an event that can follow; `hide` cannot lead into the last segment."""
    choices = [
        kind
        for kind in kinds(scene, held_out)
        if (kind in chosen or scene.hidden) and not (is_last and kind == "hide")
    ]
    if not choices:
        raise ValueError(
            f"none of kinds={chosen} can follow {scene} with held_out={held_out};"
            f" these can: {kinds(scene, held_out)}; add one"
        )
    return choices[rng.integers(len(choices))]


def shortest_script(
    rng: np.random.Generator, kind: str, held_out: bool | None
) -> list[Scene]:
    """Returns the shortest list of scenes that ends in an event of a kind.

    The last scene is in the split; where an attribute changes, the one before it is
    from either, as no such change leads from a held-out combination to another.
    """
    if kind in scenes.KINDS:
        last = script(rng, 1, held_out)[0]
        return [follow(rng, last, kind), last]
    lead = {"leave": ["enter"], "return": ["hide"]}.get(kind, [])
    result = script(rng, 1, held_out)
    for one in (*lead, kind):
        result.append(follow(rng, result[-1], one, held_out))
    return result


def redraw(
    rng: np.random.Generator, played: Sequence[Scene], held_out: bool | None = None
) -> list[Scene]:
    """Returns another script with the same events: captions for a mismatch control.

    Raises:
      ValueError: The script does not start with a single named object.
    """
    if played[0] != Scene(played[0].first):
        raise ValueError(f"the first scene is {played[0]}; start with one named object")
    splits = (False, True) if held_out is None else (held_out,)
    start = [one for split in splits for one in scenes.all_attributes(split)]
    result = [Scene(start[rng.integers(len(start))])]
    for before, after in zip(played[:-1], played[1:], strict=True):
        result.append(follow(rng, result[-1], event(before, after), held_out))
    return result


def centers(
    segments: Sequence[tuple[Scene, int]], start_xy: tuple[float, float]
) -> np.ndarray:
    """Returns both objects' centres (x, y) in pixels on the torus, [2, F, 2].

    They exist for hidden frames too, in which the first object keeps moving, and for
    frames without a second object. The second object stays 32 pixels from the first:
    across the motion at its entry, or to the right of a still object.
    """
    first = scenes.centers([(one.first, frames) for one, frames in segments], start_xy)
    offsets, offset, had_second = [], np.zeros(2), False
    for one, frames in segments:
        if one.second is None or not had_second:
            is_vertical = one.first.motion in ("left", "right")
            offset = APART * np.asarray([not is_vertical, is_vertical], float)
        had_second = one.second is not None
        offsets.append(np.tile(offset, (frames, 1)))
    return np.stack([first, (first + np.concatenate(offsets)) % scenes.SIZE])


def render(
    segments: Sequence[tuple[Scene, int]], start_xy: tuple[float, float]
) -> np.ndarray:
    """Returns the pixel frames of a video, uint8 [F, 64, 64, 3].

    Positions are continuous across segments. Everything else changes at a segment's
    first pixel frame.

    Args:
      segments: Scenes with their numbers of pixel frames.
      start_xy: Position in pixels of the first object's centre in pixel frame 0.
    """
    xy = centers(segments, start_xy)
    parts, begin = [], 0
    for one, frames in segments:
        parts.append(_render_scene(one, xy[:, begin : begin + frames]))
        begin += frames
    return np.concatenate(parts)


def _render_scene(scene: Scene, xy: np.ndarray) -> np.ndarray:
    """Returns one scene's pixel frames; `xy` is [2, F, 2]."""
    back = np.asarray(scenes.BACKGROUNDS[scene.first.background], np.float32)
    shape = (xy.shape[1], scenes.SIZE, scenes.SIZE, 3)
    pixels = np.broadcast_to(back + np.float32(0.5), shape)
    objects = [] if scene.hidden else [(scene.first.color, scene.first.shape)]
    objects += [scene.second] if scene.second else []
    for (color, shape), place in zip(objects, xy, strict=False):
        share = scenes.coverage(shape, place, scenes.RADIUS)[..., None]
        # The objects never touch, so their shares of a pixel simply add.
        pixels = pixels + share * (np.asarray(scenes.COLORS[color], np.float32) - back)
    return pixels.astype(np.uint8)
