import os
import subprocess
import sys

import jax
import pytest

from anchor_jax import devices
from anchor_jax.errors import UserError


@pytest.mark.parametrize(
    ("wanted", "error", "parts"),
    [
        ("cuda", AssertionError(), ["'cuda'", "anchor_jax[gpu]", "'.[gpu]'"]),
        ("tpu", RuntimeError("no libtpu.so"), ["(no libtpu.so)", "anchor_jax[tpu]"]),
        ("cuda,cpu", RuntimeError("no"), ["'cuda,cpu'", "anchor_jax[gpu]"]),
        ("abacus", RuntimeError("no"), ["'abacus'", "give cpu, cuda or tpu"]),
    ],
)
def test_a_missing_device_is_named_with_its_extra(monkeypatch, wanted, error, parts):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError) as caught:
        devices.check(wanted)

    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert "unset JAX_PLATFORMS" in message


def test_the_advice_of_jax_is_replaced_by_ours(monkeypatch):
    def fail():
        raise RuntimeError("no libtpu.so (set JAX_PLATFORMS='' to choose)")

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError) as caught:
        devices.check("tpu")

    assert "(no libtpu.so);" in str(caught.value)


def test_a_cluster_that_is_not_joined_is_refused(monkeypatch):
    devices.check_processes()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "")
    devices.check_processes()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(UserError, match="'2': this process has not joined the others"):
        devices.check_processes()

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    devices.check_processes()


def test_a_present_device_is_accepted():
    devices.check("cpu")
    devices.check("")


@pytest.mark.slow
def test_a_command_without_its_device_is_one_message():
    done = subprocess.run(
        [sys.executable, "-m", "anchor_jax", "sample", "--config=tiny"],
        env={**os.environ, "JAX_PLATFORMS": "abacus"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX_PLATFORMS='abacus'")
    assert "Traceback" not in done.stderr
