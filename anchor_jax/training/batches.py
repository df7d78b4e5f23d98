"""The order of examples, and batches read ahead: pure functions of a position."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

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


class Batches:
    """Batches of a source in an order; the next one is read while one is used.

    One thread does all the reading, so a source need not be safe for several.
    """

    def __init__(self, source: Sequence[Mapping[str, Any]], order: Order, batch: int):
        """Reads nothing yet.

        Args:
          source: examples by number, each a dict of arrays, numbers and text.
          order: which of them, when.
          batch: examples in a batch of this process.

        Raises:
          UserError: The batch is empty, or the order is of another number of examples.
        """
        if batch < 1:
            raise UserError(f"batch={batch}: expected 1 or more")
        if len(source) != order.size:
            raise UserError(
                f"order.size={order.size}: the source has {len(source)} examples"
            )
        self._source, self._order, self._batch = source, order, batch
        self._thread = futures.ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[int, futures.Future] | None = None

    def at(self, position: int) -> dict[str, Any]:
        """Returns the batch that starts at a position, and begins to read the next.

        Arrays and numbers are stacked along a first axis, text becomes a list. What
        fails while reading ahead is raised by the call that asks for that batch.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == position:
            reading = ahead[1]
        else:
            if ahead is not None:
                ahead[1].cancel()
            reading = self._thread.submit(self._read, position)
        batch = reading.result()
        following = self.after(position)
        self._ahead = following, self._thread.submit(self._read, following)
        return batch

    def after(self, position: int) -> int:
        """Returns the position of the batch after the one at `position`."""
        return position + self._batch

    def close(self) -> None:
        """Ends the thread, after the batch that it reads."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, position: int) -> dict[str, Any]:
        numbers = range(position, position + self._batch)
        return _stacked([self._source[self._order.index(at)] for at in numbers])


def _stacked(examples: list[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: _column([example[name] for example in examples]) for name in examples[0]
    }


def _column(values: list[Any]) -> Any:
    return values if isinstance(values[0], str | list) else np.stack(values)
