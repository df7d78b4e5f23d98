"""Finds recorded cases, runs those of a known kind, and reports."""

import dataclasses
import importlib
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

import einops
import flax
import jax
from safetensors import SafetensorError

from anchor_jax.errors import UserError, suggest
from anchor_jax.verify.case import (
    CaseError,
    Checks,
    Row,
    kind_of,
    load_case,
    read_config,
)

KINDS = {
    "primitives": "anchor_jax.verify.primitives:verify_primitives",
    "scheduler": "anchor_jax.verify.primitives:verify_scheduler",
    "solver": "anchor_jax.verify.solver:verify_solver",
    "dit_bidirectional": "anchor_jax.verify.networks:verify_dit_bidirectional",
    "dit_causal_nocache": "anchor_jax.verify.networks:verify_dit_causal",
    "lora": "anchor_jax.verify.networks:verify_lora",
    "umt5": "anchor_jax.verify.networks:verify_umt5",
    "vae": "anchor_jax.verify.networks:verify_vae",
    "streaming_tri_region": "anchor_jax.verify.streaming:verify_stream",
    "streaming_variants": "anchor_jax.verify.streaming:verify_stream",
    "infinity_rope_kv_flush": "anchor_jax.verify.streaming:verify_flush",
    "dmd": "anchor_jax.verify.training:verify_dmd",
    "ode_regression": "anchor_jax.verify.training:verify_ode_regression",
    "self_forcing": "anchor_jax.verify.training:verify_self_forcing",
    "streaming_training": "anchor_jax.verify.sequences:verify_streaming_training",
}

_FILES = ("config.json", "inputs.safetensors", "outputs.safetensors", "trace.json")

# Errors that a damaged or hostile file can raise in the networks. Then one case fails,
# and the others still run.
_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    einops.EinopsError,
    flax.errors.FlaxError,
)


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """The result of one case."""

    folder: pathlib.Path
    kind: str
    rows: tuple[Row, ...] = ()
    problems: tuple[str, ...] = ()
    left_out: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    is_excepted: bool = False
    dtype: str = "float32"

    @property
    def passed(self) -> bool:
        """Whether the case passed; tolerances apply only to float32."""
        return not self.problems and not any(map(self.is_far, self.rows))

    def is_far(self, row: Row) -> bool:
        """Returns whether a tensor exceeds its tolerance."""
        return self.dtype == "float32" and not row.is_equal


def find_cases(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the folders of cases at and below the paths, each once.

    Raises:
      UserError: A path is not a folder, or holds no case.
    """
    found: dict[pathlib.Path, pathlib.Path] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give a case, a kind or a set")
        below = list(_cases_below(path))
        if not below:
            raise UserError(f"{path} holds no case, a folder with config.json")
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _cases_below(path: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, below, files in os.walk(path):
        below.sort()
        if any(name in files for name in _FILES):
            yield pathlib.Path(folder)


def verify_case(
    folder: pathlib.Path, excepted: Sequence[str] = (), dtype: str = "float32"
) -> CaseResult:
    """Returns the result of one case. Faults in its files count as failures.

    Args:
      folder: Folder of the case.
      excepted: Kinds that are not run.
      dtype: Type of the networks' arithmetic. Recordings are in float32, so the result
        for another type shows its distance from float32.
    """
    kind = folder.resolve().parent.name
    try:
        kind = kind_of(folder, read_config(folder))
    except CaseError as error:
        if kind not in excepted:
            return CaseResult(folder, kind, problems=(str(error),))
    if kind in excepted:
        return CaseResult(folder, kind, is_excepted=True)
    if kind not in KINDS:
        problem = f"unknown kind {kind!r}{suggest(kind, KINDS, 'kinds')}"
        return CaseResult(folder, kind, problems=(problem,))
    return _run(folder, kind, dtype)


def _run(folder: pathlib.Path, kind: str, dtype: str) -> CaseResult:
    checks, problems = Checks({}), []
    try:
        case = dataclasses.replace(load_case(folder), dtype=dtype)
        checks = Checks(case.outputs)
        with jax.default_matmul_precision("highest"):
            _function(kind)(case, checks)
    except UserError as error:
        problems.append(str(error))
    except _FAULTS as error:
        problems.append(f"{type(error).__name__}: {error}")
    else:
        problems += [
            f"{name}: recorded, but not compared" for name in checks.unaccounted()
        ]
        if not checks.rows:
            problems.append("nothing was compared")
    rows = tuple(checks.rows)
    return CaseResult(folder, kind, rows, tuple(problems), checks.left_out, dtype=dtype)


def _function(kind: str) -> Callable:
    """Returns the function of a kind; only its module is imported."""
    module, name = KINDS[kind].split(":")
    return getattr(importlib.import_module(module), name)


def report(result: CaseResult, every_tensor: bool = False) -> str:
    """Returns the lines about one case: a summary, then the failures.

    Args:
      result: The case.
      every_tensor: Whether tensors that passed are listed too.
    """
    title = f"{result.kind}/{result.folder.resolve().name}"
    if result.is_excepted:
        return _plain(f"LEFT OUT  {title}: kind excepted")
    far = max((row.absolute for row in result.rows), default=0.0)
    part = max((row.relative for row in result.rows), default=0.0)
    lines = [
        f"{_verdict(result):<8}  {title:<45} {len(result.rows):>4}"
        f" tensors  absolute {_number(far)}  relative {_number(part)}"
    ]
    for row in result.rows:
        if every_tensor or result.is_far(row):
            lines.append(_row(row))
    lines += [f"    {line}" for text in result.problems for line in text.splitlines()]
    for reason, names in result.left_out.items():
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        lines.append(f"    left out, {reason}: {len(names)} ({shown})")
    return "\n".join(map(_plain, lines))


def _verdict(result: CaseResult) -> str:
    if not result.passed:
        return "FAIL"
    return "pass" if result.dtype == "float32" else result.dtype


def _row(row: Row) -> str:
    mark = "ok" if row.is_equal else "DIFFERS"
    return (
        f"    {mark:<8}{row.name:<42} absolute {_number(row.absolute)}"
        f"  relative {_number(row.relative)}  ({row.limit})"
    )


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "    inf"


def _plain(line: str) -> str:
    """Returns a line without terminal control characters, cut if very long."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return text if len(text) <= 400 else text[:397] + "..."


def verify(
    paths: Sequence[pathlib.Path],
    excepted: Sequence[str] = (),
    every_tensor: bool = False,
    show: Callable[[str], None] = lambda line: None,
    dtype: str = "float32",
) -> bool:
    """Runs all cases at and below the paths; returns whether none failed.

    Args:
      paths: Folders of cases, of kinds, or of sets.
      excepted: Kinds that are not run.
      every_tensor: Whether tensors that passed are listed too.
      show: Called with each line of the report.
      dtype: As for `verify_case`.
    """
    results = []
    for folder in find_cases(paths):
        results.append(verify_case(folder, excepted, dtype))
        show(report(results[-1], every_tensor))
    left_out = sorted({result.kind for result in results if result.is_excepted})
    run = [result for result in results if not result.is_excepted]
    failed = sum(not result.passed for result in run)
    tensors = sum(len(result.rows) for result in run)
    show(
        _plain(
            f"{len(run)} cases, {tensors} tensors, {failed} failed;"
            f" kinds left out: {', '.join(left_out) or 'none'}"
        )
    )
    return not failed
