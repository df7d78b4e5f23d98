"""Ensures that only one job at a time, of one or several processes, writes to a folder.

The lease is a subfolder `.owner`. It has one file per process of the job, and a thread
updates a counter in that file every few seconds. The subfolder is renamed into place as
a whole. The rename fails if another lease exists, so that exactly one job succeeds.
Files of dead processes are removed first. File names are unique, so two jobs that take
over at the same time cannot remove each other's files.

Buckets have no such rename. There each process writes its object first, and then lists
all objects; if it sees a rival it withdraws and tries again. Buckets list an object as
soon as it is written, so of two rivals at least one sees the other, and never do both
stay. Heartbeats are objects of their own: a late one cannot bring back a member that
was removed.
"""

import atexit
import contextlib
import dataclasses
import datetime
import errno
import hashlib
import itertools
import json
import os
import pathlib
import random
import shlex
import socket
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from anchor_jax import io, places, remote
from anchor_jax.errors import UserError
from anchor_jax.pids import began as _began
from anchor_jax.pids import where as _where

BEAT, LEASE = 3.0, 30.0
"""Heartbeat interval, and seconds without a heartbeat after which an owner is dead."""

BUCKET_BEAT, BUCKET_LEASE = 10.0, 90.0
"""The same in a bucket, where each heartbeat is a request that may be tried again."""

REMEDY = "wait until it ends, stop it, or choose another folder"

_NAME = ".owner"
_MEMBER, _BEATS = ".json", ".beat"
_MOST = 65536  # bytes of a member's file
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_MOVED_IN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)

_held: dict["_Claim", "_Hold"] = {}
_lock = threading.RLock()
_numbers = itertools.count()


class Lease:
    """The right to write into a folder; use it as a context manager, or release it."""

    def __init__(self, hold: "_Hold"):
        self._hold = hold
        hold.count += 1
        self._end = weakref.finalize(self, _let_go, hold)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *error) -> None:
        self.release()

    def release(self) -> None:
        """Gives up the right to write into the folder."""
        self._end()

    def check(self) -> None:
        """Raises UserError if another job has taken the folder over."""
        self._hold.check()

    def with_seats(self, *seats: str) -> "Lease":
        """Returns another lease of the same job on the folder, with other seats."""
        return own(self.folder, self._hold.claim.job, seats)

    @property
    def folder(self) -> pathlib.Path:
        """The folder."""
        return self._hold.claim.folder

    @property
    def others(self) -> "Others":
        """The other processes of the job that own the folder now or later."""
        return Others(self._hold.claim, self._hold.id)


class Others:
    """The other processes of a job that own a folder, observed by their heartbeats."""

    def __init__(self, claim: "_Claim", own: str):
        self._claim, self._own, self._watch = claim, own, _Watch(claim.lease)

    def living(self) -> list[str]:
        """Returns the seats of those that live.

        A process whose heartbeat stays away for `LEASE` seconds does not live, even if
        this machine has such a process: it hangs, or was suspended.
        """
        return [
            seat
            for one in _members(self._claim.place)
            if one.id != self._own and one.facts.get("job") == self._claim.job
            if one.is_alive() is not False and self._watch.beats(one) is not False
            for seat in one.facts["seats"]
        ]


def own(
    folder: str | os.PathLike,
    job: str = "",
    seats: Sequence[str] = ("",),
    patience: float = 0.0,
    tell: Callable[[str], None] = lambda line: None,
    remedy: str = REMEDY,
) -> Lease:
    """Returns a lease on a folder, which is made if it does not exist.

    Temporary files of dead owners are removed. A process may own a folder several
    times, for the same job and seats.

    Args:
      folder: the folder to write into.
      job: identifier of the job. Processes with the same job share the folder.
      seats: parts of the job that only this process may do.
      patience: seconds to wait for a living owner.
      tell: a function that prints a line before an owner's heartbeat is awaited.
      remedy: the end of the message: what the user can do.

    Raises:
      UserError: Another job owns the folder, or the folder is not writable.
    """
    folder = io.resolved(folder)
    claim = _Claim(folder / _NAME, folder, job, tuple(seats))
    return _take(claim, patience, tell, remedy)


def own_target(
    path: str | os.PathLike,
    patience: float = 0.0,
    tell: Callable[[str], None] = lambda line: None,
) -> Lease:
    """Returns a lease on a folder that will be created under its name when complete.

    The lease is beside the folder. Otherwise it is like `own`.

    Raises:
      UserError: Another process makes the folder, or it cannot be made.
    """
    path = io.resolved(path)
    if not path.name:
        raise UserError(f"{path} cannot be created; choose a folder below it")
    claim = _Claim(path.with_name(f".{path.name}{_NAME}"), path)
    return _take(claim, patience, tell, REMEDY)


def job_id(*about: Any) -> str:
    """Returns an identifier of a job for `own`: a hash of JSON values."""
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def check(path: str | os.PathLike) -> None:
    """Raises UserError if this process owned the folder of `path` and lost it."""
    if not places.is_remote(path):
        path = pathlib.Path(path)
        path = path.parent.resolve() / path.name
    for hold in list(_held.values()):
        if places.is_within(path, hold.claim.folder):
            hold.check()


def release_all() -> None:
    """Releases every folder that this process owns."""
    for hold in list(_held.values()):
        hold.leave()


@dataclasses.dataclass(frozen=True)
class _Claim:
    """A request for a lease: its place, the folder, the job and its seats."""

    place: io.Place
    folder: io.Place
    job: str = ""
    seats: tuple[str, ...] = ("",)

    @property
    def is_remote(self) -> bool:
        return places.is_remote(self.place)

    @property
    def lease(self) -> float:
        """Seconds without a heartbeat after which an owner is dead."""
        return BUCKET_LEASE if self.is_remote else LEASE


@dataclasses.dataclass(frozen=True)
class _Member:
    """A process of the job that owns a folder, as described by its file.

    Attributes:
      path: its file.
      content: the content of the file, with the heartbeat unless it is in a bucket.
      beat: the heartbeat in a bucket.
    """

    path: io.Place
    content: bytes
    beat: bytes = b""

    @property
    def id(self) -> str:
        return self.path.stem

    @property
    def facts(self) -> dict[str, Any]:
        try:
            found = json.loads(self.content)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def rivals(self, claim: _Claim) -> bool:
        """Returns whether this process and a claim cannot both own the folder."""
        seats = self.facts.get("seats")
        if self.facts.get("job") != claim.job or not isinstance(seats, list):
            return True
        return any(seat in claim.seats for seat in seats)

    def is_alive(self) -> bool | None:
        """Returns whether the process lives, or None if this machine cannot tell."""
        pid, where = self.facts.get("pid"), self.facts.get("where")
        if where is None or where != _where() or type(pid) is not int or pid < 1:
            return None
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        began = _began(pid)
        return None if began is None else began == self.facts.get("began")

    def __str__(self) -> str:
        known = {name: _short(value) for name, value in self.facts.items()}
        if not {"pid", "host", "since", "command"} <= known.keys():
            return f"another process ({self.path})"
        return (
            f"process {known['pid']} on host {known['host']} since {known['since']}"
            f" ({known['command']})"
        )


@dataclasses.dataclass(eq=False)
class _Hold:
    """A folder that this process owns."""

    claim: _Claim
    count: int = 0
    beats: int = 0
    pid: int = dataclasses.field(default_factory=os.getpid)

    def __post_init__(self):
        self.id = f"{io.process_id()}-{next(_numbers)}"
        self.facts = _about_this_process() | {
            "job": self.claim.job,
            "seats": self.claim.seats,
        }

    @property
    def file(self) -> pathlib.Path:
        return self.claim.place / f"{self.id}{_MEMBER}"

    def content(self) -> bytes:
        """Returns the content of the file; its length is constant."""
        return json.dumps({**self.facts, "beat": f"{self.beats:012d}"}).encode()

    def beat(self) -> None:
        """Writes a heartbeat."""
        self.beats += 1
        # A file that was removed must not be created again.
        with contextlib.suppress(OSError), self.file.open("r+b") as file:
            file.write(self.content())

    def check(self) -> None:
        try:
            self._open()
        except OSError as error:
            if error.errno not in _GONE:
                return
            others = [str(one) for one in _members(self.claim.place)]
            by = f" by {others[0]}" if others else ""
            raise UserError(
                f"{self.claim.folder} was taken over{by}: this process had written no"
                f" heartbeat for {self.claim.lease:g} s, or its lease was removed; it"
                " will write nothing more"
            ) from error

    def _open(self) -> None:
        """Raises OSError if the file of this process was removed."""
        # On a network file system, unlike stat, opening a file asks the server.
        os.close(os.open(self.file, os.O_RDONLY))

    def leave(self) -> None:
        if self.pid != os.getpid():
            return
        with contextlib.suppress(OSError):
            self.file.unlink()
        with contextlib.suppress(OSError):
            self.claim.place.rmdir()

    def enter(self, living: Sequence[_Member]) -> bool:
        """Tries to take the lease, possibly beside members of the same job."""
        place = self.claim.place
        with io.unfinished(io.temporary_name(place)) as staged:
            staged.mkdir(parents=True)
            (staged / self.file.name).write_bytes(self.content())
            try:
                if not living:
                    with contextlib.suppress(OSError):
                        place.rmdir()
                    staged.rename(place)
                    return True
                (staged / self.file.name).rename(self.file)
            except OSError as error:
                if error.errno not in _MOVED_IN:
                    raise
                return False
        others = [one for one in _members(place) if one.id != self.id]
        if any(one.rivals(self.claim) for one in others):
            self.leave()
            return False
        return True


class _BucketHold(_Hold):
    """A folder of a bucket that this process owns."""

    def __post_init__(self):
        super().__post_init__()
        self._has_left, self._beating = False, threading.Lock()

    def beat(self) -> None:
        """Writes a heartbeat, beside the file that it must not bring back."""
        self.beats += 1
        # A bucket may be out of reach for a while.
        with self._beating, contextlib.suppress(Exception):
            if not self._has_left:
                _beat_of(self.file).write_bytes(f"{self.beats:012d}".encode())

    def _open(self) -> None:
        """Raises FileNotFoundError if the object of this process was removed."""
        is_there = True
        # Only an answer counts: a bucket may be out of reach for a while.
        with contextlib.suppress(UserError):
            is_there = places.is_file(self.file)
        if not is_there:
            raise FileNotFoundError(errno.ENOENT, "removed", str(self.file))

    def leave(self) -> None:
        if self.pid != os.getpid():
            return
        self._has_left = True
        # A heartbeat that is on its way would bring its object back.
        is_idle = self._beating.acquire(timeout=BUCKET_BEAT)
        for path in (self.file, _beat_of(self.file)):
            with contextlib.suppress(Exception):
                path.unlink(missing_ok=True)
        if is_idle:
            self._beating.release()

    def enter(self, living: Sequence[_Member]) -> bool:
        """Writes this process's object; withdraws it if a rival has one, too."""
        del living
        self.file.write_bytes(self.content())
        others = [one for one in _members(self.claim.place) if one.id != self.id]
        if any(one.rivals(self.claim) for one in others):
            self.leave()
            return False
        self.beat()
        return True


def _beat_of(file: io.Place) -> io.Place:
    """Returns the object with the heartbeats of a member of a bucket's lease."""
    return file.with_suffix(_BEATS)


class _Watch:
    """Observes owners' heartbeats with this machine's own clock.

    Attributes:
      lease: seconds without a heartbeat after which an owner is dead.
    """

    def __init__(self, lease: float):
        self.lease = lease
        self._seen: dict[str, tuple[tuple[bytes, bytes], float, bool]] = {}

    def is_alive(self, member: _Member) -> bool | None:
        """Returns whether a process lives, or None while it is unknown."""
        known = member.is_alive()
        return self.beats(member) if known is None else known

    def beats(self, member: _Member) -> bool | None:
        """Returns whether a process writes heartbeats, or None while it is unknown."""
        now = time.monotonic()
        shown = member.content, member.beat
        before, since, moved = self._seen.get(member.id, (shown, now, False))
        if before != shown:
            since, moved = now, True
        self._seen[member.id] = shown, since, moved
        if now - since >= self.lease:
            return False
        return moved or None


def _take(claim: _Claim, patience: float, tell, remedy: str) -> Lease:
    """Waits for a claim to succeed and returns its lease."""
    with _lock:
        if claim in _held:
            return Lease(_held[claim])
    with io.explained(claim.folder):
        hold = _claim(claim, patience, tell, remedy)
    with _lock:
        _held[claim] = hold
        _begin_to_beat(claim.is_remote)
        return Lease(hold)


def _claim(claim: _Claim, patience: float, tell, remedy: str) -> _Hold:
    """Takes the lease, or raises UserError if another job has it."""
    watch, began = _Watch(claim.lease), time.monotonic()
    while True:
        places.make_folder(claim.place.parent)
        fates = {one: watch.is_alive(one) for one in _members(claim.place)}
        for one in [one for one, alive in fates.items() if alive is False]:
            _bury(claim, one)
            del fates[one]
        rivals = [one for one in fates if one.rivals(claim)]
        if not rivals:
            hold = _BucketHold(claim) if claim.is_remote else _Hold(claim)
            if hold.enter(list(fates)):
                return hold
        sure = next((one for one in rivals if fates[one]), None)
        if sure and time.monotonic() - began >= patience:
            raise UserError(f"{claim.folder} is in use by {sure}; {remedy}")
        if rivals and not sure and tell:
            tell(
                f"{claim.folder}: waiting up to {claim.lease:g} s for a heartbeat of"
                f" {rivals[0]}"
            )
            tell = None
        time.sleep(random.uniform(0.01, BEAT / 10))


def _members(place: io.Place) -> list[_Member]:
    """Returns the processes that own a folder."""
    if places.is_remote(place):
        return list(_bucket_members(place))
    found = []
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(place).st_mode):
            raise UserError(f"{place} must be a folder; remove it")
        for path in sorted(place.iterdir()):
            if path.is_dir():
                raise UserError(f"{path} must be a file, but is a folder; remove it")
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                found.append(_Member(path, file.read(_MOST)))
    return found


def _bucket_members(place: io.Place) -> Iterator[_Member]:
    """Yields the processes that own a folder of a bucket."""
    with remote.explained(place):
        names = [one.name for one in place.iterdir()] if places.is_dir(place) else []
        for name in sorted(names):
            path = place / name
            # It may leave meanwhile, or not have written a heartbeat yet.
            with contextlib.suppress(FileNotFoundError):
                if path.suffix == _MEMBER:
                    content, beat = path.read_bytes()[:_MOST], b""
                    with contextlib.suppress(FileNotFoundError):
                        beat = _beat_of(path).read_bytes()[:_MOST]
                    yield _Member(path, content, beat)


def _bury(claim: _Claim, dead: _Member) -> None:
    """Removes a dead owner's temporary files, then its file in the lease.

    The temporary files are beside the lease, or one folder deeper. In a bucket there
    are none.
    """
    if claim.is_remote:
        for path in (_beat_of(dead.path), dead.path):
            path.unlink(missing_ok=True)
        return
    process = dead.id.partition("-")[0]
    entries = _entries(claim.place.parent)
    if claim.folder == claim.place.parent:
        inner = [one for one in entries if one.is_dir(follow_symlinks=False)]
        entries += [entry for folder in inner for entry in _entries(folder.path)]
    for entry in entries:
        if io.process_of(entry.name) == process:
            io.remove(pathlib.Path(entry.path))
    dead.path.unlink(missing_ok=True)


def _entries(folder: str | os.PathLike) -> list[os.DirEntry]:
    """Returns a folder's entries, or [] if another process removed it meanwhile."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []


def _let_go(hold: _Hold) -> None:
    with _lock:
        hold.count -= 1
        if hold.count:
            return
        _held.pop(hold.claim, None)
    hold.leave()


def _begin_to_beat(is_remote: bool) -> None:
    # A bucket out of reach must not hold up the heartbeats of this machine's folders.
    name = f"{_NAME} of buckets" if is_remote else _NAME
    if not any(one.name == name for one in threading.enumerate()):
        beating = threading.Thread(target=_beat_all, args=(is_remote,), name=name)
        beating.daemon = True
        beating.start()


def _beat_all(is_remote: bool) -> None:
    while True:
        time.sleep(BUCKET_BEAT if is_remote else BEAT)
        for hold in list(_held.values()):
            if hold.claim.is_remote == is_remote:
                hold.beat()


def _about_this_process() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": now.strftime("%Y-%m-%d %H:%M:%S UTC"),
        "command": shlex.join([_program(), *sys.argv[1:]])[:1000],
        "where": _where(),
        "began": _began(os.getpid()),
    }


def _program() -> str:
    path = pathlib.Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def _short(value: Any) -> str:
    text = "".join(one if one.isprintable() else "?" for one in str(value))
    return text if len(text) <= 100 else f"{text[:97]}..."


def _forget() -> None:
    """Clears the parent's leases in a forked child."""
    global _lock
    _lock = threading.RLock()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(release_all)
io.at_exit.append(release_all)
io.before_replacing.append(check)
