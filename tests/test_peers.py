"""Agreement of processes on the step to stop at, and the end of all after a failure."""

import threading
import time

import pytest

from anchor_jax import interrupts, peers
from anchor_jax.peers import AFTER, Peers


class Store:
    """The store of jax's coordinator, in memory."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, name, text):
        if name in self.values:
            raise ValueError("ALREADY_EXISTS")
        self.values[name] = text

    def key_value_dir_get(self, folder):
        return [one for one in self.values.items() if one[0].startswith(folder)]


@pytest.fixture
def job(monkeypatch):
    """Three processes with one store, whose threads are called by hand."""
    requests = []
    monkeypatch.setattr(interrupts, "request", requests.append)
    monkeypatch.setattr(interrupts, "stop_requested", lambda: bool(requests))
    store, ends = Store(), []
    members = [
        Peers(store, index, 3, lambda *end, own=index: ends.append((own, *end)))
        for index in range(3)
    ]
    for one in members:
        one.requests, one.followed = requests, ends
    return members


def look(job, times=2):
    for _ in range(times):
        for one in job:
            one.look()


def test_all_stop_before_the_step_that_none_has_started(job):
    for one, step in zip(job, (7, 8, 7), strict=True):
        for number in range(step + 1):
            assert one.may_start(number)
    job[0].pass_on(15)
    look(job)

    assert set(job[0].requests) == {15}
    assert [one.may_start(8) for one in (job[0], job[2])] == [True, True]
    assert not any(one.may_start(9) for one in job)
    assert all(one.is_agreed() for one in job)


def test_a_process_waits_until_the_others_have_given_their_steps(job):
    for one in job:
        one.may_start(4)
    job[1].pass_on(15)
    job[0].look()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(job[0].may_start(5)))
    thread.start()
    time.sleep(0.2)
    assert not answers
    look(job)
    thread.join(5)

    assert answers == [False]


def test_a_process_that_has_left_the_loop_makes_no_steps(job):
    for one in job:
        one.may_start(4)
    job[2].leave_steps()
    job[0].pass_on(15)
    look(job)

    assert job[0].may_start(5) and job[1].may_start(5)
    assert job[2]._at == AFTER and job[0].is_agreed()


def test_without_a_process_in_the_loop_nothing_is_saved(job):
    for one in job[:2]:
        one.may_start(4)
    job[0].pass_on(15)
    look(job)

    assert not job[0].may_start(5) and not job[0].is_agreed()


def test_a_silent_process_is_not_awaited_without_end(job, monkeypatch):
    monkeypatch.setattr(peers, "AGREEING", 0.2)
    for one in job:
        one.may_start(4)
    job[0].pass_on(15)
    job[0].look()
    began = time.monotonic()

    assert not job[0].may_start(5)
    assert 0.1 < time.monotonic() - began < 5 and not job[0].is_agreed()


def test_all_follow_a_process_that_fails(job, monkeypatch):
    job[1].write_end(2, "error: the disk is full")
    look(job)
    assert not job[0].followed, "they may fail by themselves"
    monkeypatch.setattr(peers, "FOLLOWING", -1.0)
    look(job, 1)

    assert (0, 1, 2, "error: the disk is full") in job[0].followed
    assert {own for own, *_ in job[0].followed} == {0, 2}


def test_a_process_that_ends_by_itself_follows_no_other(job, monkeypatch):
    monkeypatch.setattr(peers, "FOLLOWING", -1.0)
    job[1].write_end(0)
    look(job)
    job[0].close()
    job[2].write_end(75)
    look(job)

    assert {own for own, *_ in job[0].followed} <= {1}
    assert job[0].ends()[2] == {"status": 75, "reason": ""}
