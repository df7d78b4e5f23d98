"""The cache of past keys and values, its index, and the plans made from the index."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Int

from anchor_jax.axes import Array, Flag, Number
from anchor_jax.wan.attention import LayersKV

EMPTY = -1
NEVER = 100_000_000


@struct.dataclass
class CacheIndex:
    """The content of each slot and the state of the stream, as integers.

    Slots come in the order sink | local ring | junction.
    """

    frame: Int[Array, " slot"]  # latent frame in each slot, or EMPTY
    start: Number  # first latent frame of the next block
    filled: Number  # local slots in use, always the first ones
    cursor: Number  # local slot that the next frame takes
    switch_frame: Number  # current switch, as the junction counts it
    switches: Number  # prompt switches so far
    capture: Flag  # whether the next block becomes the junction
    cut: Flag  # whether the next block is a scene cut


@struct.dataclass
class KVCache:
    """Keys and values of past latent frames, keys before rotation.

    `slots` has a slot where `LayersKV` has a frame. `prior` holds the junction before
    last under the release's rules, and None otherwise.
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

    start: Number  # first latent frame of the pass
    query: Int[Array, " own"]  # positions of the queries
    own: Int[Array, " own"]  # positions of the pass's own keys
    past: Int[Array, " slot"]  # positions of remembered keys
    frames: Number  # number of visible key frames
    frame: Int[Array, " key"]  # latent frame of each key, or EMPTY
    position: Int[Array, " key"]  # position of each key
    junction: Flag  # whether a junction is seen
    prior: Flag  # whether it is the junction before last


@struct.dataclass
class WritePlan:
    """The slots for a pass's frames; the number of slots means "not written"."""

    slot: Int[Array, " own"]
    junction: Int[Array, " own"]  # slots of their copy in the junction


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
