"""RoPE rules: which temporal position a latent frame takes when it is read.

A rule is a frozen dataclass with five functions over traced integers. `start` is the
first latent frame of the pass and `frames` its length.
"""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Absolute:
    """Every frame at its own number, without end (LongLive, Self-Forcing)."""

    junction_start: None = None
    cut: None = None

    def query(self, start, frames: int):
        return start + jnp.arange(frames, dtype=jnp.int32)

    def own(self, index, start, frames: int, sink: int):
        del index, sink
        return self.query(start, frames)

    def local(self, index, frame, start, frames: int, sink: int):
        del index, start, frames, sink
        return frame

    def sink(self, index, frame, start, frames: int):
        del index, start, frames
        return frame


@dataclasses.dataclass(frozen=True)
class Relative:
    """Positions counted from the pass, which never goes past `range` - 1.

    While the stream is shorter than `range` a position is the frame's number;
    afterwards the window stands still at the end of the range. The sink stays at 0.
    With `junction_start` this is tri-region RoPE; `cut` moves a scene cut's block to
    that position.

    Source: cache/README.md, "Tri-region RoPE"; Anchor Forcing, Infinity-RoPE.
    """

    range: int = 21
    junction_start: int | None = None
    cut: int | None = None

    def query(self, start, frames: int):
        first = jnp.minimum(start, self.range - frames)
        return first + jnp.arange(frames, dtype=jnp.int32)

    def own(self, index, start, frames: int, sink: int):
        del index, sink
        return self.query(start, frames)

    def local(self, index, frame, start, frames: int, sink: int):
        del index, sink
        return jnp.minimum(start, self.range - frames) + frame - start

    def sink(self, index, frame, start, frames: int):
        del index, start, frames
        return jnp.arange(frame.shape[0], dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Bounded(Relative):
    """As `Relative`, with the sink directly before the local window.

    Source: the paper's table 6 baseline; cache/README.md, "Other RoPE rules", "D25".
    """

    def sink(self, index, frame, start, frames: int):
        size = frame.shape[0]
        before = jnp.minimum(start, self.range - frames) - index.filled - size
        return jnp.maximum(before, 0) + jnp.arange(size, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Ranked(Relative):
    """As `Relative`, keys numbered in the order in which they are remembered.

    Differs only after a flush with a window above the block's reach: queries then
    keep the window's end while keys close up, as in the official Infinity-RoPE.
    """

    def own(self, index, start, frames: int, sink: int):
        first = jnp.where(start == 0, 0, sink + index.filled)
        return first + jnp.arange(frames, dtype=jnp.int32)

    def local(self, index, frame, start, frames: int, sink: int):
        del start, frames
        size = max(1, frame.shape[0])
        oldest = jnp.where(index.filled == frame.shape[0], index.cursor, 0)
        slot = jnp.arange(frame.shape[0], dtype=jnp.int32)
        return sink + (slot - oldest) % size
