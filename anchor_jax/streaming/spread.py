"""How a stream's arrays are split over a mesh: by video, and its cache by head."""

from jax.sharding import PartitionSpec as P

from anchor_jax import sharding
from anchor_jax.axes import Specs
from anchor_jax.cache.types import KVCache
from anchor_jax.parallel import HEADS
from anchor_jax.streaming.types import Block, BlockNoise, StreamSetup, StreamState


def videos(setup: StreamSetup, batch: int) -> tuple[str, ...]:
    """Returns the mesh axes that a batch is split over.

    Under guidance a video's two rows are far apart, so nothing is split.
    """
    return sharding.split_videos(batch) if setup.copies == 1 else ()


def cache(split: tuple[str, ...]) -> Specs[KVCache]:
    """Returns the specs of a cache whose videos are split over mesh axes."""
    stored = P(None, split, None, None, HEADS)
    return KVCache(slots=stored, prior=stored, index=P())


def context(setup: StreamSetup, split: tuple[str, ...]) -> P:
    """Returns the spec of a prompt's keys and values."""
    return P(None, *setup.network.attention.split(split, HEADS))


def state(setup: StreamSetup, split: tuple[str, ...]) -> Specs[StreamState]:
    """Returns the specs of a stream's state."""
    return StreamState(cache(split), context(setup, split), P(split))


def noise(split: tuple[str, ...]) -> Specs[BlockNoise]:
    """Returns the specs of a block's noise."""
    return BlockNoise(initial=P(split), fresh=P(None, split), floor=P(split))


def block(split: tuple[str, ...]) -> Specs[Block]:
    """Returns the specs of a block."""
    return Block(P(split), P(), P(None, split), P(split))
