"""The order of examples, and which of them a process reads: pure functions."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from anchor_jax.errors import UserError

SHARED = ("position", "requested")
"""What a batch holds once, not video by video."""


@dataclasses.dataclass(frozen=True)
class Order:
    """A shuffled order of examples, another one in every epoch.

    A position is all that a checkpoint has to hold.

    Attributes:
      size: examples.
      seed: of the order.

    Raises:
      UserError: There are no examples, or the seed is negative.
    """

    size: int
    seed: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise UserError(f"size={self.size}: expected an example or more")
        if self.seed < 0:
            raise UserError(f"config.data.seed={self.seed}: expected 0 or more")

    def index(self, position: int) -> int:
        """Returns the number of the example at `position`, 0 or more."""
        if position < 0:
            raise ValueError(f"position={position}: expected 0 or more")
        epoch, place = divmod(position, self.size)
        return int(_permutation(self.size, self.seed, epoch)[place])


@dataclasses.dataclass(frozen=True)
class Share:
    """The videos of every batch that this process makes.

    What a batch holds does not depend on how many processes share it.

    Attributes:
      size: videos of a batch.
      rows: numbers of this process's, in order.
    """

    size: int
    rows: np.ndarray

    @classmethod
    def whole(cls, size: int) -> "Share":
        """Returns the share of a process that is alone."""
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
