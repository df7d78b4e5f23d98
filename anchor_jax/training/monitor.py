"""Shows the progress of a training: metrics, a progress bar, sample videos."""

import contextlib
import json
import pathlib
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from anchor_jax import io, places, processes
from anchor_jax.io import write_text
from anchor_jax.training.files import LOG, Log, read_log

EVENTS = "events"
MEASURED = re.compile(
    r"seconds_per_step|latent_frames_per_second|mfu|goodput|share_\w+|\w*memory_gb"
    r"|step_time_max_over_median|slow_process"
)
"""Names of the numbers that are different if the same steps are made again."""

_SHOWN = ("loss", "generator_loss", "critic_loss")


class Monitor:
    """Logs the means of a training's metrics every few steps.

    They are written to `log.jsonl`, and to TensorBoard event files if the package
    `tensorboardX` is installed.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        steps: int,
        first: int,
        every: int,
        frames_per_step: float = 0.0,
        quiet: bool = False,
        gauge: Callable[[int, int, float], Mapping[str, float]] | None = None,
    ):
        """Opens the logs.

        Args:
          folder: the training's folder.
          steps: total number of steps.
          first: the step at which the run starts or resumes.
          every: steps per line of metrics.
          frames_per_step: latent frames that a step processes.
          quiet: whether to write and show nothing, as in all processes but the first.
          gauge: returns further numbers of a line, from the finished steps, the steps
            of the line, and the seconds per step. It is called in every process.

        Raises:
          UserError: The log is damaged.
        """
        self.every, self.frames = every, frames_per_step
        self.sums: dict[str, list[float]] = {}
        self.last = first
        self.unsaved: dict[str, list[float]] = {}
        self.began = self.ended = time.monotonic()
        self.noted = 0
        self.quiet, self.gauge = quiet, gauge
        if processes.is_first():
            _cut_log(folder, first)
        self.log = Log(folder)
        self.bar = tqdm(initial=first, total=steps, unit="step", disable=quiet)
        self.mirror = io.Mirror(folder / EVENTS)
        self.events = None if quiet else _events(self.mirror.local, first)

    def note(self, step: int, numbers: Mapping[str, float]) -> None:
        """Records the metrics of a step; not every step has every metric."""
        for name, value in numbers.items():
            self.sums.setdefault(name, []).append(value)
            self.unsaved.setdefault(name, []).append(value)
        self.noted, self.ended = self.noted + 1, time.monotonic()
        self.last = step + 1
        self.bar.update()
        if self.last % self.every == 0:
            self._write(self.last)

    def means(self) -> dict[str, float]:
        """Returns the means since the last call, for a checkpoint; the log is whole."""
        self.log.flush()
        self.mirror.upload()
        unsaved, self.unsaved = self.unsaved, {}
        return _means(unsaved)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside from the seconds per step."""
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began

    def show(self, image: np.ndarray, step: int) -> None:
        """Shows a contact sheet, uint8 [height, width, 3], in TensorBoard."""
        if self.events is not None:
            self.events.add_image("samples", image, step, dataformats="HWC")

    def close(self) -> None:
        """Writes the remaining metrics, and closes the bar and the event files."""
        try:
            if self.noted:
                self._write(self.last)
            self.log.flush()
        finally:
            self.bar.close()
            if self.events is not None:
                self.events.close()
            self.mirror.close()

    def _write(self, step: int) -> None:
        means = _means(self.sums)
        means |= _ratio(means)
        seconds = (self.ended - self.began) / self.noted
        means["seconds_per_step"] = seconds
        if self.frames:
            means["latent_frames_per_second"] = self.frames / seconds
        means["memory_gb"] = memory_gb()
        if self.gauge is not None:
            means |= self.gauge(step, self.noted, seconds)
        self.sums, self.began, self.noted = {}, self.ended, 0
        shown = {name: f"{means[name]:.4f}" for name in _SHOWN if name in means}
        self.bar.set_postfix(shown)
        if self.quiet:
            return
        self.log.add({"step": step, **means})
        if self.events is not None:
            for name, value in means.items():
                self.events.add_scalar(name, value, step)


def beside_bar(tell: Callable[[str], None]) -> Callable[[str], None]:
    """Returns a function that prints a line while a progress bar is shown."""

    def tell_beside(line: str) -> None:
        with tqdm.external_write_mode():
            tell(line)

    return tell_beside


def _means(values: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: sum(found) / len(found) for name, found in values.items()}


def _ratio(means: Mapping[str, float]) -> dict[str, float]:
    names = ("generator_gradient_norm", "critic_gradient_norm")
    if not all(name in means for name in names) or not means[names[1]]:
        return {}
    return {"generator_critic_ratio": means[names[0]] / means[names[1]]}


def _cut_log(folder: pathlib.Path, first: int) -> None:
    """Removes log lines of steps that will be repeated."""
    kept = [line for line in read_log(folder) if line["step"] <= first]
    if places.exists(folder / LOG):
        write_text(folder / LOG, "".join(json.dumps(line) + "\n" for line in kept))


def _events(folder: pathlib.Path, first: int) -> Any:
    """Returns an event writer that hides points of repeated steps, or None."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first + 1)


def memory_gb() -> float:
    """Returns the peak memory in GB of the first device, or of the host process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return (host_peak() if peak is None else peak) / 1e9


def host_peak() -> int:
    """Returns the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
