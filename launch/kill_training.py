"""Kills trainings at random moments, and checks that they resume bit for bit.

    python launch/kill_training.py [--kills=20] [--folder=FOLDER] [--stages dmd ...]

Every stage of the ladder, made very short, is run to its end. Then it is run again and
killed (SIGKILL) repeatedly, every other time while a checkpoint or a shard is being
written, and restarted with the same command. The results of both, the last checkpoints
or all trajectories, must be bit-identical. Prints one JSON, and ends with status 1 if
anything differs.
"""

import argparse
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from anchor_jax.training.data import trajectories
from anchor_jax.weights import checkpoint

SHORT = ("--config.steps=10", "--config.batch=2", "--config.save_every=2")
CLIP = ("--config.distillation.frames=6", "--config.distillation.every=2")
STAGES = {
    "teacher": (
        "train_teacher",
        "--config.regression.blocks=2",
        "--config.data.size=16",
    ),
    "causal": ("train_causal", "--config.data.size=48"),
    "guided": ("train_causal:guided", "--config.data.size=48"),
    "trajectories": ("trajectories", "--config.count=48", "--config.frames=6"),
    "ode": ("train_ode:tiny", "--config.regression.blocks=2"),
    "dmd": ("train_dmd:tiny", "--config.distillation.length=6", *CLIP),
    "streaming": (
        "train_streaming:tiny",
        "--config.distillation.length=18",
        "--config.distillation.switches=(6,)",
        *CLIP,
    ),
}
# Stages that others start from, and stages that need a teacher.
FIRST = ("teacher", "trajectories")
TAUGHT = ("guided", "dmd", "streaming")
SAVING = ("*orbax-checkpoint-tmp*", ".*.part*")


def command(stage: str, out: pathlib.Path) -> list[str]:
    """Returns the command line of a stage."""
    config, *more = STAGES[stage]
    teacher = whole("teacher", out.parent)
    weights = "fresh" if stage == "teacher" else teacher
    line = [sys.executable, "-m", "anchor_jax"]
    line += ["trajectories"] if stage == "trajectories" else ["train", *SHORT]
    line += [f"--config={config}", f"--config.out={out}"]
    line += [f"--config.weights={weights}", *more]
    if stage in TAUGHT:
        line.append(f"--config.teacher={teacher}")
    elif stage == "ode":
        line.append(f"--config.data.path={whole('trajectories', out.parent)}")
    return line


def whole(stage: str, folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the run that is not killed."""
    return folder / f"{stage}-whole"


def is_saving(out: pathlib.Path) -> bool:
    """Returns whether a file in a run's folder is being written."""
    return any(path for pattern in SAVING for path in out.glob(pattern))


def finish(line: list[str]) -> float:
    """Runs a command to the end and returns the seconds."""
    began = time.monotonic()
    subprocess.run(line, check=True, capture_output=True, text=True)
    return time.monotonic() - began


def kill(
    line: list[str], out: pathlib.Path, seconds: float, in_save: bool
) -> str | None:
    """Starts a command, kills it, and returns its activity, or None if it had ended."""
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    began = time.monotonic()
    while process.poll() is None:
        if in_save and is_saving(out):
            time.sleep(random.uniform(0, 0.05))
            break
        if not in_save and time.monotonic() - began > seconds:
            break
        time.sleep(0.002)
    was_saving = is_saving(out)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    if process.returncode != -signal.SIGKILL:
        if process.returncode:
            raise RuntimeError(output.decode()[-2000:])
        return None
    return "saving" if was_saving else f"after {time.monotonic() - began:.1f} s"


def differing(stage: str, first: pathlib.Path, second: pathlib.Path) -> list[str]:
    """Returns the arrays of two runs that are not bit-identical."""
    if stage == "trajectories":
        return differing_clips(*map(trajectories.Trajectories, (first, second)))
    found = []
    if checkpoint.last_step(first) != checkpoint.last_step(second):
        return [f"steps {checkpoint.last_step(first)}, {checkpoint.last_step(second)}"]
    names = [name for name in checkpoint.items(first) if name not in ("data", "meta")]
    for name in names:
        pair = [
            jax.tree_util.tree_flatten_with_path(checkpoint.restore(folder, name))[0]
            for folder in (first, second)
        ]
        for (path, a), (_, b) in zip(*pair, strict=True):
            if np.asarray(a).tobytes() != np.asarray(b).tobytes():
                found.append(f"{name}{jax.tree_util.keystr(path)}")
    return found


def differing_clips(
    first: trajectories.Trajectories, second: trajectories.Trajectories
) -> list[str]:
    """Returns the trajectories of two folders that are not bit-identical."""
    if first.numbers != second.numbers:
        return [f"numbers {first.numbers}, {second.numbers}"]
    return [
        f"trajectory {number}"
        for number, a, b in zip(first.numbers, first, second, strict=True)
        if a["prompt"] != b["prompt"] or a["states"].tobytes() != b["states"].tobytes()
    ]


def endure(stage: str, folder: pathlib.Path, kills: int) -> dict:
    """Returns the moments at which a stage was killed, and the final differences.

    A run that ends before it is killed is compared and started again.
    """
    killed, timed = folder / f"{stage}-killed", folder / f"{stage}-timed"
    finish(command(stage, whole(stage, folder)))
    seconds = finish(command(stage, timed))
    line, moments, found = command(stage, killed), [], []
    while len(moments) < kills:
        after = random.uniform(0.3, 0.9) * seconds
        moment = kill(line, killed, after, len(moments) % 2 == 1)
        if moment is None:
            found += differing(stage, whole(stage, folder), killed)
            shutil.rmtree(killed)
        else:
            moments.append(moment)
    finish(line)
    found += differing(stage, whole(stage, folder), killed)
    return {"kills": moments, "differing": found}


def main() -> int:
    """Runs every stage and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), help="some only")
    parser.add_argument("--folder", type=pathlib.Path)
    given = parser.parse_args()
    folder = given.folder or pathlib.Path(tempfile.mkdtemp())
    random.seed(given.seed)
    report, per_stage = {}, -(-given.kills // len(given.stages))
    for stage in FIRST:
        finish(command(stage, whole(stage, folder)))
    for stage in given.stages:
        report[stage] = endure(stage, folder, per_stage)
        sys.stderr.write(f"{stage}: {report[stage]}\n")
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return int(any(one["differing"] for one in report.values()))


if __name__ == "__main__":
    sys.exit(main())
