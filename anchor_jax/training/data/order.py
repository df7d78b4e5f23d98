"""The order of examples and each process's share of them: pure functions."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from anchor_jax.errors import UserError

SHARED = ("position", "requested")
"""Names of arrays that a batch holds once, not per video."""


@dataclasses.dataclass(frozen=True)
class Order:
    """A shuffled order of examples, different in every epoch.

    A checkpoint has to store only a position.

    Attributes:
      size: number of examples.
      seed: seed of the order.

    Raises:
      UserError: There are no examples, or the seed is negative.
    """

    size: int
    seed: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"size={self.size}: must be at least 1 example")
        if self.seed < 0:
            raise UserError(f"config.data.seed={self.seed}: must be at least 0")

    def index(self, position: int) -> int:
        """Returns the number of the example at `position`, which is at least 0."""
        if position < 0:
            raise ValueError(f"position={position}: must be at least 0")
        epoch, place = divmod(position, self.size)
        return int(_permutation(self.size, self.seed, epoch)[place])


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of every batch that this process makes.

    The content of a batch does not depend on the number of processes that share it.

    Attributes:
      size: number of videos in a batch.
      rows: row numbers of this process's videos, in order.
    """

    size: int
    rows: np.ndarray

    @classmethod
    def whole(cls, size: int) -> "Share":
        """Returns the share of the only process."""
        return cls(size, np.arange(size))

    def places(self, number: int) -> list[int]:
        """Returns the positions of this process's examples of batch `number`."""
        return [number * self.size + int(row) for row in self.rows]

    def of(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns this process's rows of a whole batch."""
        return {
            name: value if name in SHARED else value[self.rows]
            for name, value in batch.items()
        }


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)
