"""Watches the other processes of a job, and agrees with them on the step to stop at.

The processes write short texts into the store of jax's coordinator. A thread reads all
of them twice a second:

* `stop/I`: the signal that process I received. Every process then behaves as if it had
  received the signal itself.
* `at/I`: the step that process I had started when it learned of the request. It starts
  no other step until all have written theirs. All stop before the step after the
  largest one, which no process has started.
* `end/I`: the exit status of process I, and the reason of a failure. A failure ends the
  others, which would wait for process I without end.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from anchor_jax import interrupts

BEFORE, AFTER = -1, 2**62
"""Steps of processes that have not reached the training loop, or have left it."""
AGREEING = 20.0
"""Seconds to agree on a step; after that, processes stop without a checkpoint."""
FOLLOWING = 3.0
"""Seconds that a process may take to end by itself after another one has ended."""

_STORE = "anchor/now/"
_POLLS = (0.5, 0.1)  # seconds between reads, before and after a request
_LONGEST = 2000  # characters of a reason


class Peers:
    """The other processes of a job, as one process sees them."""

    def __init__(
        self,
        client: Any,
        index: int,
        count: int,
        end: Callable[[int, int, str], None],
    ):
        """Initializes; `start` starts the thread.

        Args:
          client: client of jax's coordinator.
          index: number of this process.
          count: number of processes.
          end: called with the number, exit status and reason of a process that has
            failed, to end this process.
        """
        self.client, self.index, self.count = client, index, count
        self.end = end
        self.found: dict[str, str] = {}
        self._steps = threading.Condition()
        self._at, self._target = BEFORE, None
        self._frozen: float | None = None
        self._failed: float | None = None
        self._is_closing = False
        self._has_stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        """Starts the thread, and passes requests of this process on to the others."""
        interrupts.on_request.append(self.pass_on)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; the other processes are not watched any more."""
        interrupts.on_request.remove(self.pass_on)
        self._has_stopped.set()
        self._thread.join()

    def pass_on(self, number: int) -> None:
        """Tells the others that this process received a signal."""
        self._write(f"stop/{self.index}", str(number))

    def may_start(self, step: int) -> bool:
        """Returns whether a step may start, and False at the agreed step.

        All processes call it before each step, with the same numbers.
        """
        with self._steps:
            while self._frozen is not None and self._target is None:
                self._steps.wait(_POLLS[1])
                self._give_up()
            if self._target is not None and step >= self._target:
                return False
            self._at = step
            return True

    def is_agreed(self) -> bool:
        """Returns whether all processes stop at the same step, and so may save it."""
        with self._steps:
            return self._target is None or self._target > BEFORE

    def leave_steps(self) -> None:
        """Declares that this process starts no more steps."""
        with self._steps:
            if self._frozen is None:
                self._at = AFTER

    def close(self) -> None:
        """Declares that this process ends by itself, and follows no other."""
        self._is_closing = True

    def write_end(self, status: int, reason: str = "") -> None:
        """Tells the others that this process ends."""
        self.close()
        self._write(
            f"end/{self.index}",
            json.dumps({"status": status, "reason": reason[:_LONGEST]}),
        )

    def ends(self) -> dict[int, dict[str, Any]]:
        """Returns status and reason of the processes that have ended, by number."""
        return {
            int(name.partition("/")[2]): json.loads(text)
            for name, text in self.found.items()
            if name.startswith("end/")
        }

    def look(self) -> None:
        """Reads what the processes have written, and acts on it."""
        entries = self.client.key_value_dir_get(_STORE)
        self.found = {name.removeprefix(_STORE): text for name, text in entries}
        for name, text in self.found.items():
            if name.startswith("stop/"):
                interrupts.request(int(text))
        if interrupts.stop_requested():
            self._freeze()
            self._agree()
        self._follow()

    def _watch(self) -> None:
        while not self._has_stopped.wait(_POLLS[interrupts.stop_requested()]):
            # Without its coordinator jax ends the process.
            with contextlib.suppress(Exception):
                self.look()

    def _write(self, name: str, text: str) -> None:
        # The store refuses a second value, and fails without the coordinator.
        with contextlib.suppress(Exception):
            self.client.key_value_set(_STORE + name, text)

    def _freeze(self) -> None:
        """Starts no more steps, and tells the others the last one."""
        with self._steps:
            is_new = self._frozen is None
            self._frozen = self._frozen or time.monotonic()
            at = self._at
        if is_new:
            self._write(f"at/{self.index}", str(at))

    def _agree(self) -> None:
        """Sets the step to stop at as soon as all have written theirs."""
        steps = [int(x) for name, x in self.found.items() if name.startswith("at/")]
        with self._steps:
            if self._target is None and len(steps) == self.count:
                # A process outside the loop makes no more steps, and cannot save.
                self._target = BEFORE if BEFORE in steps else max(steps) + 1
            self._give_up()
            self._steps.notify_all()

    def _give_up(self) -> None:
        if self._target is None and time.monotonic() > self._frozen + AGREEING:
            self._target = BEFORE

    def _follow(self) -> None:
        """Ends this process if another one has failed and this one does not end."""
        failed = {
            index: one
            for index, one in self.ends().items()
            if one["status"] and index != self.index
        }
        if not failed or self._is_closing:
            return
        self._failed = self._failed or time.monotonic()
        if time.monotonic() > self._failed + FOLLOWING:
            index, one = min(failed.items())
            self.end(index, one["status"], one["reason"])
