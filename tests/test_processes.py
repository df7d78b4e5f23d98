"""What one process needs no others for; several are in tests/cli/test_jobs.py."""

import os
import socket

import pytest

from anchor_jax import clusters, interrupts, processes
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
            processes._check_free(place, address)

    assert f"--coordinator={address}" in str(caught.value)
    assert "choose another port" in str(caught.value)


def test_a_coordinator_that_does_not_answer_is_named_with_what_to_check():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    place = clusters.Place("Slurm", 2, 1, address)
    with pytest.raises(UserError) as caught:
        processes._await_coordinator(place, 0)

    parts = [address, "--process_id=1 (from Slurm)", "no answer within 0 s", "the port"]
    assert [part for part in parts if part not in str(caught.value)] == []


def test_processes_on_cpus_keep_the_order_of_collective_operations(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    processes._keep_order()
    processes._keep_order()
    assert os.environ["XLA_FLAGS"] == f"--xla_a=1 {processes.SAME_ORDER}"

    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    processes._keep_order()
    assert not os.environ["XLA_FLAGS"]


def test_a_flag_that_the_installed_xla_lacks_is_not_set(monkeypatch):
    monkeypatch.setattr(processes, "SAME_ORDER", "--xla_cpu_no_such_flag=false")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "")

    processes._keep_order()

    assert not os.environ["XLA_FLAGS"]
