"""Checks before the first step, from real measurements and from made-up ones."""

import shutil
import time
import types

import jax
import pytest

from anchor_jax import processes
from anchor_jax.errors import UserError
from anchor_jax.training.watch import preflight, speeds
from anchor_jax.training.watch.preflight import PreflightConfig, judge

GB = 10**9
ON = PreflightConfig(run="on", seconds=30)


def measured(matmul=600e12, write=GB, read=3 * GB, clock=0.0, devices=1):
    return {
        "matmul": [matmul] * devices,
        "write": write,
        "read": read,
        "clock": clock,
        "reduce": 40 * GB,
    }


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setattr(
        processes, "name", lambda number=0: f"process {number} (host-{number})"
    )


def test_equal_hosts_are_not_slow(names):
    assert judge([measured()] * 8, 0.7) == []


@pytest.mark.parametrize(
    ("odd", "line"),
    [
        (
            measured(matmul=300e12),
            "process 5 (host-5) multiplies matrices at 300 TFLOP/s, the median is 600",
        ),
        (
            measured(write=GB / 10),
            "process 5 (host-5) writes to config.out at 0.1 GB/s, the median is 1",
        ),
        (
            measured(read=GB),
            "process 5 (host-5) reads from config.out at 1 GB/s, the median is 3",
        ),
        (
            measured(clock=-12.3),
            "the clock of process 5 (host-5) is 12.3 s behind the others; set it (NTP)",
        ),
    ],
)
def test_a_slow_host_is_named(names, odd, line):
    found = [measured() for _ in range(8)]
    found[5] = odd

    assert judge(found, 0.7) == [line]


def test_a_slow_device_of_a_host_is_named(names):
    found = [measured(devices=8) for _ in range(4)]
    found[2]["matmul"][6] = 350e12

    (line,) = judge(found, 0.7)

    assert line.startswith("process 2 (host-2), device 6, multiplies matrices at 350")
    assert judge(found, 0.5) == []


def test_the_line_has_the_lowest_speeds():
    found = [measured(), measured(matmul=500e12, write=GB / 2, clock=0.25)]

    assert preflight.describe(found) == (
        "preflight: 2 devices, matrix products at 500 to 600 TFLOP/s, all-reduce 40"
        " GB/s, disk writes 0.5 GB/s and reads 3 GB/s, clocks within 0.25 s"
    )


def check(folder, config, size=10, missing=3):
    lines = []
    preflight.check(config, folder, size, missing, lines.append)
    return lines


def test_one_process_measures_itself(tmp_path):
    # The devices are simulated on a busy machine, so one may be slow.
    (line,) = check(tmp_path, PreflightConfig(run="on", slow=0.0, seconds=300))

    assert line.startswith(f"preflight: {jax.device_count()} devices, matrix products")
    assert not list(tmp_path.iterdir()), "the file of the measurement is removed"


def test_on_cpus_the_default_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(speeds, "matmul", lambda: pytest.fail("is slow"))

    assert check(tmp_path, PreflightConfig()) == []


def pretend_free(monkeypatch, free):
    usage = types.SimpleNamespace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path, monkeypatch):
    pretend_free(monkeypatch, 9 * GB)

    with pytest.raises(UserError) as caught:
        check(tmp_path, PreflightConfig(), size=10 * GB)

    assert "config.out: a checkpoint needs 10 GB, and 9 GB are free" in str(
        caught.value
    )
    assert check(tmp_path, PreflightConfig(run="off"), size=10 * GB) == []


def test_a_disk_without_room_for_all_checkpoints_is_named(tmp_path, monkeypatch):
    pretend_free(monkeypatch, 29 * GB)

    (line,) = check(tmp_path, PreflightConfig(), size=10 * GB, missing=3)

    assert line.startswith("warning: a checkpoint needs 10 GB, and 29 GB are free at")
    assert "up to 3 more will be kept there" in line
    assert check(tmp_path, PreflightConfig(), size=9 * GB, missing=3) == []


def with_others(monkeypatch, *others):
    """Processes whose measurements are given beside those of this one."""
    own = measured()
    monkeypatch.setattr(speeds, "matmul", lambda: own["matmul"])
    monkeypatch.setattr(speeds, "disk", lambda *a: (own["write"], own["read"]))
    monkeypatch.setattr(speeds, "all_reduce", lambda: own["reduce"])
    monkeypatch.setattr(processes, "gather", lambda value, *a: _gathered(value, others))


def _gathered(value, others):
    return [value, *others] if isinstance(value, dict) else [value]


def test_a_slow_host_is_a_warning_or_a_refusal(tmp_path, monkeypatch, names):
    with_others(monkeypatch, measured(), measured(matmul=100e12))
    warning, line = check(tmp_path, ON)
    assert warning.startswith("warning: process 2 (host-2) multiplies matrices at 100")
    assert line.startswith("preflight: 3 devices")

    config = PreflightConfig(run="on", refuse=True)
    with pytest.raises(UserError, match=r"process 2 \(host-2\) multiplies"):
        check(tmp_path, config)


@pytest.mark.parametrize("name", ["matmul", "disk", "all_reduce"])
def test_what_gives_no_result_is_refused_in_time(tmp_path, monkeypatch, name):
    with_others(monkeypatch)
    monkeypatch.setattr(speeds, name, lambda *a: time.sleep(30))
    began = time.monotonic()

    with pytest.raises(UserError, match=r"process 0: .*no result within 0\.2 s"):
        check(tmp_path, PreflightConfig(run="on", seconds=0.2))
    assert time.monotonic() - began < 20


def test_a_silent_process_is_named(tmp_path, monkeypatch):
    with_others(monkeypatch)

    def barrier(what, seconds=600):
        raise processes.Missing(f"{what}: process 3 (host-3) did not answer")

    monkeypatch.setattr(processes, "barrier", barrier)
    with pytest.raises(processes.Missing, match=r"preflight: process 3 \(host-3\)"):
        check(tmp_path, ON)


def test_a_wrong_sum_is_refused(tmp_path, monkeypatch):
    psum = jax.lax.psum
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis_name: psum(x, axis_name) + 1)

    with pytest.raises(speeds.WrongResult, match=r"the sum of 1 to 4 .* expected 10"):
        speeds.all_reduce()


def test_a_disk_that_changes_bytes_is_refused(tmp_path):
    class Broken(type(tmp_path)):
        def read_bytes(self):
            return b"x" + super().read_bytes()[1:]

    with pytest.raises(speeds.WrongResult, match="other bytes are read"):
        speeds.disk(Broken(tmp_path), "file")


def test_clocks_are_compared_with_the_median(monkeypatch):
    others = iter((3.0, 2.0, 5.0))
    monkeypatch.setattr(processes, "barrier", lambda *a: None)
    monkeypatch.setattr(processes, "index", lambda: 0)
    monkeypatch.setattr(time, "time", lambda: 100.0)

    def gather(value):
        late = next(others)  # The exchange itself takes a varying time.
        return [value, value - late, value - late - 0.01]

    monkeypatch.setattr(processes, "gather", gather)

    assert preflight.clock_offset() == 2.0


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="run='yes' must be one of auto, on, off"):
        PreflightConfig(run="yes")
