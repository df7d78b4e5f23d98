"""Windows of tiny-world streams as a causal generator reads them.

A window is five blocks of a longer stream with events: the blocks that a policy with a
sink, a junction and a local window can read. Blocks of a re-cache are under the current
prompt; the sink keeps its own.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from anchor_jax.tiny_world import clips as world_clips
from anchor_jax.tiny_world import codec as codecs
from anchor_jax.tiny_world import data as world_data
from anchor_jax.tiny_world import events, scene
from anchor_jax.tiny_world.data import BLOCK, BLOCKS, JUNCTION, START, STEADY
from anchor_jax.tiny_world.events import Scene

POSITIONS = (START, STEADY, JUNCTION)
JUNCTION_LAYOUT = POSITIONS.index(JUNCTION)
FRAMES = BLOCK * BLOCKS
ARRAYS = {name: ((1,), "int64") for name in ("since", "layout")}
"""Shapes and types of the arrays that a window has besides latents and scenes."""
_SHORTEST, _LONGEST = 4, 8  # blocks per segment; 4 are longer than the local window
_PIXELS = BLOCK * scene.PIXEL_FRAMES_PER_LATENT


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of `BLOCKS` blocks.

    Attributes:
      latents: [window, frame, 8, 8, channel] in float16.
      first: the scene under which each sink was made.
      now: the scene of the current prompt.
      since: the window's first block under that prompt, 0 if it never changed.
      layout: index into `POSITIONS`.
    """

    latents: np.ndarray
    first: tuple[Scene, ...]
    now: tuple[Scene, ...]
    since: np.ndarray
    layout: np.ndarray


def sample_windows(codec, seed: int, count: int) -> Windows:
    """Returns windows of streams of training combinations."""
    return gather(make_windows(codec, seed, count))


def make_windows(codec, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yields the windows of `sample_windows` in the form of `datasets.Clips`."""
    rng = np.random.default_rng((seed, 4))
    for number in range(count):
        layout = number % len(POSITIONS)
        latents, *scenes, since = _window(codec, rng, layout)
        yield {
            "latents": latents,
            "captions": [world_clips.to_text(one) for one in scenes],
            "since": np.array([since]),
            "layout": np.array([layout]),
        }


def gather(made: Iterable[Mapping[str, Any]]) -> Windows:
    """Returns the windows of `make_windows`, which are made only once."""
    rows = [
        (
            np.asarray(example["latents"], np.float16),
            *map(world_clips.from_text, example["captions"]),
            int(example["since"][0]),
            int(example["layout"][0]),
        )
        for example in made
    ]
    latents, first, now, since, layout = zip(*rows, strict=True)
    return Windows(np.stack(latents), first, now, np.asarray(since), np.asarray(layout))


def _window(codec, rng, layout: int):
    """Returns latents, the sink's scene, the current scene, and its first block."""
    if layout == 0:
        segments, blocks = _early(rng)
    else:
        segments, blocks = _late(rng, layout)
    bounds = np.cumsum([0, *(length for _, length in segments)])
    current = int(np.searchsorted(bounds, blocks[-1], side="right")) - 1
    latents = _encode(codec, rng, segments, blocks)
    changed = bounds[current]
    since = next(i for i, block in enumerate(blocks) if block >= changed)
    return latents, segments[0][0], segments[current][0], since


def _early(rng):
    """Returns a stream's first blocks, with or without an event among them."""
    begin = Scene(scene.sample_attributes(rng, held_out=False))
    if rng.random() < 0.4:
        return [(begin, BLOCKS)], tuple(range(BLOCKS))
    after = world_data.follow_any(rng, begin)
    first = int(rng.integers(1, BLOCKS))
    return [(begin, first), (after, BLOCKS - first)], tuple(range(BLOCKS))


def _late(rng, layout: int):
    """Returns segments, and the blocks of a window that ends in the last of them."""
    scenes = _script(rng, layout)
    lengths = rng.integers(_SHORTEST, _LONGEST + 1, size=len(scenes))
    start = int(lengths[:-1].sum())
    if layout == 1:
        # The window ends zero to three blocks after the switch, or has a single prompt.
        last = max(BLOCKS - 1, start + int(rng.integers(0, 4)))
        blocks = (0, *range(last - 3, last + 1))
    else:
        first = start + 1 + int(rng.integers(0, 4))
        last = first + 2
        blocks = (0, start, first, first + 1, last)
    lengths[-1] = last + 1 - start
    return list(zip(scenes, map(int, lengths), strict=True)), blocks


def _script(rng, layout: int) -> list[Scene]:
    """Returns a stream's scenes; half of all `return` events come from here."""
    begin = Scene(scene.sample_attributes(rng, held_out=False))
    if layout == 1 and rng.random() < 0.2:
        return [begin]
    if rng.random() < 0.35:
        hidden = events.follow(rng, begin, "hide", False)
        return [begin, hidden, events.follow(rng, hidden, "return", False)]
    script = [begin]
    for _ in range(int(rng.integers(1, 3))):
        script.append(world_data.follow_any(rng, script[-1]))
    return script


def _encode(codec, rng, segments, blocks) -> np.ndarray:
    """Returns the latents of some blocks of a stream."""
    start = scene.LATTICE * rng.integers(scene.SIZE // scene.LATTICE, size=2)
    lengths = scene.segment_pixel_frames([BLOCK * length for _, length in segments])
    played = [(one, n) for (one, _), n in zip(segments, lengths, strict=True)]
    video = events.render(played, (float(start[0]), float(start[1])))
    pixels = codecs.with_first_repeated(codecs.to_unit(video)[None])[0]
    parts = np.concatenate(
        [pixels[block * _PIXELS : (block + 1) * _PIXELS] for block in blocks]
    )
    values = codecs.pixel_blocks(parts[None])
    return ((values - codec["mean"]) @ codec["encode"])[0]


class WindowBatches:
    """Batches for teacher forcing, as pure functions of their number."""

    def __init__(self, windows: Windows, tokenizer, batch: int, seed: int, dropout):
        self.windows, self.tokenizer = windows, tokenizer
        self.batch, self.seed, self.dropout = batch, seed, dropout
        self.rows = [np.flatnonzero(windows.layout == i) for i in range(len(POSITIONS))]

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        """Returns batch `number`: windows of one layout, two prompts each."""
        rng = np.random.default_rng((self.seed, 20, number))
        layout = number % len(POSITIONS)
        rows = rng.choice(self.rows[layout], self.batch)
        texts = [self._prompts(rng, row) for row in rows]
        ids, mask = self.tokenizer.encode([text for two in texts for text in two])
        since = self.windows.since[rows][:, None]
        block = np.arange(BLOCKS)
        # At its position, a junction is only read and never denoised.
        denoised = (block >= since) | (block < 1)
        denoised &= (layout != JUNCTION_LAYOUT) | (block != 1)
        return {
            "latents": world_data.roll(
                rng, self.windows.latents[rows].astype(np.float32)
            ),
            "ids": ids.reshape(self.batch, 2, -1),
            "mask": mask.reshape(self.batch, 2, -1),
            # The sink keeps its prompt; re-cached blocks take the new one.
            "which": ((since > 0) & (block >= 1)).astype(np.int32),
            "weight": denoised.astype(np.float32),
            "position": np.asarray(POSITIONS[layout], np.int32),
        }

    def _prompts(self, rng, row: int) -> tuple[str, str]:
        if rng.random() < self.dropout:
            return "", ""
        first, now = self.windows.first[row], self.windows.now[row]
        return events.caption(first, rng), events.caption(now, rng)
