"""What watches the steps of a training, and the numbers that it adds to the log."""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator

import jax

from anchor_jax import io, places, processes
from anchor_jax.perf import roofline, work
from anchor_jax.training.monitor import host_peak
from anchor_jax.training.watch.goodput import Goodput
from anchor_jax.training.watch.pace import Pace
from anchor_jax.training.watch.profiles import ProfileConfig, Profiles, Tell
from anchor_jax.training.watch.times import (
    DATA,
    DEVICE,
    HOST,
    PROFILING,
    SAMPLING,
    SAVING,
    Times,
)
from anchor_jax.watchdog import Watchdog, WatchdogConfig

_BUSY = {
    SAVING: "saving",
    SAMPLING: "making sample videos",
    PROFILING: "writing a profile",
}


@dataclasses.dataclass(eq=False)
class Watch:
    """Watches the steps of a training. As a context it starts to.

    Attributes:
      watchdog: ends a training that hangs.
      profiles: makes profiles on request.
      times: the seconds of this process by cause.
      goodput: the wall time of the run by cause, or None.
    """

    watchdog: Watchdog
    profiles: Profiles
    times: Times = dataclasses.field(default_factory=Times)
    goodput: Goodput | None = None
    _open: contextlib.ExitStack = dataclasses.field(
        default_factory=contextlib.ExitStack
    )

    @classmethod
    def nothing(cls, folder: io.Place) -> "Watch":
        """Returns an object that watches nothing."""
        profiles = Profiles(ProfileConfig(steps=0), folder, str, str)
        return cls(Watchdog(WatchdogConfig(medians=0), folder), profiles)

    def __enter__(self) -> "Watch":
        self._open.enter_context(self.watchdog)
        self._open.enter_context(self.profiles)
        self._open.enter_context(self.times.separating_compiles())
        self._open.enter_context(self.times.of(HOST))
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)

    @contextlib.contextmanager
    def step(self, step: int, kind: Hashable) -> Iterator[None]:
        """The start of a step, whose programs may still run afterwards.

        Args:
          step: number of steps before it.
          kind: steps of one kind run the same programs.
        """
        self.profiles.before(step)
        self.watchdog.started(kind)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    @contextlib.contextmanager
    def fetching(self, step: int) -> Iterator[None]:
        """The wait for the results of the oldest step, the number `step`."""
        with self.times.of(DEVICE):
            yield
        self.watchdog.ended()
        if self.profiles.is_due(step + 1):
            with self.busy(PROFILING):
                self.profiles.finish()

    @contextlib.contextmanager
    def busy(self, cause: str) -> Iterator[None]:
        """Work beside the steps: `SAVING`, `SAMPLING` or `PROFILING`."""
        with self.watchdog.busy(_BUSY[cause]), self.times.of(cause):
            yield

    @contextlib.contextmanager
    def saving(self, done: int) -> Iterator[None]:
        """The start of saving a checkpoint of `done` steps."""
        with self.busy(SAVING):
            yield
        if self.goodput is not None:
            self.goodput.note(done, is_saved=True)


@dataclasses.dataclass(eq=False)
class Gauge:
    """The numbers of the log that do not come from the steps themselves.

    Attributes:
      times: the seconds of this process by cause.
      goodput: the wall time of the run by cause.
      pace: the numbers of all processes.
      flops: operations of a mean step.
      peak: operations per second of all devices, or None if they are unknown.
    """

    times: Times
    goodput: Goodput
    pace: Pace
    flops: float = 0.0
    peak: float | None = None

    def __post_init__(self):
        self._before = self.times.seconds()

    def __call__(self, done: int, steps: int, seconds: float) -> dict[str, float]:
        """Returns the numbers of a line, and shows this process's to the others.

        Args:
          done: number of finished steps.
          steps: number of steps of the line.
          seconds: seconds per step.
        """
        now, memory = self.times.seconds(), peak_memory()
        own = {
            name: (now.get(name, 0.0) - self._before.get(name, 0.0)) / steps
            for name in (HOST, DATA)
        }
        self._before = now
        self.pace.exchange({"step": seconds, **own, **memory})
        self.goodput.note(done)
        return {
            **self._mfu(seconds),
            **self.pace.largest(memory),
            **self.pace.numbers(),
            **self.goodput.numbers(),
        }

    def _mfu(self, seconds: float) -> dict[str, float]:
        if self.peak is None or not seconds:
            return {}
        return {"mfu": self.flops / (seconds * self.peak)}


def peak_memory() -> dict[str, float]:
    """Returns the peak memory in GB of this process, and of its fullest device.

    Not every device reports it.
    """
    found = {"host_memory_gb": host_peak() / 1e9}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return found | ({"device_memory_gb": max(peaks) / 1e9} if peaks else {})


def peak_flops() -> float | None:
    """Returns the bfloat16 operations per second of all devices, if they are known."""
    devices = jax.devices()
    chip = roofline.find(devices[0].device_kind)
    return None if chip is None else chip.flops / chip.devices * len(devices)


def open_watch(
    config,
    uses: Callable[[], Iterable[work.Use]],
    folder: io.Place,
    first: int,
    times: Times,
    tell: Tell,
    say: Tell,
) -> tuple[Watch, Gauge]:
    """Returns what watches a run's steps, and the numbers of its log.

    Args:
      config: config of the training.
      uses: returns what a mean step does, for MFU.
      folder: the run's folder.
      first: number of steps before this start.
      times: seconds of this process.
      tell: prints a line in the first process.
      say: prints a line in every process.
    """
    is_remote = places.is_remote(folder)
    near = pathlib.Path(tempfile.gettempdir()) if is_remote else folder
    name = f"stacks-{processes.index()}.txt"
    goodput = Goodput(folder, times, first)
    watch = Watch(
        Watchdog(
            config.watchdog, near / name, copy=folder / name if is_remote else None
        ),
        Profiles(config.profile, folder, tell, say),
        times,
        goodput,
    )
    peak = peak_flops()
    flops = 0.0 if peak is None else work.step_flops(uses(), config.batch)
    return watch, Gauge(times, goodput, Pace(tell), flops, peak)
