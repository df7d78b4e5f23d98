"""Junctions: which block after a switch is captured, and when it is visible."""

import dataclasses

from anchor_jax.axes import Flag, Number
from anchor_jax.cache.types import NEVER, CacheIndex


@dataclasses.dataclass(frozen=True)
class Junction:
    """The block after a switch, visible once it has left the local window.

    `frames` frames of the clean pass are kept. They are visible from block `c + span`
    on, where `c` is the first block under the new prompt.

    Source: cache/README.md, "Junction", "D3", "D4", "D7"; rules `paper`.
    """

    frames: int = 3
    overlaps_sink = False
    keeps_prior = False
    from_chunk = False
    first_switch = NEVER

    def active(self, index: CacheIndex, start: Number, span: int) -> Flag:
        return index.switch_frame + span <= start

    def prior(self, index: CacheIndex) -> Flag:
        return index.switches < 0

    def recache_start(self, index: CacheIndex, frames: Number, block: int) -> Number:
        """Returns the block start for which a re-cache tests the old junction."""
        del frames
        return index.start - block

    def captures(self, index: CacheIndex, block: int) -> Flag:
        del block
        return index.capture

    def takes_effect(self, requested: Number, start: Number) -> Number:
        """Returns the switch frame that the rule counts from."""
        del requested
        return start

    def released(self) -> "Junction":
        """Returns the junction as the published sampling code has it."""
        return ReleaseJunction(self.frames) if type(self) is Junction else self


@dataclasses.dataclass(frozen=True)
class ReleaseJunction(Junction):
    """The junction of the released code, for weights that were trained with it.

    It counts from the requested switch frame, with a strict comparison. It captures in
    every pass, and shows the prior junction from the third switch on.

    Source: cache/README.md, "Junction"; rules `release`.
    """

    overlaps_sink = True
    keeps_prior = True

    def active(self, index: CacheIndex, start: Number, span: int) -> Flag:
        return index.switch_frame + span < start

    def prior(self, index: CacheIndex) -> Flag:
        return index.switches > 2

    def recache_start(self, index: CacheIndex, frames: Number, block: int) -> Number:
        del block
        return index.start - frames

    def takes_effect(self, requested: Number, start: Number) -> Number:
        del start
        return requested


@dataclasses.dataclass(frozen=True)
class TrainedJunction(ReleaseJunction):
    """The junction of the release's training, without a prior one.

    The clean pass captures it.

    In a chunk with a switch, the first block is captured, wherever the switch is.

    Source: cache/README.md, "D3", "D4", "D7", "D8"; rules `release`.
    """

    keeps_prior = False
    from_chunk = True

    def prior(self, index: CacheIndex) -> Flag:
        return index.switches < 0


@dataclasses.dataclass(frozen=True)
class PeriodicJunction(ReleaseJunction):
    """The junction of the release's single-prompt pipeline.

    It is captured again every `every` blocks.

    Source: cache/README.md, "Single prompt", "D6".
    """

    every: int = 6
    first_switch = 20

    def captures(self, index: CacheIndex, block: int) -> Flag:
        return (index.start // block) % self.every == 0
