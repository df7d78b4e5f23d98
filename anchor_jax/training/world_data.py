"""Clips of the tiny world as latents, with the prompts that describe them."""

import dataclasses
import functools

import numpy as np

from anchor_jax.world import codec as codecs
from anchor_jax.world import scene

BLOCK = 3
BLOCKS = 5
CAPTIONS = 5

# Temporal RoPE positions of the five blocks of a causal window: the start of a
# stream, its steady state, and the steady state with a junction (blocks 0 and 1 are
# then sink and junction).
START = tuple(range(15))
STEADY = (0, 1, 2, *range(9, 21))
JUNCTION = (0, 1, 2, 6, 7, 8, *range(12, 21))


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips for the bidirectional teacher.

    `latents` is [clip, frame, 8, 8, channel], `attributes` indexes `combinations()`.
    """

    latents: np.ndarray
    attributes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of five blocks for the causal stages, with at most one switch.

    `before` and `after` index `combinations()`; block `switch` is the first under
    `after`, 0 if the window has one prompt. `layout` picks the RoPE positions.
    """

    latents: np.ndarray
    before: np.ndarray
    after: np.ndarray
    switch: np.ndarray
    layout: np.ndarray


@functools.cache
def combinations() -> tuple[scene.Attributes, ...]:
    """Returns every combination of the world, training ones first."""
    return scene.all_attributes(False) + scene.all_attributes(True)


@functools.cache
def _index() -> dict[scene.Attributes, int]:
    return {one: number for number, one in enumerate(combinations())}


def captions() -> list[str]:
    """Returns `CAPTIONS` paraphrases of each of `combinations()`, then ""."""
    texts = []
    for one in combinations():
        rng = np.random.default_rng(0)
        seen = {scene.caption(one)}
        while len(seen) < CAPTIONS:
            seen.add(scene.caption(one, rng))
        texts += sorted(seen)
    return [*texts, ""]


def fit_codec(seed: int, channels: int) -> dict[str, np.ndarray]:
    """Returns the linear codec of training clips."""
    rng = np.random.default_rng((seed, 0))
    blocks = []
    for _ in range(192):
        attributes = scene.sample_attributes(rng, held_out=False)
        video = scene.sample_track(rng, [(attributes, 16)]).render()
        blocks.append(np.asarray(codecs.pixel_blocks(codecs.to_unit(video)[None])))
    return codecs.fit_codec(np.concatenate(blocks), channels)


def sample_clips(codec, seed: int, num_clips: int, frames: int) -> Clips:
    """Returns clips from a video's first frame on, training combinations only."""
    rng = np.random.default_rng((seed, 1))
    pixel_frames = scene.latent_to_pixel_frames(frames)
    latents, index = [], []
    for _ in range(num_clips):
        attributes = scene.sample_attributes(rng, held_out=False)
        video = scene.sample_track(rng, [(attributes, pixel_frames)]).render()
        latents.append(_encode(codec, video, first=True))
        index.append(_index()[attributes])
    return Clips(np.stack(latents), np.asarray(index))


def sample_windows(codec, seed: int, num_windows: int) -> Windows:
    """Returns windows of five blocks as a stream would remember them."""
    rng = np.random.default_rng((seed, 2))
    rows = [_window(codec, rng) for _ in range(num_windows)]
    latents, before, after, switch, layout = zip(*rows, strict=True)
    ints = (np.asarray(x) for x in (before, after, switch, layout))
    return Windows(np.stack(latents), *ints)


def _window(codec, rng):
    """Returns one window: sink block, a gap in time, four more blocks.

    Layout 0 has no gap; layout 1 a gap after the sink; layout 2 is sink, junction, a
    gap, three blocks.
    """
    layout = int(rng.integers(3))
    before = scene.sample_attributes(rng, held_out=False)
    after, switch = before, 0
    if rng.random() < 0.6:
        after = _other(rng, before)
        switch = 1 if layout == 2 else int(rng.integers(1, BLOCKS))
    gap_after = (None, 0, 1)[layout]
    track = scene.sample_track(rng, [(before, 1)])
    xy, parts = np.asarray(track.start_xy), []
    for block in range(BLOCKS):
        attributes = after if switch and block >= switch else before
        frames = 9 if block == 0 else 12
        step = scene.SPEED * np.asarray(scene.MOTIONS[attributes.motion], float)
        first = xy if block == 0 else xy + step
        video = scene.render([(attributes, frames)], tuple(first), track.radius)
        parts.append(_encode(codec, video, first=block == 0))
        xy = first + (frames - 1) * step
        if block == gap_after:
            xy = xy + step * 4 * BLOCK * int(rng.integers(0, 8))
    index = _index()
    return np.concatenate(parts), index[before], index[after], switch, layout


def _other(rng, attributes):
    kinds = (*scene.KINDS, "any")
    return scene.switch_attributes(
        rng, attributes, kinds[rng.integers(len(kinds))], held_out=False
    )


def _encode(codec, video: np.ndarray, first: bool) -> np.ndarray:
    pixels = codecs.to_unit(video)[None]
    if first:
        pixels = codecs.with_first_repeated(pixels)
    blocks = codecs.pixel_blocks(pixels)
    return ((blocks - codec["mean"]) @ codec["encode"])[0].astype(np.float32)


def roll(rng, latents: np.ndarray) -> np.ndarray:
    """Returns each clip shifted along the world's lattice, as the torus allows."""
    step = scene.LATTICE // scene.CELL
    rows, columns = latents.shape[2] // step, latents.shape[3] // step
    shifts = step * rng.integers((rows, columns), size=(len(latents), 2))
    moved = [
        np.roll(one, shift, (1, 2)) for one, shift in zip(latents, shifts, strict=True)
    ]
    return np.stack(moved)


def pick_captions(rng, attributes: np.ndarray, dropout: float) -> np.ndarray:
    """Returns a row of `captions()` for each combination; the empty one if dropped."""
    rows = attributes * CAPTIONS + rng.integers(CAPTIONS, size=attributes.shape)
    empty = len(combinations()) * CAPTIONS
    return np.where(rng.random(len(rows)) < dropout, empty, rows.T).T


def stratified(rng, shape: tuple[int, ...]) -> np.ndarray:
    """Returns uniform numbers in (0, 1), spread evenly over the whole array."""
    size = int(np.prod(shape))
    cells = (np.arange(size) + rng.random(size)) / size
    return rng.permutation(cells).reshape(shape)
