"""What a request to stop would lose of a training; its steps are in test_programs."""

import contextlib
import time
from types import SimpleNamespace

import pytest

from anchor_jax.errors import Stopped
from anchor_jax.training import loop


class Pretended:
    """Checkpoints that are being written until they are said to be on disk."""

    saving = False

    def is_saving(self):
        return self.saving


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are set."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_only_steps_that_no_checkpoint_holds_would_be_lost(clock):
    checkpoints = Pretended()
    work = loop._Work(checkpoints)

    clock[0] = 10.0
    assert work.since() == 10.0  # The first step compiles.
    work.step_started()
    clock[0] = 20.0
    work.step_started()
    assert work.since() == 10.0
    checkpoints.saving = True
    work.saved()
    clock[0] = 30.0
    assert work.since() == 10.0  # Until the checkpoint is whole.
    checkpoints.saving = False
    assert work.since() == 30.0
    work.step_started()
    clock[0] = 40.0
    assert work.since() == 30.0


def test_steps_that_are_run_while_a_checkpoint_is_written_count(clock):
    checkpoints = Pretended()
    work = loop._Work(checkpoints)

    clock[0] = 10.0
    work.step_started()
    checkpoints.saving = True
    work.saved()
    clock[0] = 20.0
    work.step_started()
    checkpoints.saving = False
    clock[0] = 30.0

    assert work.since() == 20.0


def test_several_processes_have_more_time_to_save_but_none_for_compiling(
    clock, monkeypatch
):
    monkeypatch.setattr(loop.processes, "count", lambda: 2)
    work = loop._Work(Pretended())

    clock[0] = 100.0
    assert work.since() == 100.0
    work.step_started()
    clock[0] = 110.0
    assert work.since() == 40.0


def videos(is_requested, monkeypatch):
    """Returns the steps of which a process starts to make sample videos."""
    made = []

    def check():
        if is_requested:
            raise Stopped("interrupted")

    def sample(state, step):
        made.append(step)
        loop.interrupts.check()  # as between two blocks
        made.append("whole")

    monkeypatch.setattr(loop.interrupts, "check", check)
    rules = loop.Loop(9, sample_every=3)
    for done in (2, 3):
        watch = SimpleNamespace(busy=contextlib.nullcontext)
        monitor = SimpleNamespace(paused=contextlib.nullcontext)
        loop._show(sample, rules, None, done, watch, monitor)
    return made


def test_a_request_that_one_process_knows_first_does_not_part_them(monkeypatch):
    monkeypatch.setattr(loop.processes, "count", lambda: 2)

    assert videos(True, monkeypatch) == [3]
    assert videos(False, monkeypatch) == [3, "whole"]


def test_one_process_makes_no_videos_after_a_request(monkeypatch):
    assert videos(True, monkeypatch) == []
