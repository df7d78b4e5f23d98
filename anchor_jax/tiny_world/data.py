"""The parts that clips and windows of the tiny world share."""

import dataclasses

import numpy as np

from anchor_jax.tiny_world import codec as codecs
from anchor_jax.tiny_world import events, scene
from anchor_jax.tiny_world.events import Scene

BLOCK = 3
BLOCKS = 5
VERSION = 1
"""Version of the examples of a seed. Stored clips of another version are replaced."""

# Temporal RoPE positions of the five blocks of a causal window: the start of a
# stream, its steady state, and the steady state with a junction (blocks 0 and 1 are
# then sink and junction).
START = tuple(range(15))
STEADY = (0, 1, 2, *range(9, 21))
JUNCTION = (0, 1, 2, 6, 7, 8, *range(12, 21))

_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def follow(rng, before: Scene, kind: str) -> Scene:
    """Returns a scene of the training split after an event.

    Half of the changed motions are reversals. A reversal contradicts the past most, and
    uniform draws would reverse only one in four.
    """
    motion = _OPPOSITE.get(before.first.motion)
    if kind == "motion" and motion and rng.random() < 0.5:
        first = dataclasses.replace(before.first, motion=motion)
        if not scene.is_held_out(first):
            return dataclasses.replace(before, first=first)
    return events.follow(rng, before, kind, False)


def follow_any(rng, before: Scene) -> Scene:
    """Returns a training scene that can follow, often with another motion."""
    kinds = events.kinds(before, False)
    turns = "motion" in kinds and rng.random() < 0.3
    return follow(rng, before, "motion" if turns else rng.choice(kinds))


def fit_codec(seed: int, channels: int) -> dict[str, np.ndarray]:
    """Returns the linear codec of training clips."""
    rng = np.random.default_rng((seed, 0))
    blocks = []
    for _ in range(192):
        attributes = scene.sample_attributes(rng, held_out=False)
        video = scene.sample_track(rng, [(attributes, 16)]).render()
        blocks.append(np.asarray(codecs.pixel_blocks(codecs.to_unit(video)[None])))
    return codecs.fit_codec(np.concatenate(blocks), channels)


def roll(rng, latents: np.ndarray) -> np.ndarray:
    """Returns each clip shifted along the world's lattice, as the torus allows."""
    step = scene.LATTICE // scene.CELL
    rows, columns = latents.shape[2] // step, latents.shape[3] // step
    shifts = step * rng.integers((rows, columns), size=(len(latents), 2))
    moved = [
        np.roll(one, shift, (1, 2)) for one, shift in zip(latents, shifts, strict=True)
    ]
    return np.stack(moved)
