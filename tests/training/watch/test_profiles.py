"""Profiles by signal and by file, between the steps of a training."""

import json
import os
import pathlib
import signal

import fake_gcs
import jax
import jax.numpy as jnp
import pytest

from anchor_jax import interrupts, io, processes
from anchor_jax.training.watch import profiles, speeds
from anchor_jax.training.watch.profiles import ProfileConfig, Profiles


class Steps:
    """A loop whose results are fetched two steps later."""

    def __init__(self, folder, steps=3):
        self.told, self.said = [], []
        self.profiles = Profiles(
            ProfileConfig(steps), folder, self.told.append, self.said.append
        )
        self.step = 0

    def run(self, count):
        for _ in range(count):
            self.profiles.before(self.step)
            jnp.square(self.step).block_until_ready()
            if self.profiles.is_due(self.step - 1):
                self.profiles.finish()
            self.step += 1


@pytest.fixture
def traces(monkeypatch):
    """Folders of the profiler's traces, which are made without it."""
    found = []

    def stop():
        (found[-1] / "plugins").mkdir()
        (found[-1] / "plugins" / "host.xplane.pb").write_bytes(b"trace")

    monkeypatch.setattr(jax.profiler, "start_trace", found.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    return found


def test_a_signal_makes_a_profile_that_can_be_opened(tmp_path):
    steps = Steps(tmp_path)
    with steps.profiles:
        steps.run(4)
        os.kill(os.getpid(), signal.SIGUSR1)
        steps.run(7)

    (line,) = steps.said
    folder = tmp_path / "profiles" / "5-0"
    assert line.startswith(f"profile of steps 5 to 7: {folder}; open it with")
    assert f"tensorboard --logdir {folder}" in line and "ui.perfetto.dev" in line
    names = [path.name for path in folder.rglob("*") if path.is_file()]
    assert any(one.endswith(".xplane.pb") for one in names)
    assert any(one.endswith(".trace.json.gz") for one in names)
    assert not steps.told


def test_the_file_makes_a_profile_once(tmp_path, traces):
    steps = Steps(tmp_path)
    (tmp_path / "profile").touch()
    steps.profiles.look()
    steps.profiles.look()
    steps.run(12)

    assert not (tmp_path / "profile").exists() and len(traces) == 1
    (line,) = steps.told
    assert line.startswith(f"profile of steps 1 to 3: {tmp_path / 'profiles'};")
    assert (tmp_path / "profiles/1-0/plugins/host.xplane.pb").read_bytes() == b"trace"
    assert not traces[0].exists()


def test_a_run_in_a_bucket_takes_the_request_there(traces):
    with fake_gcs.serving() as (store, _):
        run = io.place(f"gs://{fake_gcs.BUCKET}/run")
        store.write("run/profile", b"", {})
        steps = Steps(run)
        steps.profiles.look()
        steps.run(6)
        assert "run/profile" not in store.objects
        assert "run/profiles/1-0/plugins/host.xplane.pb" in store.objects

        assert min(speeds.disk(run, "measured")) > 0
        assert "run/measured" not in store.objects


def test_the_file_is_seen_while_steps_run(tmp_path, traces, monkeypatch):
    monkeypatch.setattr(profiles, "_POLL", 0.01)
    steps = Steps(tmp_path)
    with steps.profiles:
        (tmp_path / "profile").touch()
        for _ in range(2000):
            steps.run(1)
            if steps.told:
                break
            profiles.threading.Event().wait(0.01)

    assert len(traces) == 1 and steps.told


def test_other_processes_learn_of_the_file_from_the_first(
    tmp_path, traces, monkeypatch
):
    posts = {}
    monkeypatch.setattr(processes, "post", lambda name, value: posts.update({0: value}))
    monkeypatch.setattr(processes, "posted", lambda name: posts)
    first, other = Steps(tmp_path), Steps(tmp_path)
    (tmp_path / "profile").touch()
    first.profiles.look()
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "index", lambda: 3)
    for _ in range(3):
        other.profiles.look()
    other.run(6)

    assert (tmp_path / "profiles" / "1-3").is_dir() and len(traces) == 1
    (tmp_path / "profile").touch()
    other.profiles.look()
    assert (tmp_path / "profile").exists(), "only the first process removes it"


def test_a_request_during_a_profile_is_ignored_and_said(tmp_path, traces):
    steps = Steps(tmp_path)
    with steps.profiles:
        os.kill(os.getpid(), signal.SIGUSR1)
        steps.run(2)
        os.kill(os.getpid(), signal.SIGUSR1)
        steps.run(6)
        os.kill(os.getpid(), signal.SIGUSR1)
        steps.run(6)

    ignored, *made = sorted(steps.said)
    assert ignored == "a profile is being made, so another request for one is ignored"
    assert [one.split(":")[0] for one in made] == [
        "profile of steps 1 to 3",
        "profile of steps 9 to 11",
    ]


def test_a_training_that_ends_ends_its_profile(tmp_path, traces):
    steps = Steps(tmp_path, steps=50)
    with steps.profiles:
        os.kill(os.getpid(), signal.SIGUSR1)
        steps.run(4)

    (line,) = steps.said
    assert line.startswith("profile of steps 1 to 2:")


def test_a_profiler_that_fails_does_not_end_the_training(tmp_path, monkeypatch):
    def fail(folder):
        raise RuntimeError("Only one profile may be run at a time.")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    steps = Steps(tmp_path)
    with steps.profiles:
        os.kill(os.getpid(), signal.SIGUSR1)
        steps.run(9)

    (line,) = steps.said
    assert "the profile failed (Only one profile may be run" in line


def test_profiles_can_be_turned_off(tmp_path, traces):
    before = signal.getsignal(signal.SIGUSR1)
    steps = Steps(tmp_path, steps=0)
    with steps.profiles:
        assert signal.getsignal(signal.SIGUSR1) == before
        steps.run(3)

    assert not traces


def test_a_signal_before_the_first_step_is_a_request(tmp_path, traces):
    before = signal.getsignal(signal.SIGUSR1)
    steps = Steps(tmp_path)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
    try:
        with interrupts.counting(signal.SIGUSR1):
            os.kill(os.getpid(), signal.SIGUSR1)
            with steps.profiles:
                steps.run(5)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1,))

    assert len(traces) == 1 and signal.getsignal(signal.SIGUSR1) == before
    assert interrupts.counted(signal.SIGUSR1) == 0


def test_the_names_of_the_request_are_those_of_the_pages():
    root = pathlib.Path(profiles.__file__).parents[3]
    page = (root / "anchor_jax/training/README.md").read_text()

    assert f"touch OUT/{profiles.FILE}" in page and "kill -USR1" in page
    assert f"`{profiles.FOLDER}/" in page
    assert json.loads(str(ProfileConfig().steps)) == 5 and "five steps" in page
