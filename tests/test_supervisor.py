"""The parent of a process of a job: its exit status and its last line."""

import os
import pathlib
import select
import signal
import subprocess
import sys
import time

import pytest

from anchor_jax import interrupts, supervisor, watchdog
from anchor_jax.cli import main

ROOT = pathlib.Path(supervisor.__file__).parents[1]
HOSTS = ["host-a", "host-b", "host-c"]
MET = {"name": "process 0 (host-a)", "hosts": HOSTS, "index": 0}
SILENT = """\
E1128 07:05:25 Polled an error from coordination service (this can be an error from this
F1128 07:05:25 client.h:80] Terminating process because the JAX distributed service
detected fatal errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy
(stopped sending heartbeats):
{}
The tasks have crashed. Check the task logs for an earlier error, or scheduler events
""".replace("\n(stopped", " (stopped")
NO_LEADER = """\
F1128 07:05:25 client.h:80] Terminating process because the JAX distributed service
detected fatal errors. absl::Status: UNAVAILABLE: Failed to send RPC to coordination
service. Either the leader task was preempted/died/restarted unexpectedly or this task
"""
NO_ANSWER = """\
F1128 08:11:07 client.h:80] Terminating process because the JAX distributed service
detected fatal errors. absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded

RPC: /xla.coordination.CoordinationService/Heartbeat
"""


def test_its_statuses_are_those_of_the_command():
    assert supervisor.AGAIN == interrupts.AGAIN
    assert "return _report(2" in pathlib.Path(main.__file__).read_text()
    assert (supervisor.FAILED, supervisor.STUCK) == (2, watchdog.STATUS)


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (SILENT.format("1"), "process 1 (host-b)"),
        (SILENT.format("1, 2"), "process 1 (host-b), process 2 (host-c)"),
        (SILENT.format("/job:jax_worker/replica:0/task:2"), "process 2 (host-c)"),
        (NO_LEADER, "process 0 (host-a)"),
        (NO_ANSWER, "process 0 (host-a)"),
        ("F1128 JAX distributed service: another text", "another process"),
    ],
)
def test_a_lost_process_is_named_with_its_host(text, lost):
    status, line = supervisor.explain(signal.SIGABRT, MET, text)

    assert status == 75
    assert line == f"process 0 (host-a) ends with status 75: lost {lost}"


def test_a_loss_after_ctrl_c_keeps_the_status_of_the_request():
    facts = {**MET, "status": 130}

    assert supervisor.explain(signal.SIGABRT, facts, NO_LEADER)[0] == 130


def test_processes_that_did_not_meet_are_an_error_of_the_user():
    facts = {"joining": "--coordinator=a:1: not all came"}

    status, line = supervisor.explain(signal.SIGABRT, facts, NO_LEADER)

    assert (status, line) == (2, "error: --coordinator=a:1: not all came")


@pytest.mark.parametrize(
    ("number", "status", "part"),
    [
        (signal.SIGKILL, 137, "SIGKILL ended it, perhaps because memory ran out"),
        (signal.SIGSEGV, 139, "SIGSEGV ended it"),
        (signal.SIGABRT, 134, "SIGABRT ended it"),
    ],
)
def test_a_crash_is_named(number, status, part):
    found, line = supervisor.explain(number, MET, "some other text")

    assert found == status and part in line


def test_a_process_that_is_killed_after_a_request_has_the_status_of_the_request():
    for status in (75, 130):
        facts = {**MET, "status": status}
        assert supervisor.explain(signal.SIGKILL, facts, "")[0] == status


def test_a_command_that_ends_by_itself_keeps_its_status():
    assert supervisor.explain(7 << 8, MET, NO_LEADER) == (7, "")
    assert supervisor.explain(7 << 8, {**MET, "last": "bye"}, "")[1] == "bye"


BEGIN = """
import json, os, signal, sys, time
from anchor_jax import interrupts, supervisor
supervisor.start()
interrupts.install()
interrupts.join_job()
supervisor.tell(name="process 0 (host-a)", hosts=["host-a", "host-b"], index=0)
"""


def start(program, *arguments, begin=BEGIN, **variables):
    return subprocess.Popen(
        [sys.executable, "-c", begin + program, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )


def ends(process):
    with process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_output_and_status_pass_through_and_cpp_messages_do_not(tmp_path):
    process = start(
        """
supervisor.tell(folder=sys.argv[1])
os.write(1, b"[Gloo] connected\\n")
os.write(2, b"I0000 a message of C++\\n")
print("for the user")
print("a warning", file=sys.stderr)
sys.exit(3)
""",
        tmp_path,
        TF_CPP_MIN_LOG_LEVEL="3",
    )

    # This level hides messages.
    assert ends(process) == (3, "for the user\n", "a warning\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stream", "variables"),
    [("stdout", {"PYTHONUNBUFFERED": "1"}), ("stderr", {"PYTHONUNBUFFERED": "1"})]
    + [("stderr", {"PYTHONUNBUFFERED": ""})],
)
def test_lines_are_shown_at_once_where_python_would(stream, variables):
    process = start(
        f"""
print("step 7", file=sys.{stream})
time.sleep(60)
""",
        **variables,
    )

    shown, *_ = select.select([getattr(process, stream)], [], [], 20)
    process.kill()

    assert shown and ends(process)[1 if stream == "stdout" else 2] == "step 7\n"


@pytest.mark.parametrize(
    "setting", [{"NCCL_DEBUG": "INFO"}, {"TF_CPP_MIN_LOG_LEVEL": "0"}]
)
def test_messages_that_were_requested_are_kept(tmp_path, setting):
    program = """
supervisor.tell(folder=sys.argv[1])
os.write(1, b"NCCL INFO ring 0\\n")
"""
    process = start(program, tmp_path, **setting)

    kept = tmp_path / "process-0.log"
    assert ends(process) == (0, "", f"messages of C++: {kept}\n")
    assert kept.read_text() == "NCCL INFO ring 0\n"


def test_the_stack_of_a_crash_is_kept_in_the_runs_folder(tmp_path):
    process = start(
        f"""
supervisor.tell(folder=sys.argv[1])
print("step 7", flush=True)
os.write(2, {SILENT.format(1)!r}.encode())
os.abort()
""",
        tmp_path,
    )

    status, out, err = ends(process)

    kept = tmp_path / "process-0.log"
    assert (status, out) == (75, "step 7\n")
    assert err == (
        "process 0 (host-a) ends with status 75: lost process 1 (host-b); messages of"
        f" C++: {kept}\n"
    )
    assert "stopped sending heartbeats" in kept.read_text()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_signals_reach_the_child(number, status):
    process = start("""
print("ready", flush=True)
while not interrupts.stop_requested():
    time.sleep(0.01)
print("stopped")
sys.exit(interrupts.leave_with(0))
""")
    assert process.stdout.readline() == "ready\n"

    process.send_signal(number)

    assert ends(process) == (status, "stopped\n", "")


def test_a_child_that_is_killed_for_memory_is_not_started_again_without_limit():
    process = start("os.kill(os.getpid(), signal.SIGKILL)")

    status, _, err = ends(process)

    assert status == 137
    assert "ends with status 137: SIGKILL ended it" in err


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_child_that_does_not_react_is_killed_with_the_status_of_the_request(
    number, status
):
    begin = BEGIN.replace(
        "supervisor.start()", "supervisor._PATIENCE = 1\nsupervisor.start()"
    )
    program = """
for one in (signal.SIGTERM, signal.SIGINT):
    signal.signal(one, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""
    process = start(program, begin=begin)
    assert process.stdout.readline() == "ready\n"

    process.send_signal(number)
    time.sleep(3)  # An earlier one counts as the same request.
    process.send_signal(number)

    assert ends(process)[0] == status


def test_only_a_later_second_signal_kills_a_blocked_child(monkeypatch):
    now, alarms = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signal, "alarm", alarms.append)
    monkeypatch.setattr(supervisor._Parent, "_send", lambda self, number: None)
    parent = supervisor._Parent(0, pathlib.Path("unused"))

    for now[0] in (100.0, 101.5):  # A launcher sends it to parent and child.
        parent._pass_on(signal.SIGTERM, None)
    assert not alarms
    now[0] = 102.5
    parent._pass_on(signal.SIGTERM, None)
    assert alarms == [supervisor._PATIENCE]


def test_a_signal_before_the_child_listens_is_not_lost():
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time\nfrom anchor_jax import interrupts, supervisor\n"
            "supervisor.start()\nprint('ready', flush=True)\ntime.sleep(0.5)\n"
            "interrupts.install()\ninterrupts.join_job()\ntime.sleep(0.2)\n"
            "raise SystemExit(interrupts.leave_with(0))\n",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"

    process.send_signal(signal.SIGTERM)

    assert process.wait(30) == 75


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses /proc")
def test_a_child_dies_with_its_parent():
    process = start("""
print(os.getpid(), flush=True)
time.sleep(60)
""")
    child = int(process.stdout.readline())

    process.kill()
    process.wait()

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_running(child):
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False
    return state.split()[0] not in "ZX"


def test_the_parent_imports_no_jax():
    program = "import sys, anchor_jax.cli.jobs\n"
    program += "print('jax' in sys.modules, 'numpy' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert done.stdout == "False False\n"
