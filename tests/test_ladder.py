"""The script of the whole ladder: its order, its commands, its table."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from absl import flags

from anchor_jax.cli import main, score, train
from anchor_jax.sampling.config import read_config as read_sampling
from anchor_jax.training import run

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "launch" / "ladder" / "results.md"
SCORES = ROOT / "launch" / "ladder"
# What a command leaves behind, without its work.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$(IFS=$'\\t'; echo "$*")" >> "$STAND_IN_LOG"
for flag in "$@"; do
  case $flag in --out=*) out="${flag#--out=}" ;; esac
done
[[ -n "${STAND_IN_STOPS-}" && "$*" == *"$STAND_IN_STOPS"* ]] && exit 130
case $1 in
  score) cp "$STAND_IN_SCORES/$(basename "$out")" "$out" ;;
  export) mkdir "$out" && touch "$out/model.safetensors" ;;
esac
"""
STAGES = ["teacher6", "teacher21", "teacher", "causal", "guided", "dmd", "streaming"]


@pytest.fixture
def scores(tmp_path):
    """Those of the repository, under the names that the script gives them."""
    folder = tmp_path / "scores"
    folder.mkdir()
    shutil.copy(SCORES / "teacher" / "score.json", folder / "teacher_clips.json")
    for stage in ("guided", "dmd", "streaming"):
        for path in (SCORES / stage).glob("*.json"):
            shutil.copy(path, folder / f"{stage}_{path.name}")
    for path in (SCORES / "causal").glob("*.json"):
        shutil.copy(path, folder / path.name.replace("steps", "causal"))
    return folder


@pytest.fixture
def ladder(tmp_path, scores):
    """Runs the script; returns how it ended, and the commands that it gave."""
    programs = tmp_path / "bin"
    programs.mkdir()
    python = f'#!/usr/bin/env bash\nexec "{sys.executable}" "$@"\n'
    for name, text in (("anchor-jax", STAND_IN), ("python", python)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    log = tmp_path / "log"
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "STAND_IN_LOG": str(log),
        "STAND_IN_SCORES": str(scores),
    }

    def climb(**more):
        log.write_text("")
        script = [ROOT / "launch" / "tiny_ladder.sh", tmp_path / "out"]
        done = subprocess.run(
            script, env=environment | more, cwd=tmp_path, capture_output=True, text=True
        )
        lines = log.read_text().splitlines()
        return done, [line.split("\t") for line in lines]

    return climb


def trainings(commands):
    return [command for command in commands if command[0] == "train"]


def test_each_stage_begins_with_an_earlier_one(ladder, tmp_path):
    done, commands = ladder()
    assert done.returncode == 0, done.stderr
    made = []
    for command in trainings(commands):
        given = dict(flag.split("=", 1) for flag in command[1:])
        for name in ("--config.weights", "--config.teacher"):
            assert pathlib.Path(given.get(name, "-")).name in {"-", *made}
        made.append(pathlib.Path(given["--config.out"]).name)
    assert made == STAGES
    assert commands[-1][0] == "export"
    assert f"--weights={tmp_path / 'out' / 'streaming'}" in commands[-1]


def test_the_commands_are_ones_that_train_and_score_read(ladder, monkeypatch):
    monkeypatch.chdir(ROOT)
    read = []
    for module, reader in ((train, run.read_config), (score, read_sampling)):

        def keep(argv, reader=reader):
            read.append(reader(flags.FLAGS.config))

        monkeypatch.setattr(module, "main", keep)
    _, commands = ladder()
    ran = [command for command in commands if command[0] != "export"]
    assert [main.main(command) for command in ran] == [0] * len(ran)
    assert len(read) == len(ran) == 19


def test_run_again_it_trains_on_and_scores_nothing_twice(ladder):
    ladder()
    done, commands = ladder()
    assert done.returncode == 0, done.stderr
    assert commands == trainings(commands)
    assert len(commands) == len(STAGES)


def test_a_stage_that_is_there_as_a_bundle_is_not_trained(ladder, tmp_path):
    (tmp_path / "out" / "teacher").mkdir(parents=True)
    (tmp_path / "out" / "teacher" / "model.safetensors").touch()

    done, commands = ladder()

    assert done.returncode == 0, done.stderr
    assert len(trainings(commands)) == len(STAGES) - 3
    causal = trainings(commands)[0]
    assert f"--config.weights={tmp_path / 'out' / 'teacher'}" in causal


def test_a_training_that_was_stopped_ends_it(ladder):
    done, commands = ladder(STAND_IN_STOPS="out/causal")
    assert done.returncode == 130
    assert commands[-1][0] == "train" and "causal" in commands[-1][1]


def test_a_teacher_below_the_gate_is_not_distilled(ladder, scores):
    path = scores / "teacher_clips.json"
    found = json.loads(path.read_text())
    found["held_out"]["motion"]["rate"] = 0.5
    path.write_text(json.dumps(found))
    done, commands = ladder()
    assert done.returncode == 1
    assert "gate: motion 0.500 is below 0.85" in done.stdout
    assert len(trainings(commands)) == 3


def test_its_table_is_the_shipped_one(ladder, tmp_path):
    ladder()
    rows = (tmp_path / "out" / "results.md").read_text().split("\n\n")[0]
    assert rows.startswith("|  | causal teacher")
    assert rows in RESULTS.read_text()


def test_the_shipped_scores_are_those_of_the_page():
    sets = ("switch_960", "switch_480_seed11", "switch_960_seed12")
    shown = RESULTS.read_text().splitlines()
    after = [
        json.loads((SCORES / "streaming" / f"{name}.json").read_text())["after_switch"]
        for name in sets
    ]
    for metric, row in (("shape", "shape"), ("shape_iou", "shape, IoU > 0.7")):
        cells = [
            "{rate:.3f} [{low:.3f}, {high:.3f}]".format(**one[metric]) for one in after
        ]
        start = f"| {row}, after the switch | {cells[0]}"
        (line,) = [one for one in shown if one.startswith(start)]
        assert [cell.split(" (")[0].strip() for cell in line.split("|")[2:5]] == cells
