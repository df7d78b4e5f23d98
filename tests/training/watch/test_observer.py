"""What the loop declares, and the numbers of a line."""

import json
import os
import signal
import types

import jax
import pytest
from stage_runs import DISTILL, REGRESS, make, on_one_device

from anchor_jax.perf import work
from anchor_jax.training.checkpoints import Checkpoints
from anchor_jax.training.loop import Loop, train
from anchor_jax.training.monitor import MEASURED, Monitor
from anchor_jax.training.stages import build
from anchor_jax.training.stages.base import Cursor
from anchor_jax.training.watch import observer
from anchor_jax.training.watch.goodput import Goodput
from anchor_jax.training.watch.observer import Gauge, Watch
from anchor_jax.training.watch.pace import Pace
from anchor_jax.training.watch.profiles import ProfileConfig, Profiles
from anchor_jax.training.watch.times import DATA, DEVICE, HOST, SAMPLING, Times
from anchor_jax.watchdog import Watchdog, WatchdogConfig


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def gauge(folder, clock, **more):
    times, posts = Times(clock), []
    pace = Pace(
        posts.append, lambda channel, value: posts.append(value), lambda channel: {}
    )
    return Gauge(times, Goodput(folder, times, 0, clock), pace, **more), posts


def device(kind, stats=None):
    return types.SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)


@pytest.mark.parametrize(
    ("kind", "count", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 8, 8 * 989e12),
        ("TPU v5p", 128, 128 * 459e12),
        ("TPU7x", 8, 8 * 2307e12 / 2),  # two devices per chip
        ("cpu", 4, None),
    ],
)
def test_the_peak_is_that_of_all_devices(monkeypatch, kind, count, expected):
    monkeypatch.setattr(jax, "devices", lambda: [device(kind)] * count)

    assert observer.peak_flops() == expected


def test_mfu_is_the_steps_operations_over_the_peak(tmp_path, clock):
    uses = [
        work.Use("a", "critic", flops=3e12),
        work.Use("b", "g", each=0.2, flops=5e12),
    ]
    flops = work.step_flops(uses, 64)
    assert flops == 64 * 4e12

    one, _ = gauge(tmp_path, clock, flops=flops, peak=8 * 989e12)

    assert one(10, 10, 0.1)["mfu"] == pytest.approx(64 * 4e12 / (0.1 * 8 * 989e12))


def test_an_unknown_chip_has_no_mfu(tmp_path, clock):
    one, _ = gauge(tmp_path, clock, flops=1e12)

    assert "mfu" not in one(10, 10, 0.1)


def test_a_line_shows_a_processs_own_times_per_step(tmp_path, clock):
    one, posts = gauge(tmp_path, clock)
    for seconds in (8.0, 2.0):
        with one.times.of(HOST):
            clock.now += seconds
        with one.times.of(DATA):
            clock.now += seconds / 2
        with one.times.of(DEVICE):
            clock.now += 1
        found = one(4, 4, 3.0)
        one.pace._thread.join()

    assert {"step": 3.0, HOST: 0.5, DATA: 0.25}.items() <= posts[-1].items()
    assert posts[0][HOST] == 2.0
    assert posts[-1]["host_memory_gb"] == found["host_memory_gb"] > 0
    assert found["goodput"] == pytest.approx(12 / 17)


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    stats = [{"peak_bytes_in_use": 3 * 10**9}, {"peak_bytes_in_use": 5 * 10**9}, {}]
    monkeypatch.setattr(jax, "local_devices", lambda: [device("x", s) for s in stats])
    assert observer.peak_memory()["device_memory_gb"] == 5.0
    monkeypatch.setattr(jax, "local_devices", lambda: [device("cpu")])
    assert set(observer.peak_memory()) == {"host_memory_gb"}


def test_the_parts_of_a_loop_have_their_causes(tmp_path, clock):
    times, ends = Times(clock), []
    watch = Watch(
        Watchdog(
            WatchdogConfig(most=50), tmp_path / "s", lambda *a: ends.append(a), clock
        ),
        Profiles(ProfileConfig(0), tmp_path, ends.append, ends.append),
        times,
        Goodput(tmp_path, times, 0, clock),
    )
    clock.now += 1
    with watch:
        with watch.step(0, "kind"):
            clock.now += 2
        with watch.fetching(0):
            clock.now += 3
        with watch.saving(1):
            clock.now += 4
            watch.watchdog.check()
        with watch.busy(SAMPLING):
            clock.now += 5

    totals = watch.goodput.totals()
    found = {name: value for name, value in totals.items() if value}
    assert found == {"starting": 1, "steps": 5, "saving": 4, "sampling": 5}
    assert watch.goodput.points == [(0, 0.0), (1, 5.0)] and not ends


@pytest.mark.parametrize("config", [REGRESS, DISTILL], ids=["regress", "distill"])
def test_a_stages_operations_are_those_of_the_plan(tmp_path, monkeypatch, config):
    monkeypatch.setattr(observer, "peak_flops", lambda: 1e15)
    on_one_device(monkeypatch)
    prepared = make(config)
    uses = build.find_stage(config).uses(config, prepared)

    _, one = observer.open_watch(
        config, lambda: uses, tmp_path, 0, Times(), print, print
    )

    assert one.flops == config.batch * sum(use.each * use.flops for use in uses) > 0
    assert one(1, 1, 2.0)["mfu"] == one.flops / 2e15


@pytest.mark.slow
def test_a_training_is_watched_and_profiled_while_it_runs(tmp_path, monkeypatch):
    on_one_device(monkeypatch)
    prepared, lines, requested = make(REGRESS), [], []
    watch, one = observer.open_watch(
        REGRESS, tuple, tmp_path, 0, Times(), lines.append, lines.append
    )

    def request(done, *more):
        """Requests a profile by signal, and a later one by the file."""
        if done == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if done == 8:
            (tmp_path / "profile").touch()
            watch.profiles.look()
        requested.append(done)
        return one(done, *more)

    monitor = Monitor(tmp_path, 20, 0, 1, quiet=False, gauge=request)
    checkpoints = Checkpoints(tmp_path, {"training": {}}, 2)
    loop = Loop(20, save_every=10, log_every=1)
    try:
        with watch:
            train(
                *(prepared.compiled, prepared.state, Cursor(), loop, checkpoints),
                *(monitor, None, watch),
            )
    finally:
        monitor.close()
        checkpoints.close()

    first, second = lines
    assert first.startswith(f"profile of steps 4 to 8: {tmp_path}/profiles")
    assert second.startswith("profile of steps 11 to 15")
    for name in ("4-0", "11-0"):
        assert any((tmp_path / "profiles" / name).rglob("*.trace.json.gz"))
    found = [*map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())]
    assert [line["step"] for line in found] == list(range(1, 21)) == requested
    names = {"step", "loss", "gradient_norm"}
    assert {name for name in found[0] if not MEASURED.fullmatch(name)} == names
    totals = watch.goodput.totals()
    for cause in ("steps", "compiling", "saving", "profiling"):
        assert totals[cause] > 0, cause
    assert totals["lost"] == totals["stopped"] == 0


def test_a_step_that_never_ends_is_seen_after_steps_that_did(tmp_path, clock):
    ends, clock.now = [], 100.0
    dog = Watchdog(
        WatchdogConfig(medians=10, least=20, most=500),
        tmp_path / "stacks",
        lambda *end: ends.append(end),
        clock,
    )
    profiles = Profiles(ProfileConfig(0), tmp_path, ends.append, ends.append)
    watch = Watch(dog, profiles, Times(clock))
    for step in range(3):
        with watch.step(step, "kind"):
            clock.now += 2
        with watch.fetching(step):
            clock.now += 1
        dog.check()
    with watch.step(3, "kind"):
        clock.now += 15  # It is checked every second.
        dog.check()
        assert not ends
        clock.now += 16
        dog.check()

    ((status, line),) = ends
    assert status == 76 and "while a step usually takes 3 s" in line
