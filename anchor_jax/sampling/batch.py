"""Divides the videos of a command among the processes of a job, and lists them."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anchor_jax import ownership, processes, shares
from anchor_jax.errors import UserError
from anchor_jax.sampling import overwriting
from anchor_jax.sampling.manifest import Manifest
from anchor_jax.sampling.tasks import MADE_BY, Targets, VideoTasks, own_folder
from anchor_jax.streaming.recipe import describe

_QUIET = 10.0  # least seconds between two lines about the others
_SHARE = 20  # a line may take this fraction of the time

Tell = Callable[[str], None]


def work_on(
    tasks: VideoTasks,
    todo: Sequence[int],
    lease: ownership.Lease,
    work: Callable[[Sequence[int], Callable[[], None]], None],
    tell: Tell,
) -> None:
    """Makes this process's share of the videos, and waits for the other processes.

    Args:
      tasks: the videos.
      todo: numbers of those to make, the same in all processes.
      lease: this process's place in the folder.
      work: called with this process's numbers, and with a function that it calls after
        each video.
      tell: called with lines for the user.

    Raises:
      shares.Unfinished: Another process was lost or has failed, and its videos are
        missing.
    """
    targets = Targets(tasks, todo)
    with (
        shares.working(lease, "--out") as share,
        _manifest(tasks, targets, todo),
    ):
        progress = _Progress(len(tasks), targets, tell)
        work(share.of(todo), progress.show)
        share.await_others(progress.wait)
        absent = targets.missing() if share.count > 1 else []
        if absent:
            raise shares.unfinished(absent, len(tasks), "videos")


def agree(tasks: VideoTasks) -> None:
    """Checks that all processes of a job have read the same inputs.

    Raises:
      UserError: Prompts or weights differ.
    """
    if not processes.is_joined():
        return
    prompts = hashlib.sha256(tasks.negative.encode())
    for number, script in enumerate(tasks.scripts.all):
        about = [describe(script), tasks.seed(number)]
        prompts.update(json.dumps(about, sort_keys=True).encode())
    shares.agree(
        {
            "hash of the prompts": prompts.hexdigest(),
            "hash of the weights": tasks.bundle.digest,
        }
    )


Choice = tuple[list[int], list[int]]
"""Numbers of the videos to make, and of the finished ones."""


def agree_on_missing(choose: Callable[[], Choice]) -> Choice:
    """Returns a choice for which all processes find as many videos to make.

    Args:
      choose: looks into the folder. On a network disk a new file may appear late, so it
        is called again for a while.

    Raises:
      UserError: They differ, because the processes see different folders.
    """
    deadline = time.monotonic() + shares.SEEN_BY
    while True:
        found = choose()
        counts = processes.gather(len(found[0]))
        if len(set(counts)) == 1:
            return found
        if processes.share(time.monotonic() > deadline):
            name = "videos that --out, a folder of all hosts, lacks"
            shares.agree({name: len(found[0])})
        time.sleep(1)


def keep_manifest(tasks: VideoTasks, tell: Tell) -> None:
    """Writes the manifest of videos that all exist, if it is out of date.

    It may be, because a process that was killed could not write it.
    """
    if not has_manifest(tasks) or not processes.is_printing():
        return
    manifest = Manifest(tasks)
    if manifest.is_written():
        return
    try:
        with own_folder(tasks.folder, tell):
            manifest.write()
    except UserError as error:
        tell(f"warning: {error}")


def made_by() -> dict[str, Any]:
    """Returns an entry of a recipe: which process of a job makes the video."""
    if not processes.is_joined():
        return {}
    number = processes.index()
    host = processes.hosts()[number]
    place = {"process": number, "processes": processes.count(), "host": host}
    return {MADE_BY: place | {overwriting.START: processes.key()}}


def has_manifest(tasks: VideoTasks) -> bool:
    """Returns whether the videos are a batch, from a file or by several processes."""
    return tasks.scripts.file is not None or processes.is_joined()


@contextlib.contextmanager
def _manifest(
    tasks: VideoTasks, targets: Targets, todo: Sequence[int]
) -> Iterator[None]:
    """Writes the manifest before and after the work, also if that fails.

    The first process does it, and others if the first has not done its share.
    """
    if not has_manifest(tasks):
        yield
        return
    if processes.is_printing():
        manifest = Manifest(tasks)
        manifest.write()
        try:
            yield
        finally:
            manifest.update(todo)
            manifest.write()
        return
    try:
        yield
    except shares.Unfinished:
        if any(number % processes.count() == 0 for number in targets.missing()):
            Manifest(tasks).write()
        raise


class _Progress:
    """Lines about the progress of all processes of a job."""

    def __init__(self, total: int, targets: Targets, tell: Tell):
        self._total, self._targets, self._tell = total, targets, tell
        self._next, self._last = 0.0, ""

    def show(self) -> None:
        """Says how many videos are finished, unless it has just been said."""
        self._say("")

    def wait(self, others: int) -> None:
        """Says the same while this process has nothing left to do."""
        name = "another process" if others == 1 else f"{others} other processes"
        self._say(f"; waiting for {name}")

    def _say(self, end: str) -> None:
        began = time.monotonic()
        if processes.count() == 1 or not processes.is_printing() or began < self._next:
            return
        finished = self._total - len(self._targets.missing())
        line = f"{finished} of {self._total} videos are finished{end}"
        if line != self._last:
            self._tell(line)
        now = time.monotonic()
        self._last, self._next = line, now + max(_QUIET, _SHARE * (now - began))
