"""`launch/clusters/slurm.sbatch`, run in a simulated Slurm job."""

import os
import pathlib
import re
import signal
import subprocess
import time

import pytest

CLUSTERS = pathlib.Path(__file__).parents[2] / "launch" / "clusters"
SCRIPT = CLUSTERS / "slurm.sbatch"
# As srun: runs all tasks and returns the highest exit status.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >> "$HOME/options"; shift; done
set -m # Each task is a process group, which gets the signals of the job.
tasks=()
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i "$@" & tasks+=($!)
done
trap 'kill -TERM -- "${tasks[@]/#/-}"' USR1
trap 'kill -USR1 -- "${tasks[@]/#/-}"' USR2
highest=0
for task in "${tasks[@]}"; do
  until wait "$task"; status=$?; ! kill -0 "$task" 2> /dev/null; do :; done
  # A signal may have ended the wait just before the task ended.
  wait "$task" 2> /dev/null; ended=$?
  ((ended == 127)) || status=$ended
  ((status <= highest)) || highest=$status
done
exit "$highest"
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" >> "$HOME/scontrol"\n'
# Ends as the file `plan` says: a line for each run, a word for each task.
PROGRAM = """#!/usr/bin/env bash
trap 'exit 75' TERM
trap 'echo >> "$HOME/profiles"' USR1
echo "$@" >> "$HOME/starts.$SLURM_PROCID"
line=$(sed -n "$(wc -l < "$HOME/starts.$SLURM_PROCID")p" "$HOME/plan")
words=($line)
status=${words[SLURM_PROCID]}
[[ $status != wait ]] || echo >> "$HOME/waiting"
[[ $status != wait ]] || { for i in {1..400}; do sleep 0.05; done; }
[[ $status != kill ]] || kill -9 $$
exit "$status"
"""


@pytest.fixture
def job(launch, tmp_path):
    """A simulated job of two tasks; returns its process when it is started."""
    launch.install("srun", SRUN)
    launch.install("scontrol", SCONTROL)
    launch.install("anchor-jax", PROGRAM)
    (launch.folder / "rm").unlink()
    slurm = {
        "SLURM_JOB_ID": "42",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_ON_NODE": "64",
    }

    def start(plan, *arguments, script=SCRIPT):
        (tmp_path / "plan").write_text("\n".join(plan) + "\n")
        return subprocess.Popen(
            ["bash", script, "train", *arguments],
            cwd=tmp_path,
            env=os.environ | slurm,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )

    return start


def finish(process, folder):
    """Returns the exit status, the number of runs, and the calls of scontrol."""
    process.communicate(timeout=20)
    starts = (folder / "starts.0").read_text().splitlines()
    calls = folder / "scontrol"
    return process.returncode, len(starts), calls.read_text() if calls.exists() else ""


REQUEUED = "requeue 42\n"
CASES = [
    (["0 0"], 0, 1, ""),
    (["75 75"], 75, 1, REQUEUED),
    (["0 75"], 75, 1, REQUEUED),
    (["2 75"], 2, 1, ""),
    (["75 2"], 2, 1, ""),
    (["1 75"], 1, 1, ""),
    (["64 kill"], 1, 1, ""),
    (["127 127", "127 127", "127 127"], 127, 1, ""),
    (["130 75"], 130, 1, ""),
    (["kill 130"], 130, 1, ""),
    (["76 75", "76 76", "kill 75", "0 0"], 0, 4, ""),
    (["76 75", "76 76", "kill 75", "75 75"], 75, 4, REQUEUED),
    (["76 76"] * 5, 76, 4, ""),
    (["75 kill"] * 5, 137, 4, ""),
]


@pytest.mark.parametrize(("plan", "status", "runs", "requeued"), CASES)
def test_an_exit_status_decides_whether_the_job_starts_again(
    job, tmp_path, plan, status, runs, requeued
):
    assert finish(job(plan), tmp_path) == (status, runs, requeued)


def test_arguments_arrive_unchanged(job, tmp_path):
    hostile = "--config.prompt=a; $(touch pwned) `touch pwned` 'b' \"c\""
    assert finish(job(["0 0"], hostile), tmp_path)[0] == 0
    for task in range(2):
        assert (tmp_path / f"starts.{task}").read_text() == f"train {hostile}\n"
    assert not (tmp_path / "pwned").exists()
    options = (tmp_path / "options").read_text().split()
    assert {"--kill-on-bad-exit=0", "--wait=0", "--cpus-per-task=32"} <= set(options)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def are_waiting(folder):
    file = folder / "waiting"
    return file.exists() and file.read_text() == "\n\n"


def test_the_signal_before_the_time_limit_requeues(job, tmp_path):
    process = job(["wait wait"])
    wait_for(lambda: are_waiting(tmp_path))
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    (srun,) = children.read_text().split()
    subprocess.run(["kill", "-USR1", srun], check=True)
    assert finish(process, tmp_path) == (75, 1, REQUEUED)


def test_a_request_for_a_profile_reaches_the_tasks_which_continue(job, tmp_path):
    process = job(["wait wait"])
    profiles = tmp_path / "profiles"
    wait_for(lambda: are_waiting(tmp_path))
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    (srun,) = children.read_text().split()
    subprocess.run(["kill", "-USR2", srun], check=True)
    wait_for(lambda: profiles.exists() and profiles.read_text() == "\n\n")
    subprocess.run(["kill", "-USR1", srun], check=True)

    assert finish(process, tmp_path) == (75, 1, REQUEUED)


def test_scancel_does_not_requeue(job, tmp_path):
    process = job(["wait wait"])
    wait_for(lambda: are_waiting(tmp_path))
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    process.send_signal(signal.SIGTERM)
    subprocess.run(["kill", "-USR1", *children.read_text().split()], check=True)
    assert finish(process, tmp_path) == (75, 1, "")


def run_again(job, folder, **script):
    """Runs a requeued job once; returns whether it is requeued."""
    (folder / "starts.0").unlink(missing_ok=True)
    (folder / "starts.1").unlink(missing_ok=True)
    (folder / "scontrol").unlink(missing_ok=True)
    status, _, calls = finish(job(["75 75"], **script), folder)
    assert status == 75
    return calls == REQUEUED


def test_a_job_that_never_gets_far_is_not_requeued(job, tmp_path):
    assert [run_again(job, tmp_path) for _ in range(6)] == [True] * 5 + [False]
    assert not list(tmp_path.glob("*.quick"))
    assert run_again(job, tmp_path), "a job that a user requeues begins again"


def test_requeues_after_long_runs_have_no_limit(job, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "70")
    long = tmp_path / "long.sbatch"
    long.write_text(SCRIPT.read_text().replace("\nquick=600\n", "\nquick=0\n"))

    assert all(run_again(job, tmp_path) for _ in range(5))
    assert run_again(job, tmp_path, script=long)
    assert [run_again(job, tmp_path) for _ in range(6)] == [True] * 5 + [False]


def test_a_quick_run_that_cannot_be_counted_is_not_requeued(job, tmp_path):
    (tmp_path / "anchor-jax-42.quick").mkdir()

    assert not run_again(job, tmp_path)


def test_launchers_agree_on_the_rule(launcher):
    text = SCRIPT.read_text()
    found = dict(re.findall(r"^(\w+)=(\d+)\b", text, re.MULTILINE))
    host, gke = launcher("clusters.host"), launcher("clusters.gke")
    assert int(found["again"]) == host.AGAIN == 75
    assert int(found["watchdog"]) == host.WATCHDOG == 76
    assert int(found["ctrl_c"]) == host.CTRL_C == 130
    assert int(found["most_failures"]) == host.MOST_FAILURES == gke.FAILURES == 3
    assert int(found["quick"]) == host.QUICK
    assert int(found["most_quick"]) == host.MOST_QUICK


def test_the_script_alone_asks_for_what_the_launcher_asks_for(launch):
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SCRIPT.read_text(), re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["signal"] == "TERM@300"
    assert launch.cluster("slurm", "--nodes=1", "--", "sample").returncode == 0
    ((*line, _),) = launch.calls()
    for name in ("signal", "time", "gpus-per-node", "ntasks-per-node", "job-name"):
        assert f"--{name}={options[name]}" in line
    assert "#SBATCH --requeue\n" in SCRIPT.read_text()
