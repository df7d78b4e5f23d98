"""Every second of a process has one cause, and compilations are separate."""

import threading

import jax
import pytest

from anchor_jax.training.watch.times import (
    COMPILING,
    DATA,
    DEVICE,
    HOST,
    SAVING,
    STARTING,
    Times,
)


class Clock:
    """Seconds that pass by hand."""

    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_the_innermost_cause_counts_and_no_second_is_lost(clock):
    times = Times(clock)
    clock.now += 3
    with times.of(HOST):
        clock.now += 10
        with times.of(SAVING), times.of(DEVICE):
            clock.now += 2
        clock.now += 1
        found = times.seconds()

    assert found == {STARTING: 3, HOST: 11, DEVICE: 2, SAVING: 0}


def test_compilations_are_taken_from_their_cause(clock):
    times = Times(clock)
    with times.of(HOST):
        clock.now += 10
        times.compiled(4.0)

    assert times.seconds() == {STARTING: 0, HOST: 6, COMPILING: 4}


def test_compilations_in_one_another_count_once(clock):
    times = Times(clock)
    with times.of(HOST):
        clock.now += 1
        times.compiled(0.5)  # before the outer one
        clock.now += 2
        times.compiled(1.0)
        clock.now += 3
        times.compiled(2.0)
        clock.now += 1
        times.compiled(6.0)  # contains the last two

    assert times.seconds() == {STARTING: 0, HOST: 0.5, COMPILING: 6.5}


def test_an_error_ends_its_cause(clock):
    times = Times(clock)
    with pytest.raises(ValueError), times.of(SAVING):
        clock.now += 1
        raise ValueError
    clock.now += 2

    assert times.seconds() == {STARTING: 2, SAVING: 1}


def test_calls_of_other_threads_do_not_count(clock):
    times = Times(clock)

    def wait(seconds):
        clock.now += seconds
        return seconds

    batches = times.counted(DATA, wait)
    assert batches(4) == 4
    thread = threading.Thread(target=batches, args=(2,))
    thread.start()
    thread.join()

    assert times.seconds() == {STARTING: 2, DATA: 4}


def test_what_jax_compiles_is_counted():
    times = Times()
    with times.separating_compiles():
        jax.jit(lambda x: x + 17)(1.0)
    compiled = times.seconds()[COMPILING]
    jax.jit(lambda x: x + 18)(1.0)

    assert 0 < compiled == times.seconds()[COMPILING]
