"""`launch/clusters/host.py`: what starts again, what stops, and how it is stopped."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

PROGRAM = pathlib.Path(__file__).parents[2] / "launch" / "clusters" / "host.py"
# Ends as the file `plan` says, one word for each start.
COMMAND = """#!/usr/bin/env bash
trap 'echo TERM >> signals; exit 75' TERM
trap 'echo INT >> signals; exit 130' INT
trap 'echo USR1 >> signals' USR1
echo "$@" >> starts
status=$(sed -n "$(wc -l < starts)p" plan)
[[ $status != wait ]] || { for i in {1..400}; do sleep 0.05; done; }
[[ $status != kill ]] || kill -9 $$
exit "$status"
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with the program and the command."""
    shutil.copy(PROGRAM, tmp_path / "host.py")
    (tmp_path / "command").write_text(COMMAND)
    (tmp_path / "command").chmod(0o755)
    return tmp_path


def starts(folder):
    path = folder / "starts"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def host(folder, *arguments):
    return subprocess.run(
        [sys.executable, "host.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def run(folder, plan):
    """Runs the command to the last exit status, with its starts and the log."""
    (folder / "plan").write_text("\n".join(plan) + "\n")
    done = host(folder, "run", "job", "--settle=0", "--", "./command", "train")
    return done.returncode, starts(folder), done.stderr


@pytest.mark.parametrize(
    ("plan", "status", "count"),
    [
        (["0"], 0, 1),
        (["75", "75", "75", "75", "0"], 0, 5),
        (["76", "75", "76", "76", "0"], 0, 5),
        (["76", "76", "75", "76", "76", "0"], 76, 5),
        (["kill", "76", "kill", "0"], 0, 4),
        (["kill", "76", "kill", "kill", "0"], 137, 4),
        (["2", "0"], 2, 1),
        (["75", "2", "0"], 2, 2),
        (["130", "0"], 130, 1),
        (["1", "0"], 1, 1),
    ],
)
def test_an_exit_status_decides_whether_the_command_starts_again(
    folder, plan, status, count
):
    assert run(folder, plan)[:2] == (status, count)


def test_a_command_that_never_gets_far_ends(folder):
    status, count, log = run(folder, ["75"] * 9)
    assert (status, count) == (75, 6)
    assert "6 runs in a row were shorter than 600 s" in log


def test_a_command_that_is_missing_ends(folder):
    done = host(folder, "run", "job", "--", "./missing")
    assert done.returncode == 127
    assert "./missing: No such file" in done.stderr


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_signal_reaches_the_command_which_is_not_started_again(
    folder, number, status
):
    (folder / "plan").write_text("wait\n0\n")
    line = [sys.executable, "host.py", "run", "job", "--settle=0", "--", "./command"]
    keeper = subprocess.Popen(line, cwd=folder, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: starts(folder))
    keeper.send_signal(number)
    _, log = keeper.communicate(timeout=20)

    assert keeper.returncode == status
    assert starts(folder) == 1
    assert (folder / "signals").read_text() == f"{number.name[3:]}\n"
    assert "stopped; the same command resumes" in log


def test_a_request_for_a_profile_reaches_the_command_which_continues(folder):
    (folder / "plan").write_text("wait\n0\n")
    line = [sys.executable, "host.py", "run", "job", "--settle=0", "--", "./command"]
    keeper = subprocess.Popen(line, cwd=folder, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: starts(folder))
    keeper.send_signal(signal.SIGUSR1)
    wait_for((folder / "signals").exists)
    keeper.terminate()
    keeper.communicate(timeout=20)

    assert (folder / "signals").read_text() == "USR1\nTERM\n"
    assert (keeper.returncode, starts(folder)) == (75, 1)


def test_a_signal_between_two_runs_ends_the_job(folder):
    (folder / "plan").write_text("75\n0\n")
    line = [sys.executable, "host.py", "run", "job", "--settle=60", "--", "./command"]
    keeper = subprocess.Popen(line, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert "starts again in 60 s" in keeper.stderr.readline()
    keeper.terminate()
    keeper.communicate(timeout=20)
    assert (keeper.returncode, starts(folder)) == (75, 1)


def test_a_job_in_the_background_is_one_and_can_be_stopped(folder):
    (folder / "plan").write_text("wait\n0\n")
    begin = ("start", "dmd", "--", "./command", "train", "--", "--x=a b")
    assert host(folder, *begin).returncode == 0
    wait_for(lambda: starts(folder))

    again = host(folder, *begin)
    assert again.returncode == 2
    assert "already runs on this host" in again.stderr
    assert starts(folder) == 1

    assert host(folder, "stop", "dmd").returncode == 0
    log = folder / "dmd" / os.uname().nodename / "log"
    wait_for(lambda: "exit status 75; stopped" in log.read_text())
    wait_for(lambda: "does not run" in host(folder, "stop", "dmd").stderr)
    assert (folder / "starts").read_text() == "train -- --x=a b\n"

    assert host(folder, *begin).returncode == 0
    wait_for(lambda: "exit status 0; done" in log.read_text())


def test_a_process_id_of_another_program_is_not_a_job(folder):
    place = folder / "dmd" / os.uname().nodename
    place.mkdir(parents=True)
    (place / "pid").write_text(str(os.getpid()))
    assert "does not run" in host(folder, "stop", "dmd").stderr
