"""Durations of earlier compilations, stored beside the compiled programs."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from anchor_jax import io, places
from anchor_jax.errors import UserError

FILE = "compile_times.json"
_MOST = 1000


@dataclasses.dataclass(frozen=True)
class CompileTimes:
    """The seconds that programs took to compile, in the folder of the compile cache.

    Attributes:
      folder: the folder; None stores nothing.
    """

    folder: places.Place | None

    @contextlib.contextmanager
    def reported(
        self, what: str, about: Any, tell: Callable[[str], None]
    ) -> Iterator[None]:
        """Prints what is compiled and how long it took last time, and stores the time.

        Args:
          what: a description for the user.
          about: plain values that determine the programs.
          tell: called with one line.
        """
        device = jax.local_devices()[0]
        key = _digest([about, jax.__version__, device.platform, device.device_kind])
        last = self.load().get(key)
        known = (
            "the first time" if last is None else f"it took {_duration(last)} last time"
        )
        tell(f"compiling {what}: {known}")
        began = time.monotonic()
        yield
        self._store(key, time.monotonic() - began)

    def load(self) -> dict[str, float]:
        """Returns the stored seconds by key; {} if the file is missing or damaged."""
        if self.folder is None:
            return {}
        try:
            found = io.read_json(self.folder / FILE, dict, "delete it")
        except (FileNotFoundError, UserError):
            return {}
        return {key: x for key, x in found.items() if type(x) is float and x >= 0}

    def _store(self, key: str, seconds: float) -> None:
        if self.folder is None:
            return
        known = self.load()
        known.pop(key, None)
        newest = list(known.items())[-(_MOST - 1) :]
        # A full disk must not stop the work.
        with contextlib.suppress(UserError, OSError):
            if not places.is_dir(self.folder):
                return
            io.write_json(self.folder / FILE, dict([*newest, (key, seconds)]))


def _digest(about: Any) -> str:
    text = json.dumps(about, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min"
