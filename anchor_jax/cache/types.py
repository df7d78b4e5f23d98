"""The cache of past keys and values, its index, and the plans made from the index."""

import jax
import jax.numpy as jnp
from flax import struct

from anchor_jax.wan.attention import LayersKV

EMPTY = -1
NEVER = 100_000_000


@struct.dataclass
class CacheIndex:
    """The content of each slot and the state of the stream, as integers.

    Slots come in the order sink | local ring | junction.
    """

    frame: jax.Array  # [slot] latent frame in each slot, or EMPTY
    start: jax.Array  # first latent frame of the next block
    filled: jax.Array  # local slots in use, always the first ones
    cursor: jax.Array  # local slot that the next frame takes
    switch_frame: jax.Array  # current switch, as the junction counts it
    switches: jax.Array  # prompt switches so far
    capture: jax.Array  # whether the next block becomes the junction
    cut: jax.Array  # whether the next block is a scene cut


@struct.dataclass
class KVCache:
    """Keys and values of past latent frames, keys before rotation.

    `slots` is [layer, batch, slot, token, dim]; `prior` holds the junction
    before last under the release's rules, and None otherwise.
    """

    slots: LayersKV
    prior: LayersKV | None
    index: CacheIndex


@struct.dataclass
class ReadPlan:
    """The frames that a pass reads: its own, then sink | local | junction.

    The first `frames` of these are visible, so no mask is needed. A re-cache
    reads no local frames, and no sink if it writes the sink. Positions are temporal
    RoPE indices; those of `past` are by slot. `frame` and `position` are in reading
    order, for tests, `verify` and pictures of the memory.
    """

    start: jax.Array  # first latent frame of the pass
    query: jax.Array  # [own] positions of the queries
    own: jax.Array  # [own] positions of the pass's own keys
    past: jax.Array  # [slot] positions of remembered keys
    frames: jax.Array  # number of visible key frames
    frame: jax.Array  # [key] latent frame of each key, or EMPTY
    position: jax.Array  # [key] position of each key
    junction: jax.Array  # whether a junction is seen
    prior: jax.Array  # whether it is the junction before last


@struct.dataclass
class WritePlan:
    """The slots for a pass's frames; the number of slots means "not written"."""

    slot: jax.Array  # [own]
    junction: jax.Array  # [own] slots of their copy in the junction


def empty_index(slots: int, switch_frame: int = NEVER) -> CacheIndex:
    """Returns the index at the start of a stream."""

    def number(value: int):
        # Each field has its own buffer: a shared buffer could not be donated.
        return jnp.full((), value, jnp.int32)

    return CacheIndex(
        frame=jnp.full((slots,), EMPTY, jnp.int32),
        start=number(0),
        filled=number(0),
        cursor=number(0),
        switch_frame=number(switch_frame),
        switches=number(0),
        capture=jnp.full((), False),
        cut=jnp.full((), False),
    )
