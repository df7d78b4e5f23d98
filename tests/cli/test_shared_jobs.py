"""Work that several processes of one job share: samples, scores, trajectories."""

import json

import numpy as np
import pytest
import running

from anchor_jax import processes
from anchor_jax.cli import score
from anchor_jax.cli.main import main
from anchor_jax.evaluation.protocol import Division
from anchor_jax.training.data.trajectories import Trajectories

pytestmark = pytest.mark.usefixtures("optimized_compilation")


def run(line):
    """Runs a command as two processes; returns statuses and outputs."""
    port = running.free_port()
    return running.ends([running.by_flags(line, port, number) for number in range(2)])


def sampling(weights, prompts, out):
    return [
        *("sample", "--config=tiny", f"--config.weights={weights}"),
        *(f"--config.prompt_file={prompts}", f"--out={out}"),
        "--config.sampler.steps=(1000, 500)",
    ]


def contents(folder):
    """Returns the bytes of all files, and the recipes as values."""
    found = {one.name: one.read_bytes() for one in folder.iterdir()}
    recipes = {
        name: json.loads(found.pop(name)) for name in [*found] if "json" in name[-4:]
    }
    found.pop("manifest.jsonl")
    return found, recipes


@pytest.mark.slow
def test_two_processes_make_the_videos_of_one_each_once(weights, tmp_path, capsys):
    prompts, out, alone = (tmp_path / name for name in ("p.txt", "out", "alone"))
    prompts.write_text("".join(f"a red ring {n}[3f]\n" for n in range(3)))

    statuses, outputs = run(sampling(weights, prompts, out))

    assert statuses == [0, 0], outputs
    assert "Wrote 3 videos" in outputs[0] and "002.mp4" in outputs[0]
    assert "Wrote" not in outputs[1] and "preparing" not in outputs[1]
    lines = (out / "manifest.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["state"] for one in found] == ["finished"] * 3
    assert [one["made_by"]["process"] for one in found] == [0, 1, 0]

    # One process has nothing to do in the folder, and makes the same elsewhere.
    assert main(sampling(weights, prompts, out)) == 0
    assert "Skipped 3 existing videos" in capsys.readouterr().out
    assert running.ends([running.start(sampling(weights, prompts, alone))])[0] == [0]
    ours, theirs = contents(out), contents(alone)
    assert ours[0] == theirs[0]
    assert [*ours[1]] and ours[1].keys() == theirs[1].keys()
    for name, recipe in ours[1].items():
        del recipe["made_by"]
        assert recipe == theirs[1][name]


@pytest.mark.slow
def test_two_processes_score_like_one(weights, tmp_path):
    line = [
        *("score", "--config=tiny", f"--config.weights={weights}"),
        *("--config.size=64x64", "--count=3", "--batch=2", "--blocks=1"),
        *("--config.sampler.steps=(1000, 500)", "--metrics=temporal_flickering"),
    ]

    statuses, outputs = run([*line, f"--out={tmp_path / 'two.json'}"])

    assert statuses == [0, 0], outputs
    assert outputs[0].count("Wrote") == 1 and "Wrote" not in outputs[1]
    assert main([*line, f"--out={tmp_path / 'one.json'}"]) == 0
    two, one = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one")
    )
    assert two == one
    assert two["metrics"]["temporal_flickering"]["temporal_flickering"]["n"] == 3


def test_the_sharing_of_trajectories_is_given_once(monkeypatch, capsys):
    monkeypatch.setattr(processes, "is_joined", lambda: True)
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "is_said_by_first", lambda line: False)
    monkeypatch.setattr("anchor_jax.cli.jobs.join", lambda command: None)

    assert main(["trajectories", "--config=trajectories", "--processes=3"]) == 2
    assert "the job has 2 processes" in capsys.readouterr().err


def test_one_process_scores_every_batch():
    division = score._division()

    assert isinstance(division, Division) and all(map(division.has, range(3)))
    assert division.join([1, 2]) == [1, 2]


IMPATIENT = """
import runpy, sys
from anchor_jax import shares
shares.SEEN_BY = 1.0
runpy.run_module("anchor_jax", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ("a blue ring[3f]", "hash of the prompts: process 1"),
        ("a red ring[3f]", "cannot see the files that process 0 writes"),
    ],
)
def test_hosts_with_files_of_their_own_are_refused(weights, tmp_path, second, expected):
    line = sampling(weights, "~/p.txt", "~/out")
    line += [f"--coordinator=127.0.0.1:{running.free_port()}", "--num_processes=2"]
    started = []
    for number, prompts in enumerate(("a red ring[3f]", second)):
        home = tmp_path / str(number)
        home.mkdir()
        (home / "p.txt").write_text(prompts)
        own = f"--process_id={number}"
        given = [*line, own]
        started.append(running.start(given, ("-c", IMPATIENT), HOME=str(home)))

    statuses, outputs = running.ends(started)

    assert statuses == [2, 2], outputs
    assert expected in outputs[0]
    assert not [*tmp_path.rglob("*.mp4")]


@pytest.mark.slow
def test_two_processes_write_the_trajectories_of_one(weights, tmp_path):
    def line(out):
        return [
            *("trajectories", "--config=trajectories", f"--config.weights={weights}"),
            *(f"--config.out={tmp_path / out}", "--config.count=3"),
            *("--config.batch=1", "--config.frames=3", "--config.steps=4"),
        ]

    statuses, outputs = run(line("two"))

    assert statuses == [0, 0], outputs
    assert "All 3 trajectories are in" in outputs[0]
    assert "trajectories are in" not in outputs[1]
    # Programs of this process are compiled with other flags.
    assert running.ends([running.start(line("one"))])[0] == [0]
    two, one = (Trajectories(tmp_path / name) for name in ("two", "one"))
    assert two.numbers == one.numbers == (0, 1, 2) and two.inputs == one.inputs
    for place in range(3):
        assert two[place]["prompt"] == one[place]["prompt"]
        np.testing.assert_array_equal(two[place]["states"], one[place]["states"])
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        *("spec.json", "000000000.array_record", "000000001.array_record"),
    }
