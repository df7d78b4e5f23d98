"""Reads the small files in a training's folder; errors name the file.

All files are checked before anything else is done with the folder.
"""

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from anchor_jax import io, ownership, places, shares
from anchor_jax.errors import UserError, shown
from anchor_jax.io import read_json

CONFIG, INPUTS = "config.json", "inputs.json"
LOG, SKIPPED = "log.jsonl", "skipped.json"
GOODPUT = "goodput.json"
METRICS = "metrics/metrics"
EVERY = 15.0
"""Seconds between two writes of a log in a bucket."""

_REMEDIES = {
    CONFIG: "restore it, or remove it if the run started with the given config",
    INPUTS: "restore it, or remove it if data and weights have not changed since the"
    " run started",
    SKIPPED: "restore it, or remove it; the batches in it are then tried again",
    GOODPUT: "remove it; goodput then counts from this start",
}
_LOG_REMEDY = (
    "remove that line, or move the file away; it has only metrics, and the training"
    " does not need it"
)
_OF_STEPS = ("_CHECKPOINT_METADATA", METRICS)
_MOST_NUMBER = 2**63


def make_folder(path: str) -> io.Place:
    """Returns the folder of `config.out`, which is created if missing.

    It may be in object storage.

    Raises:
      UserError: It cannot be written to.
    """
    folder = io.place(path)
    try:
        places.make_folder(folder)
    except OSError as error:
        raise UserError(
            f"config.out={path!r}: cannot be written to ({error.strerror}); choose"
            " another folder"
        ) from error
    return folder


def check_shared(folder: io.Place) -> None:
    """Checks that all processes of a job see the same folder.

    Raises:
      UserError: A process sees another folder of that name, on a disk of its own.
    """
    shares.check_shared(folder, "config.out")


def check(folder: io.Place) -> None:
    """Checks that every existing file can be used.

    Raises:
      UserError: A file is damaged. The message says what to do.
    """
    read_config(folder)
    read_inputs(folder)
    read_skipped(folder)
    read_goodput(folder)
    read_log(folder)
    _check_steps(folder)


def read_config(
    folder: io.Place, sections: Iterable[str] = ()
) -> dict[str, Any] | None:
    """Returns the config with which a run started, or None if there is no run.

    Args:
      folder: the run's folder.
      sections: names of fields that must be objects if they exist.

    Raises:
      UserError: The file is damaged.
    """
    found = _read(folder / CONFIG, dict)
    for name in sections:
        if found is not None and not isinstance(found.get(name, {}), dict):
            raise UserError(
                f"{folder / CONFIG}: {name} is {shown(found[name])}, expected an"
                f" object; {_REMEDIES[CONFIG]}"
            )
    return found


def read_inputs(folder: io.Place) -> dict[str, Any]:
    """Returns the hashes of the inputs with which a run started.

    Raises:
      UserError: The file is damaged.
    """
    return _read(folder / INPUTS, dict) or {}


def read_skipped(folder: io.Place) -> list[int]:
    """Returns the numbers of the skipped batches, or sequences.

    Raises:
      UserError: The file is damaged.
    """
    found = _read(folder / SKIPPED, list) or []
    wrong = [
        one for one in found if type(one) is not int or not 0 <= one < _MOST_NUMBER
    ]
    if wrong:
        raise UserError(
            f"{folder / SKIPPED} holds {shown(wrong[0])}, expected batch numbers of at"
            f" least 0; {_REMEDIES[SKIPPED]}"
        )
    return found


def read_goodput(folder: io.Place) -> dict[str, Any] | None:
    """Returns the record of a run's wall time, or None if there is none.

    It has `seconds` by cause, the time `at` which it was written, and `points`: numbers
    of steps, and the seconds that the run took for them.

    Raises:
      UserError: The file is damaged.
    """
    found = _read(folder / GOODPUT, dict)
    if found is None:
        return None
    try:
        steps = [step for step, _ in found["points"]]
        numbers = [found["at"], *found["seconds"].values(), *steps]
        numbers += [seconds for _, seconds in found["points"]]
        whole = all(type(one) in (int, float) for one in numbers)
        whole &= bool(steps) and sorted(steps) == steps
    except (LookupError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise UserError(
            f"{folder / GOODPUT} holds {shown(found)}, expected at, seconds and points;"
            f" {_REMEDIES[GOODPUT]}"
        )
    return found


def read_log(folder: io.Place) -> list[dict[str, Any]]:
    """Returns the metrics in a run's log, or [] if there is no log.

    A last line without a line end is skipped: the process was killed while writing it.

    Raises:
      UserError: Another line is damaged.
    """
    path = folder / LOG
    try:
        with places.explained(path):
            *lines, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); move it away"
        ) from error
    found = [_numbers(path, number, line) for number, line in enumerate(lines, 1)]
    try:
        return [*found, _numbers(path, len(lines) + 1, last)]
    except UserError:
        return found


class Log:
    """Appends lines of numbers to a run's log.

    Nothing can be appended to an object of a bucket. There the whole log is written,
    at most every `EVERY` seconds, and by `flush`.
    """

    def __init__(self, folder: io.Place):
        """Opens the log of a run, which may exist."""
        self.path = folder / LOG
        self._text = self._written = None
        self._since = time.monotonic()
        if places.is_remote(self.path):
            found = places.exists(self.path)
            self._text = self.path.read_text(encoding="utf-8") if found else ""
            self._written = self._text

    def add(self, numbers: Mapping[str, Any]) -> None:
        """Appends a line.

        Raises:
          UserError: Another job has taken the folder over, or the disk is full.
        """
        line = json.dumps(numbers) + "\n"
        if self._text is None:
            ownership.check(self.path)
            with io.explained(self.path), self.path.open("a", encoding="utf-8") as log:
                log.write(line)
            return
        self._text += line
        if time.monotonic() - self._since >= EVERY:
            self.flush()

    def flush(self) -> None:
        """Writes what is not written yet.

        Call it before a checkpoint, so that no line of its steps is lost.

        Raises:
          UserError: As for `add`.
        """
        if self._text != self._written:
            io.write_text(self.path, self._text)
            self._written, self._since = self._text, time.monotonic()


def _check_steps(folder: io.Place) -> None:
    """Raises UserError unless the metadata files of all checkpoints are readable."""
    steps = [x for x in folder.glob("[0-9]*") if x.name.isdecimal()]
    for step in sorted(steps, key=lambda x: int(x.name)):
        for name in _OF_STEPS:
            remedy = "remove only this file; the checkpoint is complete without it"
            try:
                found = read_json(step / name, remedy=remedy)
            except FileNotFoundError:
                continue
            numbers = found.values() if name == METRICS else ()
            if not all(type(value) in (int, float) for value in numbers):
                raise UserError(
                    f"{step / name} holds values that are not numbers; {remedy}"
                )


def _numbers(path: io.Place, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line.decode("utf-8"))
        whole = type(found["step"]) is int
        whole &= all(type(value) in (int, float) for value in found.values())
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(
            f"{path}, line {number} is damaged, got {shown(line)}, expected an object"
            f' of numbers with "step"; {_LOG_REMEDY}'
        )
    return found


def _read(path: io.Place, kind: type) -> Any:
    try:
        return read_json(path, kind, _REMEDIES[path.name])
    except FileNotFoundError:
        return None
