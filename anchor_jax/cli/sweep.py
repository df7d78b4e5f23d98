"""`anchor-jax sweep`: one training run per combination of field values."""

import ast
import dataclasses
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

from anchor_jax import interrupts
from anchor_jax.config import define_config_flag
from anchor_jax.errors import Stopped, UserError, suggest
from anchor_jax.io import expand

SUMMARY = "Train once per combination of field values, and tabulate the results."
USAGE = """\
anchor-jax sweep --config=configs/train_teacher.py --config.out=runs/sweep \\
    --vary=optimizer.learning_rate=1e-3,3e-3 --vary=seed=0,1
anchor-jax sweep --config=configs/train_dmd.py:tiny --config.out=runs/steps \\
    --config.weights=runs/guided --config.teacher=runs/teacher \\
    --vary=distillation.steps=(1000,500),(1000,750,500,250)

The combinations are trained one after another, each in its own process and in its own
folder below --config.out. A failed training does not stop the others. The same command
resumes a stopped sweep and skips finished trainings. Another command with the same OUT
adds its combinations. OUT/sweep.json and OUT/sweep.md hold the last metrics of each
training; tensorboard --logdir OUT shows all of them."""

FLAGS = flags.FLAGS

_MOST = 1000
_GRACE = 10.0  # seconds that a training has to save after its sweep was killed
_POLL = 0.1  # seconds
_STOPPING = "stopping with a checkpoint; press Ctrl-C again to stop at once"
_NUMBERS = ("loss", "generator_loss", "critic_loss", "score_gap", "seconds_per_step")


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination: its values by field, and the config of its training."""

    values: Mapping[str, Any]
    config: Any

    @property
    def name(self) -> str:
        return name_of(self.values)

    @property
    def folder(self) -> pathlib.Path:
        return expand(self.config.out)


def define_flags() -> None:
    """Defines the command's flags."""
    define_config_flag()
    flags.DEFINE_multi_string(
        "vary",
        [],
        "Config field and its values, as FIELD=VALUE,VALUE,... Repeat the flag to"
        " combine several fields.",
    )


def main(argv) -> int:
    """Runs the command, and returns 1 if a training failed.

    Raises:
      UserError: A flag or a combination is wrong, or another process writes into the
        folder. Nothing has been trained.
      Stopped: It stopped on request.
    """
    del argv
    from anchor_jax import ownership

    points = make_points(FLAGS.config, FLAGS.vary)
    folder = expand(FLAGS.config.out)
    remedy = "wait until it ends, stop it, or choose another --config.out"
    with ownership.own(folder, tell=print, remedy=remedy):
        return _run_points(folder, points)


def _run_points(folder: pathlib.Path, points: list[Point]) -> int:
    from anchor_jax import io

    results = _earlier(folder, points)
    for number, point in enumerate(points, 1):
        print(f"{number} of {len(points)}: {point.name}")
        status = run_point(point)
        results.append({"values": point.values, "status": status, **_last(point)})
        io.write_json(folder / "sweep.json", results)
        io.write_text(folder / "sweep.md", table(results) + "\n")
        if interrupts.stop_requested():
            raise Stopped(f"Stopped at {point.name}. Rerun this command to resume.")
    print(table(results))
    print(f"Wrote {folder / 'sweep.json'} and .md; tensorboard --logdir {folder}")
    return int(any(one["status"] != "finished" for one in results[-len(points) :]))


def _earlier(folder: pathlib.Path, points: list[Point]) -> list[dict[str, Any]]:
    """Returns the stored results that none of the combinations will replace.

    Raises:
      UserError: The stored table is damaged.
    """
    from anchor_jax.io import read_json

    path = folder / "sweep.json"
    remedy = (
        "remove it, and rerun the earlier sweeps' commands: finished trainings are"
        " skipped"
    )
    try:
        stored = read_json(path, list, remedy)
    except FileNotFoundError:
        return []
    for one in stored:
        if not _is_result(one):
            raise UserError(
                f"{path} holds {repr(one)[:60]}, which is not a result; {remedy}"
            )
    replaced = {point.name for point in points}
    named = {name_of(one["values"]): one for one in stored}
    return [one for name, one in named.items() if name not in replaced]


def _is_result(one: Any) -> bool:
    """Returns whether a value is one row of the table."""
    if not isinstance(one, dict) or not isinstance(one.get("values"), dict):
        return False
    numbers = [one[name] for name in _NUMBERS if name in one]
    return isinstance(one.get("status"), str) and all(
        type(value) in (int, float) for value in numbers
    )


def make_points(config, vary: list[str]) -> list[Point]:
    """Returns the checked trainings of all combinations.

    Raises:
      UserError: A value is wrong, or there are no values or too many.
    """
    from anchor_jax.training import run

    if not vary:
        raise UserError(
            "--vary is missing; give a field and its values, such as"
            " --vary=optimizer.learning_rate=1e-3,3e-3"
        )
    axes = dict(_axis(config, one) for one in vary)
    if not axes or len(axes) < len(vary):
        raise UserError(
            f"--vary={vary}: a field may be given only once, such as"
            " --vary=optimizer.learning_rate=1e-3,3e-3"
        )
    points = []
    for chosen in itertools.islice(itertools.product(*axes.values()), _MOST + 1):
        values = dict(zip(axes, chosen, strict=True))
        changed = config.copy_and_resolve_references()
        for field, value in values.items():
            _set(changed, field, value)
        changed.out = str(pathlib.Path(config.out) / name_of(values))
        points.append(Point(values, run.read_config(changed)))
    if len({point.name for point in points}) < len(points) or len(points) > _MOST:
        raise UserError(
            f"--vary={vary}: combinations must have different names, and there may be"
            f" at most {_MOST}"
        )
    return points


def name_of(values: Mapping[str, Any]) -> str:
    """Returns the name of a combination's folder."""
    named = ",".join(f"{field}={value}" for field, value in values.items())
    return re.sub(r"[^\w.,=+-]+", "_", named)


def _axis(config, text: str) -> tuple[str, tuple]:
    """Returns the field and the values of `FIELD=VALUE,VALUE`."""
    field, equals, values = text.partition("=")
    if not equals or not values.strip():
        raise UserError(f"--vary={text}: must be of the form FIELD=VALUE,VALUE")
    if field in ("out", ""):
        raise UserError(f"--vary={text}: must name a config field other than out")
    try:
        found = ast.literal_eval(f"[{values}]")
    except (ValueError, SyntaxError):
        found = [one.strip() for one in values.split(",")]
    for value in found:
        _set(config.copy_and_resolve_references(), field, value)
    return field, tuple(found)


def _set(config, field: str, value: Any) -> None:
    *sections, last = field.split(".")
    for name in sections:
        config = _part(config, field, name)
    _part(config, field, last)
    try:
        config[last] = value
    except (TypeError, ValueError) as error:
        kind = config.get_type(last).__name__
        raise UserError(
            f"--vary={field}: got {value!r}, expected {kind}; the config has"
            f" {config[last]!r}"
        ) from error


def _part(config, field: str, name: str) -> Any:
    known = config if hasattr(config, "keys") else {}
    if name not in known:
        raise UserError(
            f"--vary={field}: no field {name!r}{suggest(name, known, 'fields')}"
        )
    return config[name]


def run_point(point: Point) -> str:
    """Trains in a new process unless already finished; returns the status."""
    from anchor_jax.training import resume

    try:
        resume.compare_config(point.config, point.folder, print)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return "another config"
    if _is_finished(point):
        print(f"{point.folder} is finished")
        return "finished"
    # Spawned, not forked, so that device memory is freed when the process ends.
    process = multiprocessing.get_context("spawn").Process(
        target=train_point, args=(point.config,), daemon=True
    )
    with interrupts.patient(_STOPPING):
        with interrupts.held_back():
            process.start()
        while process.is_alive():
            process.join(_POLL)
            if interrupts.stop_requested():
                process.terminate()  # The training saves a checkpoint and stops.
                process.join()
    if process.exitcode not in (0, interrupts.STATUS):
        return "failed"
    return "finished" if _is_finished(point) else "stopped"


def train_point(config) -> None:
    """Trains one combination: the main function of a training's process."""
    interrupts.install()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from anchor_jax.cli import compile_cache
    from anchor_jax.training import run

    compile_cache.enable()
    try:
        # After a sweep was killed, its training ends a little later.
        run.open_training(config, tell=print, patience=2 * _GRACE).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped:
        sys.exit(interrupts.STATUS)


def _end_with_parent() -> None:
    """Waits until the sweep's process ends, then stops this training with a save."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    multiprocessing.connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    from anchor_jax import io

    io.remove_unfinished()
    os._exit(143)


def _is_finished(point: Point) -> bool:
    from anchor_jax.weights import checkpoint

    present = checkpoint.is_checkpoint(point.folder)
    return present and checkpoint.last_step(point.folder) >= point.config.steps


def _last(point: Point) -> dict[str, Any]:
    """Returns the last logged mean of each metric."""
    from anchor_jax.training import files

    found: dict[str, Any] = {}
    try:
        for line in files.read_log(point.folder):
            found |= line
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as a Markdown table, one row per combination."""
    fields = list(dict.fromkeys(name for one in results for name in one["values"]))
    numbers = [name for name in _NUMBERS if any(name in one for one in results)]
    rows = [[*fields, "status", "step", *numbers], ["---"] * (len(fields) + 2)]
    rows[1] += ["---"] * len(numbers)
    for one in results:
        cells = [one["values"].get(field, "") for field in fields]
        cells += [one["status"], one.get("step", "")]
        cells += [f"{one[name]:.5g}" if name in one else "" for name in numbers]
        rows.append(cells)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
