"""Clips of the tiny world with events, as latents, for the teacher."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from anchor_jax.errors import UserError
from anchor_jax.tiny_world import codec as codecs
from anchor_jax.tiny_world import data as world_data
from anchor_jax.tiny_world import events, scene
from anchor_jax.tiny_world.events import Scene

BLOCK = 3
_PARAPHRASES = 8


@dataclasses.dataclass(frozen=True)
class Clips:
    """Latent clips and the scenes that they show.

    `latents` is [clip, frame, 8, 8, channel] in float16. `scenes` holds the scene of
    each clip's caption. In some clips the first block shows the scene before an event.
    """

    latents: np.ndarray
    scenes: tuple[Scene, ...]


def captions() -> list[str]:
    """Returns captions that have every word of the world, and the empty caption."""
    rng = np.random.default_rng(0)
    found = {events.caption(one) for one in _every_scene()}
    for _ in range(_PARAPHRASES):
        found |= {events.caption(one, rng) for one in _every_scene()}
    return [*sorted(found), ""]


@functools.cache
def _every_scene() -> tuple[Scene, ...]:
    """Returns one scene of every kind."""
    rng = np.random.default_rng(0)
    found = []
    for attributes in scene.all_attributes(False):
        begin = Scene(attributes)
        found.append(begin)
        for kind in events.kinds(begin):
            after = events.follow(rng, begin, kind)
            found.append(after)
            found += [events.follow(rng, after, one) for one in events.kinds(after)]
    return tuple(found)


def make_clips(codec, seed: int, count: int, frames: int) -> Iterator[dict[str, Any]]:
    """Yields clips of training combinations in the format of `datasets.Clips`.

    Args:
      codec: result of `fit_codec`.
      seed: seed of the draws.
      count: number of clips.
      frames: latent frames per clip.
    """
    rng = np.random.default_rng((seed, 3))
    # All scenes are drawn first, because encoding draws from the same generator.
    drawn = list(itertools.islice(_clips(rng, frames), count))
    for played, last in drawn:
        yield {"latents": _encode(codec, played, rng), "captions": [to_text(last)]}


def gather(made: Iterable[Mapping[str, Any]]) -> Clips:
    """Returns the clips of `make_clips`, which are made only once."""
    latents, scenes = [], []
    for example in made:
        latents.append(np.asarray(example["latents"], np.float16))
        scenes.append(from_text(example["captions"][0]))
    return Clips(np.stack(latents), tuple(scenes))


def to_text(shown: Scene) -> str:
    """Returns a scene as JSON. Its captions are drawn again for every batch."""
    return json.dumps(dataclasses.asdict(shown))


def from_text(text: str) -> Scene:
    """Returns the scene of `to_text`.

    Raises:
      UserError: The text does not describe a scene.
    """
    try:
        fields = json.loads(text)
        second = fields.pop("second")
        first = scene.Attributes(**fields.pop("first"))
        return Scene(first, None if second is None else tuple(second), **fields)
    except (
        ValueError,
        RecursionError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise UserError(
            f"{text[:60]!r} describes no scene: the dataset of clips is damaged; remove"
            " the folder `data` of the training (or config.data.cache), and the same"
            " command makes it again"
        ) from error


def _clips(rng, frames: int) -> Iterator[tuple[list[tuple[Scene, int]], Scene]]:
    """Yields the segments of clips in pixel frames, and the scenes of their captions.

    A third of the clips starts with a block of the previous scene, like the clips that
    distillation scores after a prompt switch.
    """
    whole = scene.latent_to_pixel_frames(frames)
    first = scene.latent_to_pixel_frames(BLOCK)
    while True:
        before, after = pair(rng)
        if rng.random() < 1 / 3:
            yield [(before, first), (after, whole - first)], after
        else:
            yield [(after, whole)], after


def pair(rng) -> tuple[Scene, Scene]:
    """Returns a scene and a scene that can follow it, most often plain ones."""
    begin = Scene(scene.sample_attributes(rng, held_out=False))
    chosen = rng.random()
    if chosen < 0.5:
        kind = rng.choice(["color", "shape", "motion", "background"])
        return begin, world_data.follow(rng, begin, kind)
    if chosen < 0.7:
        return begin, events.follow(rng, begin, "enter", False)
    hidden = events.follow(rng, begin, "hide", False)
    if chosen < 0.8:
        return begin, hidden
    return hidden, events.follow(rng, hidden, "return", False)


def stream_scenes(rng) -> tuple[Scene, Scene]:
    """Returns a stream's scenes before and after a switch.

    Like `pair`, but 30 % change several attributes at once and 20 % the motion. Fewer
    start with two objects, and none with an empty scene, because its hidden object
    would be arbitrary.
    """
    first = scene.sample_attributes(rng, held_out=False)
    chosen = rng.random()
    if chosen < 0.3:
        return Scene(first), Scene(scene.switch_attributes(rng, first, "any", False))
    if chosen < 0.5:
        return Scene(first), world_data.follow(rng, Scene(first), "motion")
    before, after = pair(rng)
    if before.hidden:
        return Scene(before.first), before
    if after.second is None or rng.random() < 0.5:
        return before, after
    return after, world_data.follow_any(rng, after)


def _encode(codec, played, rng) -> np.ndarray:
    start = scene.LATTICE * rng.integers(scene.SIZE // scene.LATTICE, size=2)
    video = events.render(played, (float(start[0]), float(start[1])))
    pixels = codecs.with_first_repeated(codecs.to_unit(video)[None])
    blocks = codecs.pixel_blocks(pixels)
    return ((blocks - codec["mean"]) @ codec["encode"])[0]


class ClipBatches:
    """Batches for the bidirectional teacher, as pure functions of their number."""

    def __init__(
        self,
        clips: Clips,
        tokenizer,
        batch: int,
        frames: int,
        seed: int,
        dropout: float = 0.1,
    ):
        self.clips, self.tokenizer, self.dropout = clips, tokenizer, dropout
        self.batch, self.frames, self.seed = batch, frames, seed

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """Returns latents and token ids of batch `number`; dropout removes captions."""
        rng = np.random.default_rng((self.seed, 10, number))
        rows = rng.integers(len(self.clips.latents), size=self.batch)
        latents = self.clips.latents[rows, : self.frames].astype(np.float32)
        texts = [
            ""
            if rng.random() < self.dropout
            else events.caption(self.clips.scenes[row], rng)
            for row in rows
        ]
        ids, mask = self.tokenizer.encode(texts)
        return {
            "latents": world_data.roll(rng, latents),
            "ids": ids[:, None],
            "mask": mask[:, None],
        }
