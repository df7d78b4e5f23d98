"""Commands as several processes of one job, started by their own flags or by Slurm."""

import json
import logging
import os
import signal
import socket
import threading
import time

import bundles
import numpy as np
import pytest
from running import by_flags, ends, free_port, start

from anchor_jax import processes, supervisor
from anchor_jax.cli import jobs
from anchor_jax.cli.main import main
from anchor_jax.training.monitor import MEASURED
from anchor_jax.weights import checkpoint

STEPS = 40


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--config=a", "--num_processes=2"], True),
        (["train", "--config=a", "--num_processes", "2"], True),
        (["train", "--config=a", "--num_processes=1"], False),
        (["train", "--config=a"], False),
        (["train", "--num_processes=2", "--help"], False),
        (["train", "--num_processes=two"], False),
        (["policies", "--num_processes=2"], False),
        (["trajectories", "--num_processes=2", "--process=0"], False),
        ([], False),
    ],
)
def test_a_parent_is_started_for_several_processes(monkeypatch, argv, expected):
    for name in [one for one in os.environ if one.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    started = []
    monkeypatch.setattr(supervisor, "start", lambda: started.append(1))
    monkeypatch.setattr(jobs.clusters.glob, "glob", lambda pattern: [])

    jobs.supervise(argv)

    assert bool(started) is expected


@pytest.mark.parametrize("command", jobs.COMMANDS)
def test_each_command_teaches_its_flags(capsys, command):
    assert main([command, "--help"]) == 0

    shown = " ".join(capsys.readouterr().out.split())
    parts = ["--coordinator=VALUE", "--num_processes=VALUE", "--process_id=VALUE"]
    parts += ["JAX_NUM_PROCESSES", "Whoever reaches the port controls the job"]
    assert [part for part in parts if part not in shown] == []


def test_a_flag_alone_is_refused(capsys):
    assert main(["train", "--config=train_teacher", "--process_id=1"]) == 2

    assert "--process_id=1 alone does not describe a job" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "on_terminal"),
    [(ValueError("UNAVAILABLE: Task 1 heartbeat timeout"), False), (KeyError(1), True)],
)
def test_threads_that_a_lost_process_stops_print_no_stack(
    monkeypatch, capfd, error, on_terminal
):
    monkeypatch.setattr(processes, "_job", object())
    monkeypatch.setattr(threading, "excepthook", jobs._report_thread)
    shown = []
    monkeypatch.setattr(threading, "__excepthook__", shown.append)

    def fail():
        raise error

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()

    assert bool(shown) is on_terminal
    assert ("heartbeat timeout" in capfd.readouterr().err) is not on_terminal


def test_logs_of_a_lost_process_go_to_the_file(monkeypatch, capfd, caplog):
    monkeypatch.setattr(processes, "_job", object())
    log = logging.getLogger("a library")
    log.addFilter(jobs._is_shown)

    for text in ("waiting for async_write_complete barrier", "another fault"):
        try:
            raise TimeoutError(text)
        except TimeoutError:
            log.error("cannot save", exc_info=True)

    assert "another fault" in caplog.text and "barrier" not in caplog.text
    # In a job, descriptor 2 is the file.
    assert "write_complete barrier" in capfd.readouterr().err


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    bundles.save(folder)
    return folder


def command(weights, out, *more):
    return [
        *("train", "--config=train_teacher", f"--config.weights={weights}"),
        *(f"--config.out={out}", f"--config.steps={STEPS}", "--config.batch=4"),
        *(f"--config.save_every={STEPS}", "--config.log_every=1"),
        *("--config.regression.blocks=1", "--config.data.size=8"),
        *("--config.sample_every=0", *more),
    ]


def by_slurm(line, port, number):
    """Starts a task of a step of Slurm, whose variables alone describe the job."""
    step = {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "JAX_COORDINATOR_PORT": str(port),
    }
    return start(line, **step)


def lines(folder):
    path = folder / "log.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_two_processes_stop_together_and_resume_under_slurm(weights, tmp_path):
    line, port = command(weights, tmp_path / "run"), free_port()
    watched = [*line, "--config.preflight.run=on", "--config.profile.steps=1"]
    running = [by_flags(watched, port, number) for number in range(2)]
    while len(lines(tmp_path / "run")) < 3 and running[0].poll() is None:
        time.sleep(0.05)
    running[1].send_signal(signal.SIGUSR1)
    made = tmp_path / "run" / "profiles"
    while not (made.exists() and any(made.rglob("*.xplane.pb"))):
        assert running[0].poll() is None
        time.sleep(0.02)
    running[1].send_signal(signal.SIGTERM)

    statuses, outputs = ends(running)

    assert statuses == [75, 75], outputs
    step = checkpoint.last_step(tmp_path / "run")
    assert f"Stopped at {step}/{STEPS}. Rerun this command" in outputs[0]
    assert "stage regression" in outputs[0]
    # The data may be built, with a progress bar, by any process.
    lines_of_other = outputs[1].splitlines()
    rest = [line for line in lines_of_other if "profile of steps" not in line]
    assert "clips" in outputs[1] or not any(rest), rest
    assert not any(word in outputs[1] for word in ("stage", "step/s", "Stopped"))
    assert_is_watched(tmp_path / "run", outputs)

    port = free_port()
    statuses, outputs = ends([by_slurm(line, port, number) for number in range(2)])

    assert statuses == [0, 0], outputs
    assert f"Resuming at step {step}." in outputs[0] and outputs[1] == ""
    assert checkpoint.last_step(tmp_path / "run") == STEPS
    assert_equals_one_process(weights, tmp_path)
    last = json.loads(lines(tmp_path / "run")[-1])
    assert last["share_stopped"] > 0, "goodput includes the time between two starts"


def assert_is_watched(folder, outputs):
    """Checks measurements, the requested profile, and the times of both processes."""
    assert "preflight: 2 devices, matrix products at" in outputs[0]
    (made,) = (folder / "profiles").iterdir()
    assert made.name.endswith("-1")
    host = socket.gethostname()
    assert f"process 1 ({host}): profile of steps" in outputs[1]
    last = json.loads(lines(folder)[-1])
    assert last["step_time_max_over_median"] >= 1
    assert 0 < last["goodput"] < 1


def assert_equals_one_process(weights, folder):
    """Checks that the log is that of one process, without a lost or repeated line."""
    assert main(command(weights, folder / "one")) == 0

    logs = [[*map(json.loads, lines(folder / name))] for name in ("run", "one")]
    assert [one["step"] for one in logs[0]] == list(range(1, STEPS + 1))
    for ours, theirs in zip(*logs, strict=True):
        for name in (name for name in theirs if not MEASURED.fullmatch(name)):
            # Small differences grow with the steps.
            tolerance = 1e-5 if ours["step"] < 6 else 1e-2
            np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance)


@pytest.mark.slow
def test_processes_that_disagree_are_refused_before_the_first_step(weights, tmp_path):
    port = free_port()
    running = [
        by_flags(command(weights, tmp_path, f"--config.seed={seed}"), port, seed)
        for seed in range(2)
    ]

    statuses, outputs = ends(running)

    assert statuses == [2, 2], outputs
    host = socket.gethostname()
    assert "the processes of this job disagree" in outputs[0]
    assert f"config.seed: process 1 ({host}) has 1; 1 have 0" in outputs[0]
    assert not lines(tmp_path)
