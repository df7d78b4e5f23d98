"""What clips and windows of the tiny world share."""

import numpy as np

from anchor_jax.world import codec as codecs
from anchor_jax.world import scene

BLOCK = 3
BLOCKS = 5

# Temporal RoPE positions of the five blocks of a causal window: the start of a
# stream, its steady state, and the steady state with a junction (blocks 0 and 1 are
# then sink and junction).
START = tuple(range(15))
STEADY = (0, 1, 2, *range(9, 21))
JUNCTION = (0, 1, 2, 6, 7, 8, *range(12, 21))


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
