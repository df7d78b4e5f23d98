"""What one process needs no others for; several are in tests/cli/test_jobs.py."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import types

import pytest

from anchor_jax import clusters, interrupts, meeting, processes
from anchor_jax.errors import UserError


def name(number):
    return f"process {number} (host-{number})"


def test_one_process_exchanges_values_with_itself():
    assert (processes.count(), processes.index()) == (1, 0)
    assert processes.is_first() and processes.is_printing()
    assert processes.gather({"a": 1}) == [{"a": 1}]
    assert processes.share("value") == "value"
    processes.barrier("anything")
    processes.agree({"a": 1})
    assert processes.close(3) == 3 and not processes.is_joined()


def test_a_job_of_one_process_is_never_initialised(monkeypatch):
    monkeypatch.setattr(processes, "_connect", lambda *a: pytest.fail("opens a port"))
    called = []
    monkeypatch.setattr(interrupts, "join_job", lambda: called.append(1))

    processes.join(None)
    assert not called
    processes.join(clusters.Place("Slurm", 1, 0))
    assert called == [1]


def test_equal_facts_do_not_differ():
    assert processes.differences([{"a": 1, "b": [2]}] * 3, name) == []


def test_each_difference_is_named_with_its_processes():
    facts = [{"config.batch": 4, "version of jax": "0.10.2"} for _ in range(4)]
    facts[2] = {"config.batch": 8, "version of jax": "0.11.0"}
    facts[3] = {"config.batch": 4}

    lines = processes.differences(facts, name)

    assert lines == [
        "config.batch: process 2 (host-2) has 8; 3 have 4",
        "version of jax: process 2 (host-2) has '0.11.0'; process 3 (host-3) has None;"
        " 2 have '0.10.2'",
    ]


def test_many_differing_processes_are_counted():
    facts = [{"a": max(0, number - 90)} for number in range(100)]

    (line,) = processes.differences(facts, name)

    assert "and 4 more" in line and line.endswith("91 have 0")


def test_flags_that_change_no_program_may_differ(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/a --xla_b=1 --xla_a=2")
    first = processes.versions()
    monkeypatch.setenv(
        "XLA_FLAGS",
        "--xla_a=2 --xla_force_host_platform_device_count=2 --xla_b=1",
    )

    assert processes.versions() == first
    assert first["XLA_FLAGS"] == ["--xla_a=2", "--xla_b=1"]
    assert first["version of jax"] and first["version of anchor_jax"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed"), True),
        (RuntimeError("NCCL operation failed: remote process exited"), True),
        (RuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
        (processes.Missing("process 1 did not answer"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory on socket"), False),
        (UserError("the connection closed"), False),
        (KeyError("loss"), False),
    ],
)
def test_errors_that_another_processs_end_may_cause(monkeypatch, error, expected):
    monkeypatch.setattr(processes, "_job", object())

    assert processes.blames_peer(error) is expected


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        place = clusters.Place("flags and variables", 2, 0, address)
        with pytest.raises(UserError) as caught:
            meeting.check_free(place, address)

    assert f"--coordinator={address}" in str(caught.value)
    assert "choose another port" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("10.0.0.1", "10.0.0.1:1234"),
        ("10.0.0.1:99", "10.0.0.1:99"),
        ("0.0.0.0", "0.0.0.0:1234"),
        ("fd00::1", "[fd00::1]:1234"),
        ("[::]", "[::]:1234"),
        ("[::]:99", "[::]:99"),
        ("host-a", "host-a:1234"),
    ],
)
def test_an_address_without_a_port_takes_the_coordinators(monkeypatch, given, expected):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", given)
    place = clusters.Place("Slurm", 2, 0, "10.0.0.1:1234")

    assert meeting.own_address(place, pytest.fail) == expected


@pytest.mark.parametrize(
    "given", ["10.0.0.1:port", ":1", "a:99999", "a:0", "[::1", "a:"]
)
def test_an_address_that_cannot_be_opened_is_named(monkeypatch, given):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", given)
    place = clusters.Place("Slurm", 2, 0, "10.0.0.1:1234")
    with pytest.raises(UserError) as caught:
        meeting.own_address(place, pytest.fail)

    assert "JAX_COORDINATOR_BIND_ADDRESS=" in str(caught.value)
    assert "give ADDRESS or ADDRESS:PORT" in str(caught.value)


def test_an_exchange_after_unequal_work_may_take_longer(monkeypatch):
    waits = []

    def exchange(turn, value, seconds):
        waits.append(seconds)
        return [value, value]

    job = types.SimpleNamespace(turns=itertools.count())
    monkeypatch.setattr(processes, "_job", job)
    monkeypatch.setattr(processes, "_exchange", exchange)

    processes.agree({"a": 1})
    processes.agree({"a": 1}, processes.LOADING)

    assert waits == [processes.PATIENCE, processes.LOADING]


def test_a_coordinator_that_does_not_answer_is_named_with_what_to_check():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    place = clusters.Place("Slurm", 2, 1, address)
    with pytest.raises(UserError) as caught:
        meeting.await_coordinator(place, 0)

    parts = [address, "--process_id=1 (from Slurm)", "no answer within 0 s", "the port"]
    assert [part for part in parts if part not in str(caught.value)] == []


def test_processes_on_cpus_keep_the_order_of_collective_operations(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    processes.keep_order()
    processes.keep_order()
    assert os.environ["XLA_FLAGS"] == f"--xla_a=1 {processes.SAME_ORDER}"

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    processes.keep_order()
    assert not os.environ["XLA_FLAGS"]


def test_a_flag_that_the_installed_xla_lacks_is_not_set(monkeypatch):
    monkeypatch.setattr(processes, "SAME_ORDER", "--xla_cpu_no_such_flag=false")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")

    processes.keep_order()

    assert not os.environ["XLA_FLAGS"]


APART = """
import os, signal, socket, sys, time
from anchor_jax import clusters, interrupts, processes
number, port = int(sys.argv[1]), sys.argv[2]
place = clusters.Place("flags", 2, number, f"127.0.0.1:{port}")
processes.join(place, is_apart=True)
import jax
keys = processes.gather(processes.key())
assert keys[0] == keys[1] != "", keys
assert (jax.process_count(), len(jax.devices())) == (1, jax.local_device_count())
def is_open():
    try:
        socket.create_connection(("127.0.0.1", int(port)), 5).close()
        return True
    except OSError:
        return False
assert is_open()
processes.part(60)
deadline = time.monotonic() + (10 if number else 0)
while number and is_open() and time.monotonic() < deadline:
    time.sleep(0.05)
assert not is_open()  # The first process has ended it, before it is killed.
assert not interrupts.on_request and not interrupts.at_end
assert (processes.index(), processes.count()) == (number, 2)
if number == 0:
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(4)
print(processes.name(), processes.close(7, "a reason"), flush=True)
"""


CLOSING = """
import os, signal, sys, time
from anchor_jax import clusters, interrupts, processes
number, port = int(sys.argv[1]), sys.argv[2]
place = clusters.Place("flags", 2, number, f"127.0.0.1:{port}")
processes.join(place, is_apart=True)
processes._LEAVING = 3
if sys.argv[3:] == ["lost"] and number == 1:
    processes._disconnect = lambda: os.kill(os.getpid(), signal.SIGKILL)
status = processes.close(0)
assert not interrupts.at_end
if number == 0:
    print(status, flush=True)
    interrupts.leave_now(status)
time.sleep(5)
print(status, flush=True)
"""


def run_two(program, *arguments):
    """Returns statuses and outputs of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(number), port, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [one.communicate(timeout=120) for one in started]
    return [one.returncode for one in started], outputs


@pytest.mark.slow
def test_processes_apart_see_their_own_devices_and_survive_the_first():
    statuses, outputs = run_two(APART)

    assert statuses == [-signal.SIGKILL, 0], outputs
    assert outputs[1][0] == f"process 1 ({socket.gethostname()}) 7\n"


@pytest.mark.slow
def test_a_slower_process_survives_the_end_of_the_first():
    statuses, outputs = run_two(CLOSING)

    assert statuses == [0, 0], outputs
    assert [out for out, _ in outputs] == ["0\n", "0\n"]


@pytest.mark.slow
def test_the_loss_of_a_process_at_the_very_end_is_not_waited_for_long():
    statuses, outputs = run_two(CLOSING, "lost")

    assert statuses == [0, -signal.SIGKILL], outputs
    assert outputs[0][0] == "0\n"
