"""A recorded case on disk, and the comparison of its outputs with ours.

Files are not trusted: sizes are bounded, paths stay near the case, and only JSON and
safetensors are read.
"""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import numpy as np
from safetensors import SafetensorError

from anchor_jax import flow
from anchor_jax.errors import UserError, shown
from anchor_jax.porting import convert

LARGEST = 2**20
TIME = 1e-6  # relative: timesteps; near 1000 they are spaced by 6e-5 in float32
_UNSET: Any = object()


class CaseError(UserError):
    """A case's files are wrong, or the case needs an unsupported feature."""


class Tensors(dict):
    """Arrays by name; a missing name raises `CaseError`."""

    def __init__(self, of: str, arrays=()):
        super().__init__(arrays)
        self.of = of

    def __missing__(self, name: str):
        raise CaseError(f"{self.of} has no tensor {name!r}, which is needed")


@dataclasses.dataclass
class Case:
    """A recorded case: hyper-parameters, tensors, and optionally a stream's trace."""

    folder: pathlib.Path
    config: dict[str, Any]
    inputs: Tensors
    outputs: Tensors
    trace: Any = None
    dtype: str = "float32"  # type of the networks' arithmetic; recordings are float32

    @property
    def kind(self) -> str:
        return kind_of(self.folder, self.config)

    def weights(self, prefix: str = "") -> dict[str, np.ndarray]:
        """Returns the weights whose names start with a prefix, without it."""
        path = _beside(self.folder, self.setting("weights_file"), "weights_file")
        found = load_tensors(path, prefix)
        if not found:
            raise CaseError(f"{path.name} has no tensor with the prefix {prefix!r}")
        return {name: as_float(value) for name, value in found.items()}

    def setting(self, *keys: str, default: Any = _UNSET) -> Any:
        """Returns the value at nested keys of `config.json`."""
        value = self.config
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                if default is _UNSET:
                    raise CaseError(f"config.json: {'.'.join(keys)} is missing")
                return default
            value = value[key]
        return value

    def size(
        self, *keys: str, low: int = 1, high: int = LARGEST, default: Any = _UNSET
    ) -> int:
        """Returns a whole number within bounds."""
        value = self.setting(*keys, default=default)
        return whole(value, ".".join(keys), low, high)

    def sizes(
        self, *keys: str, low: int = 0, high: int = LARGEST, default: Any = _UNSET
    ) -> tuple[int, ...]:
        """Returns a list of whole numbers within bounds."""
        value, name = self.setting(*keys, default=default), ".".join(keys)
        if not isinstance(value, list | tuple) or len(value) > LARGEST:
            raise CaseError(f"config.json: {name}={shown(value)}, expected a list")
        return tuple(whole(item, name, low, high) for item in value)

    def number(self, *keys: str, default: Any = _UNSET) -> float:
        """Returns a finite number."""
        value = self.setting(*keys, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            value = math.nan
        if not abs(value) < 1e30:
            raise CaseError(f"config.json: {'.'.join(keys)} must be a finite number")
        return float(value)

    def demand_steps(self) -> None:
        """Raises CaseError unless timesteps are 1000 sigma, as the method needs."""
        for name in ("num_train_timesteps", "num_train_timestep"):
            if self.setting(name, default=flow.TRAIN_STEPS) != flow.TRAIN_STEPS:
                raise CaseError(f"config.json: {name} can only be {flow.TRAIN_STEPS}")

    def is_set(self, *keys: str) -> bool:
        """Returns a flag, false if it is not given."""
        value = self.setting(*keys, default=False)
        if not isinstance(value, bool):
            raise CaseError(f"config.json: {'.'.join(keys)} must be true or false")
        return value


def whole(value: Any, name: str, low: int, high: int) -> int:
    """Returns `value` if it is a whole number within bounds."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not low <= value <= high
    ):
        raise CaseError(
            f"config.json: {name}={shown(value)}, expected a whole number"
            f" from {low} to {high}"
        )
    return value


def as_float(array: np.ndarray) -> np.ndarray:
    """Returns floating-point arrays as float32 and others unchanged."""
    if array.dtype.kind in "iub":
        return array
    return np.asarray(array, np.float32)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns a case's hyper-parameters."""
    config = _read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CaseError("config.json must hold an object")
    return config


def kind_of(folder: pathlib.Path, config: dict[str, Any]) -> str:
    """Returns the kind that the config names, else the name of the parent folder."""
    named = config.get("fixture")
    return named if isinstance(named, str) else folder.resolve().parent.name


def load_case(folder: pathlib.Path) -> Case:
    """Returns a case without reading its weights.

    Raises:
      CaseError: A file is missing, damaged, or named outside the set.
    """
    config = read_config(folder)
    named = config.get("inputs_file", "inputs.safetensors")
    inputs = _beside(folder, named, "inputs_file")
    outputs = _beside(folder, "outputs.safetensors", "outputs")
    trace = folder / "trace.json"
    trace = _read_json(trace) if trace.exists() else None
    return Case(
        folder=folder,
        config=config,
        inputs=Tensors(inputs.name, load_tensors(inputs)),
        outputs=Tensors("outputs.safetensors", load_tensors(outputs)),
        trace=trace,
    )


def load_tensors(path: pathlib.Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file whose names start with a prefix."""
    if not path.is_file():
        raise CaseError(f"{path.name} is missing")
    try:
        return dict(convert.load_safetensors(path, prefix))
    except (SafetensorError, OSError, TypeError, ValueError, LookupError) as error:
        raise CaseError(f"{path.name} cannot be read: {shown(str(error))}") from error


def _read_json(path: pathlib.Path) -> Any:
    if not path.is_file():
        raise CaseError(f"{path.name} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CaseError(f"{path.name} cannot be read: {shown(str(error))}") from error


def _beside(folder: pathlib.Path, named: Any, key: str) -> pathlib.Path:
    """Returns the file that a config names, if it is in the case's set.

    The set is the folder two levels above the case, SET/KIND/CASE.
    """
    if not isinstance(named, str) or "\0" in named:
        raise CaseError(f"config.json: {key}={shown(named)}, expected a relative path")
    top = folder.resolve().parent.parent
    path = (folder / named).resolve()
    if not path.is_relative_to(top) or pathlib.PurePath(named).is_absolute():
        raise CaseError(
            f"config.json: {key}={shown(named)} leaves the set of cases, the folder"
            " two above the case; put the file inside it"
        )
    return path


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison. Differences are inf where they are undefined."""

    name: str
    absolute: float
    relative: float
    is_equal: bool
    limit: str


class Checks:
    """The comparisons of one case, and the outputs that they cover."""

    def __init__(self, outputs: dict[str, np.ndarray]):
        self.outputs = outputs
        self.rows: list[Row] = []
        self.left_out: dict[str, tuple[str, ...]] = {}
        self._seen: set[str] = set()

    def compare(
        self,
        name: str,
        ours: Any,
        theirs: Any = None,
        *,
        absolute: float | None = None,
        relative: float | None = None,
    ) -> None:
        """Compares with the recorded output of that name, or with `theirs` if given.

        Args:
          name: Name of the output. An output that was not recorded fails.
          ours: The package's value, in the recorded layout.
          theirs: The recorded value, if it is not an output with that name.
          absolute: Largest difference allowed.
          relative: The same as a fraction of the largest recorded magnitude. If both
            are given, one of them is enough.
        """
        theirs = self._recorded(name, theirs)
        if theirs is None:
            return
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if ours.shape != theirs.shape:
            self._fail(name, f"shape {ours.shape}, recorded {theirs.shape}")
            return
        far, part = difference(ours, theirs)
        tests = [("absolute", far, absolute), ("relative", part, relative)]
        tests = [(word, got, limit) for word, got, limit in tests if limit is not None]
        words = " or ".join(f"{limit:g} {word}" for word, _, limit in tests)
        passed = any(got <= limit for _, got, limit in tests)
        self.rows.append(Row(name, far, part, passed, words))

    def equal(self, name: str, ours: Any, theirs: Any = None) -> None:
        """Compares exactly, with the output of that name or with `theirs` if given."""
        theirs = self._recorded(name, theirs)
        if theirs is None:
            return
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        if ours.shape != theirs.shape:
            self._fail(name, f"shape {ours.shape}, recorded {theirs.shape}")
            return
        same = np.array_equal(ours, theirs)
        far, part = (0.0, 0.0) if same else _distance(ours, theirs)
        limit = "exact" if same else f"exact; {shown(ours)}, not {shown(theirs)}"
        self.rows.append(Row(name, far, part, same, limit))

    def leave_out(self, pattern: str, reason: str) -> None:
        """Marks outputs without a counterpart, by a regular expression."""
        names = [
            name
            for name in self.outputs
            if name not in self._seen and re.fullmatch(pattern, name)
        ]
        if names:
            self.left_out[reason] = (*self.left_out.get(reason, ()), *names)
            self._seen.update(names)

    def unaccounted(self) -> list[str]:
        """Returns the outputs that were neither compared nor left out."""
        return sorted(set(self.outputs) - self._seen)

    def _recorded(self, name: str, theirs: Any) -> Any:
        self._seen.add(name)
        if theirs is not None:
            return theirs
        if name not in self.outputs:
            self._fail(name, "was not recorded, but is expected")
            return None
        return self.outputs[name]

    def _fail(self, name: str, reason: str) -> None:
        self.rows.append(Row(name, math.inf, math.inf, False, reason))


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Returns the largest absolute difference, and that over the largest magnitude.

    Both are inf if a number is not finite.
    """
    if theirs.size == 0:
        return 0.0, 0.0
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return math.inf, math.inf
    far, scale = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    if far == 0.0:
        return 0.0, 0.0
    return far, far / scale if scale else math.inf


def _distance(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    if ours.dtype.kind in "OUS" or theirs.dtype.kind in "OUS":
        return math.inf, math.inf
    return difference(ours, theirs)
