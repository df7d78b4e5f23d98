"""RoPE rules: the temporal position that a latent frame has when it is read.

A rule is a frozen dataclass of functions over traced integers. `start` is the
first latent frame of the pass and `frames` its length. `catalog.ROPES` names the rules.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Bool, Int

from anchor_jax.axes import Array, Number
from anchor_jax.cache.types import CacheIndex

Own = Int[Array, " {frames}"]
"""A number for each frame of a pass."""

Region = Int[Array, " slot"]
"""A number for each slot of the sink, or of the local ring."""


class RopeRule:
    """Base of all RoPE rules: absolute positions for every frame.

    Attributes:
      range: number of positions in use, or None for no bound.
      junction_start: first position of the junction. None takes the policy's default.
      cut: first position of a scene cut; None if the rule has no scene cuts.
    """

    range = None
    junction_start = None
    cut = None

    def query(self, start: Number, frames: int) -> Own:
        """Returns the positions of the queries of a pass."""
        return start + jnp.arange(frames, dtype=jnp.int32)

    def own(self, index: CacheIndex, start: Number, frames: int, sink: int) -> Own:
        """Returns the positions of the keys of the same frames."""
        del index, sink
        return self.query(start, frames)

    def local(
        self, index: CacheIndex, frame: Region, start: Number, frames: int, sink: int
    ) -> Region:
        """Returns the positions of the ring's slots."""
        del index, start, frames, sink
        return frame

    def sink(
        self, index: CacheIndex, frame: Region, start: Number, frames: int
    ) -> Region:
        """Returns the positions of the sink's slots."""
        del index, start, frames
        return frame

    def refuses(self, policy: Any) -> str | None:
        """Returns why the rule cannot be combined with a policy's parts, or None."""
        if policy.junction:
            return (
                f"{type(self).__name__.lower()} RoPE cannot be used with a junction:"
                " the junction needs a bounded range of positions; choose relative"
                " positions"
            )
        return None

    def released(self) -> "RopeRule":
        """Returns the rule that the method's published code uses instead."""
        return self

    def rotates_stored(self, frame: Int[Array, "*axes"]) -> Bool[Array, "*axes"]:
        """Returns whether the published code stores each frame's key rotated."""
        return jnp.zeros_like(frame, bool)


@dataclasses.dataclass(frozen=True)
class Absolute(RopeRule):
    """The number of the frame, without a bound (LongLive, Self-Forcing)."""

    junction_start: None = None
    cut: None = None

    def rotates_stored(self, frame: Int[Array, "*axes"]) -> Bool[Array, "*axes"]:
        return jnp.ones_like(frame, bool)


@dataclasses.dataclass(frozen=True)
class Relative(RopeRule):
    """Positions relative to the pass, whose own positions end at `range` - 1 at most.

    While the stream is shorter than `range` a position is the frame's number;
    later the window stays at the end of the range. The sink stays at 0.
    With a `range` beyond the window it is tri-region RoPE. `cut` moves the block of a
    scene cut to that position.

    Source: cache/README.md, "Tri-region RoPE"; Anchor Forcing, Infinity-RoPE.
    """

    range: int = 21
    junction_start: int | None = None
    cut: int | None = None

    def query(self, start: Number, frames: int) -> Own:
        first = jnp.minimum(start, self.range - frames)
        return first + jnp.arange(frames, dtype=jnp.int32)

    def local(
        self, index: CacheIndex, frame: Region, start: Number, frames: int, sink: int
    ) -> Region:
        del index, sink
        return jnp.minimum(start, self.range - frames) + frame - start

    def sink(
        self, index: CacheIndex, frame: Region, start: Number, frames: int
    ) -> Region:
        del index, start, frames
        return jnp.arange(frame.shape[0], dtype=jnp.int32)

    def refuses(self, policy: Any) -> str | None:
        if policy.window > self.range:
            return (
                f"window={policy.window} must fit into the RoPE range of {self.range}"
                " positions"
            )
        junction = policy.junction
        # Official behaviour: the release lets the junction share the sink's band.
        lowest = 0 if junction and junction.overlaps_sink else policy.sink
        if junction and policy.junction_start < lowest:
            return (
                f"window={policy.window} and a junction of {junction.frames} leave"
                f" no room in the RoPE range of {self.range}; choose a window of"
                f" {self.range - junction.frames - lowest} or less, or tri-region"
                " positions"
            )
        return None

    def released(self) -> RopeRule:
        if type(self) is Relative and self.cut is not None:
            return Ranked(self.range, cut=self.cut)
        return self


@dataclasses.dataclass(frozen=True)
class Bounded(Relative):
    """Like `Relative`, but with the sink directly before the local window.

    Source: the paper's table 6 baseline; cache/README.md, "Other RoPE rules", "D25".
    """

    def sink(
        self, index: CacheIndex, frame: Region, start: Number, frames: int
    ) -> Region:
        size = frame.shape[0]
        before = jnp.minimum(start, self.range - frames) - index.filled - size
        return jnp.maximum(before, 0) + jnp.arange(size, dtype=jnp.int32)

    def refuses(self, policy: Any) -> str | None:
        return _refuses_moving_sink(policy) or super().refuses(policy)


@dataclasses.dataclass(frozen=True)
class Ranked(Relative):
    """Like `Relative`, but with keys numbered in the order in which they are stored.

    It differs from `Relative` only after a flush: queries then stay at the end of the
    window while keys move together, as in the official Infinity-RoPE.
    """

    def own(self, index: CacheIndex, start: Number, frames: int, sink: int) -> Own:
        first = jnp.where(start == 0, 0, sink + index.filled)
        return first + jnp.arange(frames, dtype=jnp.int32)

    def local(
        self, index: CacheIndex, frame: Region, start: Number, frames: int, sink: int
    ) -> Region:
        del start, frames
        size = max(1, frame.shape[0])
        oldest = jnp.where(index.filled == frame.shape[0], index.cursor, 0)
        slot = jnp.arange(frame.shape[0], dtype=jnp.int32)
        return sink + (slot - oldest) % size

    def refuses(self, policy: Any) -> str | None:
        return _refuses_moving_sink(policy) or super().refuses(policy)

    def rotates_stored(self, frame: Int[Array, "*axes"]) -> Bool[Array, "*axes"]:
        # Official behaviour: frame 0 is stored rotated, all others are not.
        return frame == 0


def _refuses_moving_sink(policy) -> str | None:
    """Returns the reason if a re-cache of the policy replaces the sink."""
    if policy.on_switch.rewrite_sink:
        return (
            "a re-cache that replaces the sink needs a sink that stays at the"
            " start of the range: choose relative or tri-region positions, or"
            " keep the sink"
        )
    return None
