"""Computes where blocks start and where prompt switches take effect."""

import dataclasses
from collections.abc import Sequence

from anchor_jax.cache.policies import Policy
from anchor_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Clock:
    """The next block's first latent frame, and the frame of the last restart."""

    frame: int = 0
    origin: int = 0

    @property
    def local(self) -> int:
        return self.frame - self.origin

    def is_restart(self, policy: Policy) -> bool:
        return policy.restart is not None and self.local >= policy.restart.every

    def restarted(self, policy: Policy) -> "Clock":
        return Clock(self.frame, self.frame - policy.restart.overlap)

    def advanced(self, policy: Policy) -> "Clock":
        return Clock(self.frame + policy.block, self.origin)


def landings(requested: Sequence[int], block: int) -> tuple[int, ...]:
    """Returns the frames at which switches take effect: at most one per block."""
    landed, free = [], 0
    for frame in requested:
        free = max(free, -(-frame // block) * block)
        landed.append(free)
        free += block
    return tuple(landed)


def check_restart(policy: Policy) -> None:
    """Raises UserError unless a policy's restart fits its blocks and its window."""
    restart = policy.restart
    if restart is None:
        return
    overlap, block = restart.overlap, policy.block
    if overlap < block or overlap % block or overlap > policy.window:
        raise UserError(
            f"restart overlap={overlap} must be a multiple of block={block}, at most"
            f" window={policy.window}; choose {block}"
        )
