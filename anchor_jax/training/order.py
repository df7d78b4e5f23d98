"""The order of examples, a pure function of a position."""

import dataclasses
import functools

import numpy as np

from anchor_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Order:
    """A shuffled order of examples, another one in every epoch.

    The processes read disjoint examples, each `per_epoch` of them; a remainder of
    fewer than `processes` examples is left out of an epoch, others in each. A position
    is all that a checkpoint has to hold.

    Attributes:
      size: examples.
      seed: of the order.
      process: this process, from 0.
      processes: that share the examples.

    Raises:
      UserError: There are fewer examples than processes, or no such process.
    """

    size: int
    seed: int = 0
    process: int = 0
    processes: int = 1

    def __post_init__(self):
        if not 0 <= self.process < self.processes:
            raise UserError(
                f"process={self.process}: expected 0 to {self.processes - 1}"
            )
        if self.size < self.processes:
            raise UserError(
                f"size={self.size}: expected an example or more for each of"
                f" {self.processes} processes; give more data or use fewer processes"
            )
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: expected 0 or more")

    @property
    def per_epoch(self) -> int:
        """The examples of an epoch that this process reads."""
        return self.size // self.processes

    def index(self, position: int) -> int:
        """Returns the number of this process's example at `position`, 0 or more."""
        if position < 0:
            raise ValueError(f"position={position}: expected 0 or more")
        epoch, place = divmod(position, self.per_epoch)
        shuffled = _permutation(self.size, self.seed, epoch)
        return int(shuffled[place * self.processes + self.process])


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)
