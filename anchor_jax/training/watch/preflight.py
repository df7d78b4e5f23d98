"""Checks before the first step: free disk space, and hosts that are slow or silent."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from anchor_jax import io, places, processes
from anchor_jax.errors import UserError, some
from anchor_jax.training.watch import speeds
from anchor_jax.training.watch.pace import median

CLOCKS = 1.0
"""Seconds by which the clocks of hosts may differ."""

_RUNS = ("auto", "on", "off")
_ROUNDS = 3  # measurements of the clocks
_GB = 1e9
_HELP = "; --config.preflight.run=off turns these checks off"
_SPEEDS = {
    "matmul": ("multiplies matrices", 1e12, "TFLOP/s"),
    "write": ("writes to config.out", _GB, "GB/s"),
    "read": ("reads from config.out", _GB, "GB/s"),
}


@dataclasses.dataclass(frozen=True)
class PreflightConfig:
    """The section `preflight`: checks before the first step.

    Attributes:
      run: "auto" checks the free space of the disk, and with accelerators also the
        speeds of all devices, of their sums and of the disk, and the clocks. "on" does
        so on CPUs too. "off" checks nothing.
      slow: share of the median speed below which a device is slow. A disk is slow
        below half of it, because its speed varies more.
      refuse: whether to refuse to start with a slow host or a wrong clock. Otherwise
        it is named in a warning.
      seconds: seconds that each check may take.
    """

    run: str = "auto"
    slow: float = 0.7
    refuse: bool = False
    seconds: float = 60.0

    def __post_init__(self):
        if self.run not in _RUNS:
            raise ValueError(f"run={self.run!r} must be one of {', '.join(_RUNS)}")


def check(
    config: PreflightConfig,
    folder: io.Place,
    size: int,
    missing: int,
    tell: Callable[[str], None],
) -> None:
    """Checks the disk, the devices and the hosts of a training.

    All processes call it.

    Args:
      config: what is checked.
      folder: the training's folder.
      size: bytes of a checkpoint.
      missing: number of checkpoints that will be added to those in the folder.
      tell: prints a line.

    Raises:
      UserError: A checkpoint does not fit on the disk, the network or a device gives no
        result or a wrong one, or a host is slow and `refuse` is set.
      processes.Missing: A process is silent.
    """
    if config.run == "off":
        return
    _check_space(folder, size, missing, tell)
    if config.run == "auto" and jax.default_backend() == "cpu":
        return
    found = _measure_all(config, folder)
    problems = judge(found, config.slow)
    for line in problems:
        tell(f"warning: {line}")
    tell(describe(found))
    if problems and config.refuse:
        raise UserError(f"preflight: {'; '.join(some(problems))}{_HELP}")


def _check_space(folder: io.Place, size: int, missing: int, tell) -> None:
    if places.is_remote(folder):  # Nothing says how much more it can hold.
        return
    free = shutil.disk_usage(folder).free
    space = f"a checkpoint needs {_gb(size)}, and {_gb(free)} are free at {folder}"
    if free < size:
        raise UserError(
            f"config.out: {space}; free disk space, or choose a folder on another disk"
        )
    if free < size * missing:
        tell(
            f"warning: {space}, but up to {missing} more will be kept there; free disk"
            " space, or lower config.keep"
        )


def _gb(size: float) -> str:
    return f"{size / _GB:.3g} GB"


def _measure_all(config: PreflightConfig, folder: io.Place) -> list[dict[str, Any]]:
    """Returns the measurements of all processes.

    Raises:
      UserError: A measurement fails or does not end.
    """
    own: dict[str, Any] = {}
    with _explaining("its devices multiply matrices"):
        own["matmul"] = speeds.within(config.seconds, speeds.matmul)
    name = f".preflight-{processes.index()}"
    with _explaining(f"a file is written to {folder}"):
        own["write"], own["read"] = speeds.within(
            config.seconds, lambda: speeds.disk(folder, name)
        )
    # Names the processes whose measurements do not end.
    processes.barrier("preflight", 3 * config.seconds)
    own["clock"] = clock_offset()
    with _explaining("all devices add up an array"):
        own["reduce"] = speeds.within(config.seconds, speeds.all_reduce)
    return processes.gather(own)


@contextlib.contextmanager
def _explaining(what: str) -> Iterator[None]:
    """Turns failures of a measurement into a UserError that names the process."""
    try:
        yield
    except (speeds.TooLate, speeds.WrongResult, OSError) as error:
        raise UserError(
            f"preflight, {processes.name()}: {what}: {error}; repair or leave out what"
            f" is broken{_HELP}"
        ) from error


def clock_offset() -> float:
    """Returns the seconds by which this host's clock is ahead of the median one."""
    offsets = []
    for _ in range(_ROUNDS):
        processes.barrier("the clocks")
        found = processes.gather(time.time())
        offsets.append(found[processes.index()] - median(found))
    return min(offsets, key=abs)


def judge(found: Sequence[Mapping[str, Any]], slow: float) -> list[str]:
    """Returns a line about each slow device or disk, and each wrong clock.

    Args:
      found: measurements of all processes: operations per second `matmul` of each
        device, bytes per second `write` and `read`, seconds `clock`.
      slow: as in `PreflightConfig`.
    """
    lines = []
    for name, (does, unit, shown) in _SPEEDS.items():
        rows = list(_rows(found, name))
        usual = median([speed for _, speed in rows])
        least = usual * (slow if name == "matmul" else slow / 2)
        lines += [
            f"{who} {does} at {speed / unit:.3g} {shown}, the median is"
            f" {usual / unit:.3g}"
            for who, speed in rows
            if speed < least
        ]
    for number, one in enumerate(found):
        if abs(one["clock"]) > CLOCKS:
            way = "ahead of" if one["clock"] > 0 else "behind"
            lines.append(
                f"the clock of {processes.name(number)} is {abs(one['clock']):.1f} s"
                f" {way} the others; set it (NTP)"
            )
    return lines


def _rows(found: Sequence[Mapping[str, Any]], name: str):
    """Yields who measured a speed, and the speed."""
    for number, one in enumerate(found):
        values = one[name] if isinstance(one[name], list) else [one[name]]
        for place, value in enumerate(values):
            device = f", device {place}," if len(values) > 1 else ""
            yield f"{processes.name(number)}{device}", value


def describe(found: Sequence[Mapping[str, Any]]) -> str:
    """Returns a line with the measurements of all processes; speeds are the lowest."""
    products = [speed / 1e12 for _, speed in _rows(found, "matmul")]
    least = {
        name: f"{min(one[name] for one in found) / _GB:.3g} GB/s"
        for name in ("reduce", "write", "read")
    }
    offsets = [one["clock"] for one in found]
    return (
        f"preflight: {len(products)} devices, matrix products at {min(products):.3g} to"
        f" {max(products):.3g} TFLOP/s, all-reduce {least['reduce']}, disk writes"
        f" {least['write']} and reads {least['read']}, clocks within"
        f" {max(offsets) - min(offsets):.2g} s"
    )
