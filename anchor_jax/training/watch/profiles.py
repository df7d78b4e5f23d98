"""Profiles of a running training, on request: a signal to a process, or a file.

SIGUSR1 makes a profile of the process that receives it. The file OUT/profile makes one
of every process; it is removed when it is seen.
"""

import collections
import contextlib
import dataclasses
import pathlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable

import jax

from anchor_jax import interrupts, io, places, processes

FILE, FOLDER = "profile", "profiles"

_POLL = 2.0  # seconds
_CHANNEL = "profile"
_IGNORED = "a profile is being made, so another request for one is ignored"
_OPEN = (
    "open it with `tensorboard --logdir {folder}` (pip install tensorboard xprof), or"
    " its *.trace.json.gz at https://ui.perfetto.dev"
)

Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """The section `profile`: profiles of a running training, on request.

    Attributes:
      steps: number of steps of a profile. 0 ignores requests.
    """

    steps: int = 5


@dataclasses.dataclass(frozen=True)
class _Profile:
    """A profile that is being made.

    Attributes:
      first: its first step, as the log counts: the first step of a run is 1.
      last: its last step.
      place: folder on this machine in which jax writes it.
      tell: prints where it is.
    """

    first: int
    last: int
    place: pathlib.Path
    tell: Tell


class Profiles:
    """Starts and ends profiles between the steps of a training.

    As a context it takes requests.
    """

    def __init__(self, config: ProfileConfig, folder: io.Place, tell: Tell, say: Tell):
        """Initializes.

        Args:
          config: the length of a profile.
          folder: the run's folder.
          tell: prints a line in the first process.
          say: prints a line in every process.
        """
        self.config, self.folder = config, folder
        self.tell, self.say = tell, say
        self._requests: collections.deque[Tell] = collections.deque()
        self._seen = 0
        self._now: _Profile | None = None
        self._done = 0
        self._made = contextlib.ExitStack()
        self._stopped = threading.Event()

    def __enter__(self) -> "Profiles":
        if self.config.steps:
            self._made.enter_context(interrupts.counting(signal.SIGUSR1))
            threading.Thread(target=self._poll, name="profiles", daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        """Ends a profile that is being made."""
        self._stopped.set()
        if self._now is not None:
            self.finish()
        self._made.close()

    def before(self, step: int) -> None:
        """Starts a profile before a step if one is requested.

        Args:
          step: number of steps before it.
        """
        if self.config.steps:
            # A scheduler's signal reaches a process and its parent, which passes it on.
            self._requests.extend([self.say] * bool(interrupts.counted(signal.SIGUSR1)))
        while self._requests:
            tell = self._requests.popleft()
            if self._now is None:
                self._start(step, tell)
            else:
                tell(_IGNORED)

    def _start(self, step: int, tell: Tell) -> None:
        with self._failing(tell):
            place = pathlib.Path(tempfile.mkdtemp(prefix="anchor-jax-profile-"))
            jax.profiler.start_trace(place)
            self._now = _Profile(step + 1, step + self.config.steps, place, tell)

    def is_due(self, done: int) -> bool:
        """Returns whether a profile has all its steps after `done` steps."""
        self._done = done
        return self._now is not None and done >= self._now.last

    def finish(self) -> None:
        """Ends the profile, writes it into the run's folder, and says where it is."""
        now, self._now = self._now, None
        with self._failing(now.tell):
            jax.profiler.stop_trace()
            name = f"{now.first}-{processes.index()}"
            folder = self.folder / FOLDER / name
            _move(now.place, folder)
            shown = folder if now.tell is self.say else folder.parent
            steps = f"steps {now.first} to {self._done}"
            now.tell(f"profile of {steps}: {shown}; {_OPEN.format(folder=shown)}")

    def look(self) -> None:
        """Takes a request by the file, which only the first process reads."""
        if processes.is_first():
            if not places.exists(self.folder / FILE):
                return
            (self.folder / FILE).unlink()
            seen = self._seen + 1
            processes.post(_CHANNEL, seen)
        else:
            seen = processes.posted(_CHANNEL).get(0, 0)
        if seen > self._seen:
            self._seen = seen
            self._requests.append(self.tell)

    def _poll(self) -> None:
        while not self._stopped.wait(_POLL):
            # The disk or the coordinator may be away for a while.
            with contextlib.suppress(Exception):
                self.look()

    @contextlib.contextmanager
    def _failing(self, tell: Tell):
        """Says why a profile fails; the training continues."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - profilers raise many types.
            reason = " ".join(str(error).split())[:200]
            tell(f"warning: the profile failed ({reason}); the training continues")


def _move(source: pathlib.Path, folder: io.Place) -> None:
    """Moves files into a folder, which may be in object storage."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            inner = path.parent.relative_to(source).as_posix()
            with io.filling(folder / inner) as there:
                there.mkdir(parents=True, exist_ok=True)
                shutil.move(path, there)
    shutil.rmtree(source, ignore_errors=True)
