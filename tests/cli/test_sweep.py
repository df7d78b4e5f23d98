"""`anchor-jax sweep`: a training for every combination, and their table."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import bundles
import jax
import pytest

from anchor_jax import interrupts, ownership
from anchor_jax.cli import sweep
from anchor_jax.cli.main import main
from anchor_jax.weights import checkpoint


def run(out, *more):
    flags = (f"--config.out={out}", "--config.steps=1", "--config.batch=4")
    return main(["sweep", "--config=train_teacher", *flags, *more])


@pytest.mark.slow
def test_trainings_that_fail_do_not_stop_the_others(tmp_path, capsys, monkeypatch):
    bundles.save(tmp_path / "good")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    kept = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", kept)
    more = (
        "--config.regression.blocks=1",
        "--config.data.size=8",
        "--config.log_every=1",
        "--config.sample_every=0",
        "--vary=weights=bad,good",
    )

    assert run("runs", *more) == 1

    results = json.loads((tmp_path / "runs" / "sweep.json").read_text())
    assert [one["status"] for one in results] == ["failed", "finished"]
    assert results[1]["values"] == {"weights": "good"} and results[1]["loss"] > 0
    assert checkpoint.last_step(tmp_path / "runs" / "weights=good") == 1
    printed = capsys.readouterr().out
    assert "| good | finished | 1 |" in printed

    # Finished members are not started again.
    monkeypatch.setattr(sweep.multiprocessing, "get_context", None)
    assert run("runs", *more[:-1], "--vary=weights=good") == 0
    printed = capsys.readouterr().out
    assert "| good | finished | 1 |" in printed and "| bad | failed |" in printed
    assert run("runs", *more[:-1], "--config.seed=5", "--vary=weights=good") == 1
    assert "| good | another config | 1 |" in capsys.readouterr().out


def test_every_combination_has_a_folder_of_its_name(tmp_path, monkeypatch):
    seen = {}

    def pretend(point):
        seen[point.folder.relative_to(tmp_path).as_posix()] = point.config
        return "stopped"

    monkeypatch.setattr(sweep, "run_point", pretend)
    rates = "--vary=optimizer.learning_rate=1e-3,2"
    betas = "--vary=optimizer.betas=(0.0, 0.9),(0.9, 0.99)"

    assert run(tmp_path, rates, betas) == 1

    first = seen["optimizer.learning_rate=0.001,optimizer.betas=_0.0,_0.9_"]
    assert len(seen) == 4
    assert first.optimizer.learning_rate == 1e-3
    assert first.optimizer.betas == (0.0, 0.9)
    assert {one.optimizer.learning_rate for one in seen.values()} == {1e-3, 2.0}


def test_a_request_to_stop_ends_the_sweep_after_its_training(
    tmp_path, monkeypatch, capsys
):
    trained = []

    def ask(point):
        trained.append(point.name)
        os.kill(os.getpid(), signal.SIGTERM)
        return "stopped"

    monkeypatch.setattr(sweep, "run_point", ask)

    assert run(tmp_path, "--vary=seed=1,2") == 130

    assert trained == ["seed=1"]
    assert "Stopped at seed=1. Rerun" in capsys.readouterr().err
    (result,) = json.loads((tmp_path / "sweep.json").read_text())
    assert result["status"] == "stopped"


@pytest.mark.parametrize("asked", [False, True])
def test_a_training_that_was_ended_has_stopped(tmp_path, monkeypatch, asked):
    class Process:
        exitcode, ended = None, 0

        def start(self):
            if asked:
                os.kill(os.getpid(), signal.SIGINT)

        def is_alive(self):
            return self.exitcode is None

        def join(self, seconds=None):
            if seconds is None or not asked:
                self.exitcode = 130

        def terminate(self):
            self.ended += 1

    process = Process()
    context = types.SimpleNamespace(Process=lambda **_: process)
    monkeypatch.setattr(sweep.multiprocessing, "get_context", lambda kind: context)
    config = types.SimpleNamespace(out=str(tmp_path), steps=1)
    monkeypatch.setattr("anchor_jax.training.resume.compare_config", lambda *_: None)

    with interrupts.listening():
        assert sweep.run_point(sweep.Point({"seed": 1}, config)) == "stopped"
    assert process.ended == asked


def test_earlier_lines_of_a_table_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "run_point", lambda point: "finished")
    path = tmp_path / "sweep.json"
    path.write_text('[{"values": {"seed": 7}, "status": "finished"}]')

    assert run(tmp_path, "--vary=seed=1") == 0

    results = json.loads(path.read_text())
    assert [one["values"]["seed"] for one in results] == [7, 1]


@pytest.mark.parametrize(
    "stored",
    [
        b'[{"values": {"seed": 7}}]',
        b'[{"values": 7, "status": "finished"}]',
        b'[{"values": {"seed": 7}, "status": "finished", "loss": "low"}]',
        b'[{"values": {"seed": 7',
        b"7",
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_damaged_table_is_named_and_stays(stored, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "run_point", None)
    path = tmp_path / "sweep.json"
    path.write_bytes(stored)

    assert run(tmp_path, "--vary=seed=1") == 2

    assert f"error: {path}" in capsys.readouterr().err
    assert path.read_bytes() == stored


def test_a_damaged_log_stops_no_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "run_point", lambda point: "finished")
    for seed, log in (1, b"\xff\n"), (2, b'{"step": 3, "loss": 0.5}\n'):
        (tmp_path / f"seed={seed}").mkdir()
        (tmp_path / f"seed={seed}" / "log.jsonl").write_bytes(log)

    assert run(tmp_path, "--vary=seed=1,2") == 0

    first, second = json.loads((tmp_path / "sweep.json").read_text())
    assert "loss" not in first and second["loss"] == 0.5
    assert "seed=1/log.jsonl, line 1 is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("vary", "named"),
    [
        ((), "--vary is missing"),
        (("batch=4", "batch=8"), "given only once"),
        (("batch",), "must be of the form FIELD=VALUE"),
        (("batch=4,many",), "batch"),
        (("batch=0",), "config.batch=0"),
        (("bach=4",), "did you mean 'batch'"),
        (("optimizer.lr=4",), "no field 'lr'"),
        (("seed.x=4",), "no field 'x'"),
        (("out=a,b",), "other than out"),
        (("seed=1,1",), "different names"),
    ],
)
def test_invalid_values_are_refused(tmp_path, capsys, vary, named):
    assert run(tmp_path / "x", *(f"--vary={one}" for one in vary)) == 2

    assert named in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


PARENT = """
import multiprocessing, os, signal, sys, threading, time
from anchor_jax import io
from anchor_jax.cli import sweep

def work(asked):
    if asked == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sweep._GRACE = 0.2
    threading.Thread(target=sweep._end_with_parent, daemon=True).start()
    with io.unfinished(io.temporary_name(io.pathlib.Path("a.txt"))) as part:
        part.touch()
        print(os.getpid(), flush=True)
        time.sleep(60)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=work, args=(sys.argv[1],), daemon=True)
    process.start()
    process.join()
"""


@pytest.mark.parametrize("asked", ["", "deaf"])
def test_a_training_ends_with_its_sweep_in_every_case(tmp_path, asked):
    (tmp_path / "parent.py").write_text(PARENT)
    root = str(pathlib.Path(sweep.__file__).parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, "parent.py", asked],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()

    # The pipe, which the child has too, ends with the child.
    assert parent.stdout.read() == ""
    with pytest.raises(ProcessLookupError):
        while ownership._began(child) != "ended":
            os.kill(child, 0)
            time.sleep(0.01)
        raise ProcessLookupError
    assert bool(list(tmp_path.glob(".a.*"))) == (asked == "")


def test_a_sweep_in_a_folder_that_another_job_owns_is_refused(tmp_path, capsys):
    with ownership.own(tmp_path, job="another"):
        assert run(tmp_path, "--vary=seed=1") == 2
    assert "is in use by process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
