"""Kills trainings at random moments, and checks that they go on bit for bit.

    python launch/kill_training.py [--kills=20] [--folder=FOLDER] [--stages dmd ...]

Every stage of the ladder, made very short, is run to its end; then once more, killed
(SIGKILL) again and again, every other time while a checkpoint is being written, and
started with the same command. The last checkpoints of both must hold the same bits.
Prints one JSON, and ends with status 1 if anything differs.
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

from anchor_jax import checkpoint

SHORT = ("--config.steps=10", "--config.batch=2", "--config.save_every=2")
CLIP = ("--config.distillation.frames=6", "--config.distillation.every=2")
STAGES = {
    "teacher": ("train_teacher", "--config.regression.blocks=2"),
    "causal": ("train_causal", "--config.data.size=48"),
    "guided": ("train_causal:guided", "--config.data.size=48"),
    "dmd": ("train_dmd:tiny", "--config.distillation.length=6", *CLIP),
    "streaming": (
        "train_streaming:tiny",
        "--config.distillation.length=18",
        "--config.distillation.switches=(6,)",
        *CLIP,
    ),
}
SAVING = "*orbax-checkpoint-tmp*"


def command(stage: str, out: pathlib.Path, teacher: pathlib.Path) -> list[str]:
    """Returns the command line of a stage."""
    config, *more = STAGES[stage]
    weights = "fresh" if stage == "teacher" else teacher
    line = [sys.executable, "-m", "anchor_jax", "train", f"--config={config}", *SHORT]
    line += [f"--config.out={out}", f"--config.weights={weights}", *more]
    if ":" in config:
        line.append(f"--config.teacher={teacher}")
    elif stage == "teacher":
        line.append("--config.data.size=16")
    return line


def finish(line: list[str]) -> float:
    """Runs a command to its end and returns its seconds."""
    began = time.monotonic()
    subprocess.run(line, check=True, capture_output=True, text=True)
    return time.monotonic() - began


def kill(
    line: list[str], out: pathlib.Path, seconds: float, in_save: bool
) -> str | None:
    """Starts a command, kills it, and returns what it was doing; None if it ended."""
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    began = time.monotonic()
    while process.poll() is None:
        is_saving = any(out.glob(SAVING))
        if in_save and is_saving:
            time.sleep(random.uniform(0, 0.05))
            break
        if not in_save and time.monotonic() - began > seconds:
            break
        time.sleep(0.002)
    is_saving = any(out.glob(SAVING))
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    if process.returncode != -signal.SIGKILL:
        if process.returncode:
            raise RuntimeError(output.decode()[-2000:])
        return None
    return "saving" if is_saving else f"after {time.monotonic() - began:.1f} s"


def differing(first: pathlib.Path, second: pathlib.Path) -> list[str]:
    """Returns the arrays of two runs' last checkpoints that do not have equal bits."""
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


def endure(stage: str, folder: pathlib.Path, kills: int) -> dict:
    """Returns the moments at which a stage was killed, and what differed at its end.

    A run that ends before it is killed is compared, and begun anew.
    """
    teacher, killed = folder / "teacher-whole", folder / f"{stage}-killed"
    whole, timed = folder / f"{stage}-whole", folder / f"{stage}-timed"
    finish(command(stage, whole, teacher))
    seconds = finish(command(stage, timed, teacher))
    line, moments, found = command(stage, killed, teacher), [], []
    while len(moments) < kills:
        after = random.uniform(0.3, 0.9) * seconds
        moment = kill(line, killed, after, len(moments) % 2 == 1)
        if moment is None:
            found += differing(whole, killed)
            shutil.rmtree(killed)
        else:
            moments.append(moment)
    finish(line)
    return {"kills": moments, "differing": found + differing(whole, killed)}


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
    finish(command("teacher", folder / "teacher-whole", folder))
    for stage in given.stages:
        report[stage] = endure(stage, folder, per_stage)
        sys.stderr.write(f"{stage}: {report[stage]}\n")
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return int(any(one["differing"] for one in report.values()))


if __name__ == "__main__":
    sys.exit(main())
