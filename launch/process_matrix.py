"""Trains every stage by one, two and four processes, and compares the numbers.

    python launch/process_matrix.py [--stages dmd ...] [--folder=FOLDER]

Every process is started by the command's own flags, on simulated CPU devices: 2x1, 2x2
and 4x1 (processes x devices of each). The losses of two steps, and the first step's
gradients of every array (the optimizers' first moments) are compared with those of one
process and one device, relative to the largest value of each array. Prints a table; the
status is 1 if a difference is above 1e-5. It takes about 20 minutes on two cores.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

import device_results
import jax
import kill_processes
import kill_training
import numpy as np

from anchor_jax.training import files
from anchor_jax.training.monitor import MEASURED
from anchor_jax.weights import checkpoint

SHAPES = ((1, 1), (2, 1), (2, 2), (4, 1))
STAGES = tuple(name for name in kill_training.STAGES if name != "trajectories")
SHORT = (
    "--config.steps=2",
    "--config.batch=4",
    "--config.save_every=1",
    "--config.log_every=1",
    "--config.sample_every=0",
)
# A teacher trained for a few steps ignores the prompt. Its guidance is then only
# rounding, and so is the gradient of a distillation whose critic starts from it.
TAUGHT = {stage: ("--config.teacher=tiny",) for stage in ("dmd", "streaming")}
MOST = 1e-5
STUCK = 900  # seconds after which a run counts as hanging


def folder_of(stage: str, shape: tuple[int, int], folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder of a run."""
    return folder / f"{stage}-{shape[0]}x{shape[1]}"


def train(stage: str, shape: tuple[int, int], folder: pathlib.Path) -> None:
    """Trains a stage by processes with a number of devices each."""
    count, devices = shape
    line = kill_training.command(stage, folder_of(stage, shape, folder))
    line += [*SHORT, *TAUGHT.get(stage, ())]
    environment = os.environ | {
        "ANCHOR_JAX_CACHE": str(folder / "cache"),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    running = kill_processes.start(
        line, count, lambda number: folder / f"output-{number}.txt", environment
    )
    deadline = time.monotonic() + STUCK
    while any(one.poll() is None for one in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    for one in running:
        if one.poll() is None:
            kill_processes.kill_all(one.pid)
    if any([one.wait() for one in running]):
        raise SystemExit((folder / "output-0.txt").read_text()[-3000:])


def gradients(out: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the optimizers' first moments after the first step."""
    found = {}
    for name in ("opt_generator", "opt_fake_score"):
        if name in checkpoint.items(out / "1"):
            tree = checkpoint.restore(out / "1", name)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                key = jax.tree_util.keystr(path)
                if "mu" in key:
                    found[name + key] = np.asarray(leaf)
    return found


def losses(out: pathlib.Path) -> dict[str, float]:
    """Returns what the stage has logged."""
    return {
        f"{name} {line['step']}": value
        for line in files.read_log(out)
        for name, value in line.items()
        if not MEASURED.fullmatch(name) and name != "step"
    }


def distance(ours: dict, theirs: dict) -> float:
    """Returns the largest difference relative to the largest value of each entry."""
    if not ours or ours.keys() != theirs.keys():
        raise SystemExit(f"names differ: {sorted(ours)}, {sorted(theirs)}")
    return float(
        np.max(
            [
                np.max(np.abs(ours[key] - theirs[key]))
                / max(np.max(np.abs(theirs[key])), 1e-12)
                for key in ours
            ]
        )
    )


def say(line: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Runs the command, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the numbers")
    parser.add_argument("--folder", type=pathlib.Path, help="kept; default: temporary")
    given = parser.parse_args()
    folder = (given.folder or pathlib.Path(tempfile.mkdtemp())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for stage in kill_training.FIRST:
        out = kill_training.whole(stage, folder)
        if not out.exists():
            kill_training.finish(kill_training.command(stage, out))
    say(f"| {' | '.join(device_results.STAGE_TITLES)} |\n|---|---|---|---|")
    rows = []
    for stage in given.stages:
        for shape in SHAPES:
            train(stage, shape, folder)
            if shape == SHAPES[0]:
                continue
            pair = [folder_of(stage, one, folder) for one in (shape, SHAPES[0])]
            numbers = [distance(*map(read, pair)) for read in (losses, gradients)]
            names = ("stage", "processes", "devices", "losses", "gradients")
            rows.append(dict(zip(names, (stage, *shape, *numbers), strict=True)))
            _, row = device_results.stages({"rows": rows[-1:]})
            say(f"| {' | '.join(row)} |")
            if given.out:
                given.out.write_text(json.dumps({"most": MOST, "rows": rows}, indent=1))
    worst = [row[name] for row in rows for name in ("losses", "gradients")]
    return int(not np.max(worst) <= MOST)


if __name__ == "__main__":
    sys.exit(main())
