"""Shares of a large job: processes that write into one folder, each without the others.

    with shares.working(lease, "--out") as share:     # all processes, at the start
        for number in share.of(numbers): ...
        share.await_others(tell_progress)

Process i of n does the items i, i + n, i + 2n, ... A process that is slow or lost
disturbs no other one. A request to stop reaches all of them through a file in the
folder. For one process there is nothing to wait for.
"""

import contextlib
import pathlib
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from anchor_jax import interrupts, io, ownership, places, processes
from anchor_jax.errors import UserError, some

START = 3600.0
"""Seconds that a process may take to load and check its inputs after the first one."""

_POLL = 1.0  # seconds
SEEN_BY = 15.0  # seconds until a new file is seen on a shared disk
_STOP = ".stop-"
_WAITS = "waits-"  # start of the seat of a process that has done its share


def check_shared(
    folder: io.Place, name: str, seconds: float = processes.PATIENCE
) -> None:
    """Checks that all processes of a job see the same folder.

    Args:
      folder: the folder, which exists.
      name: the flag or field that gives it, for the message.
      seconds: time to wait for the others.

    Raises:
      UserError: A process sees another folder of that name, on a disk of its own.
      processes.Missing: Another process did not come.
    """
    if processes.count() == 1:
        return
    file = folder / processes.share(f".shared-{secrets.token_hex(6)}", seconds)
    if processes.is_first():
        io.write_text(file, "")
    processes.barrier(file.name)
    deadline = time.monotonic() + SEEN_BY
    while not places.exists(file) and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = processes.gather(places.exists(file))
    if processes.is_first():
        io.remove(file)
    blind = [processes.name(one) for one, sees in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"{name}={str(folder)!r}: {', '.join(some(blind))} cannot see the files"
            " that process 0 writes there; choose a folder on a disk that all hosts"
            " share"
        )


def agree(facts: Mapping[str, Any]) -> None:
    """Checks that all processes have read the same inputs.

    Args:
      facts: JSON values by name, such as hashes of files.

    Raises:
      UserError: Values differ; each is named with the processes that have it.
      processes.Missing: Another process did not come.
    """
    processes.barrier("the others have not read their inputs", START)
    processes.agree(facts)


class Unfinished(Exception):
    """Items are missing, because a process of the job was lost or has failed."""


class Share:
    """What this process does of a job.

    Attributes:
      index: number of this process.
      count: number of processes.
    """

    def __init__(self, lease: ownership.Lease):
        """Initializes; the lease is this process's place in the job's folder."""
        self.index, self.count = 0, 1
        if processes.is_joined():
            self.index, self.count = processes.index(), processes.count()
        self._lease, self._others = lease, lease.others
        self._rest: ownership.Lease | None = None

    def of(self, numbers: Sequence[int]) -> list[int]:
        """Returns the numbers of items that this process does."""
        return [one for one in numbers if one % self.count == self.index]

    def await_others(self, tick: Callable[[int], None]) -> None:
        """Ends this process's work, and waits until all others work no more.

        The folder stays this job's until `leave`. A process that waits is not awaited.

        Args:
          tick: called about once a second with the number of the others.

        Raises:
          UserError: Another job has taken the folder over.
        """
        if self.count == 1:
            return
        self._rest = self._lease.with_seats(f"{_WAITS}{self.index}")
        self._lease.release()
        while living := self._working():
            tick(len(living))
            # Each reads the files of all others.
            _pause(max(_POLL, len(living) / 16))

    def is_last(self) -> bool:
        """Returns whether no other process works in the folder."""
        return self.count == 1 or not self._working()

    def leave(self) -> None:
        """Gives the folder up, after what is written at the end."""
        if self._rest is not None:
            self._rest.release()

    def _working(self) -> list[str]:
        """Returns the seats of the others that live and still do their share."""
        living = self._others.living()
        return [one for one in living if not one.startswith(_WAITS)]


def _pause(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        interrupts.check()
        time.sleep(0.05)


@contextlib.contextmanager
def working(lease: ownership.Lease, name: str) -> Iterator[Share]:
    """Yields this process's share when all processes are ready to start.

    Args:
      lease: this process's place in the job's folder.
      name: the flag or field that gives the folder, for messages.

    Raises:
      UserError: A process sees another folder, on a disk of its own.
      processes.Missing: Another process did not come.
    """
    share = Share(lease)
    if share.count == 1:
        yield share
        return
    check_shared(lease.folder, name, START)
    for old in lease.folder.glob(f"{_STOP}*"):
        io.remove(old)
    processes.part(START)
    with _passing_requests(lease.folder / f"{_STOP}{processes.key()}"):
        try:
            yield share
        finally:
            if share.is_last():
                io.remove(lease.folder / f"{_STOP}{processes.key()}")
            share.leave()


@contextlib.contextmanager
def _passing_requests(file: pathlib.Path) -> Iterator[None]:
    """Passes requests to stop on to the other processes, and takes theirs."""
    has_ended = threading.Event()

    def pass_on(number: int) -> None:
        with contextlib.suppress(OSError):
            file.write_text(str(int(number)))

    def watch() -> None:
        while not has_ended.wait(_POLL):
            # A file that another process is just writing is empty.
            with contextlib.suppress(OSError, ValueError):
                interrupts.request(int(file.read_text()))
                return

    interrupts.on_request.append(pass_on)
    if interrupts.stop_requested():  # Perhaps it was not passed on before.
        is_again = interrupts.status() == interrupts.AGAIN
        pass_on(signal.SIGTERM if is_again else signal.SIGINT)
    threading.Thread(target=watch, name="requests", daemon=True).start()
    try:
        yield
    finally:
        has_ended.set()
        interrupts.on_request.remove(pass_on)


def unfinished(missing: Sequence[int], total: int, what: str) -> Unfinished:
    """Returns the error for missing items, which names the processes to blame.

    Args:
      missing: numbers of the missing items.
      total: number of all items.
      what: name of several items.
    """
    lost = sorted({number % processes.count() for number in missing})
    names = ", ".join(some([processes.name(one) for one in lost]))
    return Unfinished(
        f"{len(missing)} of {total} {what} are missing, because of {names}; start all"
        " processes again with the same command to make them"
    )
