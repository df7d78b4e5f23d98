"""Batches that are made ahead of their step, in a thread."""

import threading
from collections.abc import Mapping
from typing import Any

from anchor_jax.training.data.kinds import Batches


class Prefetch:
    """Batches of which the next ones are made while a step runs.

    A call returns the batch of a number, and starts to make those of the numbers after
    it. What a batch holds does not change. An error is raised by the call that asks for
    the batch.
    """

    def __init__(self, batches: Batches, ahead: int):
        """Makes `ahead` batches beforehand; none if it is 0."""
        self.ahead, one_at_a_time = ahead, threading.Lock()

        def make(number: int) -> Mapping[str, Any]:
            # Readers of files need not be safe for threads.
            with one_at_a_time:
                return batches(number)

        self.batches = make
        self._made: dict[int, _Promise] = {}

    def __call__(self, number: int) -> Mapping[str, Any]:
        """Returns the batch of a number."""
        wanted = range(number, number + self.ahead + 1)
        # After a resume or a skipped batch, others may be left over.
        self._made = {n: one for n, one in self._made.items() if n in wanted}
        found = self._made.pop(number, None) or _Promise(self.batches, number)
        for later in wanted[1:]:
            if later not in self._made:
                self._made[later] = _Promise(self.batches, later)
                self._made[later].start()
        return found.result()


class _Promise:
    """A batch that a thread makes, or the caller if no thread was started."""

    def __init__(self, batches: Batches, number: int):
        self._batches, self._number = batches, number
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        # A daemon, so that a stop does not wait for a batch that nobody will use.
        self._thread = threading.Thread(target=self._make, daemon=True)
        self._thread.start()

    def result(self) -> Mapping[str, Any]:
        if self._thread is None:
            self._make()
        else:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result

    def _make(self) -> None:
        try:
            self._result = self._batches(self._number)
        except BaseException as error:  # noqa: BLE001 - the caller raises it.
            self._error = error
