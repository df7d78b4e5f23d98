"""The processes' times, and which process the others wait for; no process waits."""

import threading
import time

import pytest

from anchor_jax.training.watch.pace import PATIENCE, Pace, find_slow


def numbers(step=1.0, host=0.9, data=0.05, **more):
    return {"step": step, "host": host, "data": data, **more}


def name(number):
    return f"process {number} (host-{number})"


class Store:
    """The posts of all processes."""

    def __init__(self, found):
        self.found, self.posts = found, []

    def post(self, channel, value):
        self.posts.append((channel, value))

    def posted(self, channel):
        return self.found


def pace(store):
    lines = []
    return Pace(lines.append, store.post, store.posted, name), lines


def exchanged(one, own):
    one.exchange(own)
    one._thread.join()
    return one.numbers()


def test_equal_processes_are_not_slow():
    found = {n: numbers() for n in range(8)}

    assert find_slow(found) is None


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (numbers(data=0.6), "waits 0.6 s per step for data (median 0.05 s)"),
        (numbers(host=1.3), "takes 1.3 s per step outside its devices (median 0.9 s)"),
        (numbers(step=1.5), "takes 1.5 s per step (median 1 s)"),
    ],
)
def test_a_slow_process_is_found_with_its_reason(odd, why):
    found = {n: numbers() for n in range(8)} | {5: odd}

    slow = find_slow(found)

    assert (slow.process, slow.why) == (5, why)


def test_one_of_two_processes_may_be_slow():
    assert find_slow({0: numbers(), 1: numbers(data=0.5)}).process == 1
    assert find_slow({0: numbers(data=0.5), 1: numbers()}).process == 0


def test_a_host_that_its_devices_do_not_wait_for_is_not_slow():
    found = {n: numbers(host=0.1) for n in range(8)} | {5: numbers(host=0.5)}

    assert find_slow(found) is None


def test_a_little_more_time_is_not_slow():
    found = {n: numbers() for n in range(8)} | {5: numbers(data=0.2, step=1.15)}

    assert find_slow(found) is None


def test_the_log_has_the_ratio_and_the_number_of_the_slow_process():
    store = Store({n: numbers() for n in range(4)} | {2: numbers(step=1.5)})
    one, _ = pace(store)

    found = exchanged(one, numbers())

    assert found == {"step_time_max_over_median": 1.5, "slow_process": 2}
    assert store.posts == [("pace", numbers())]
    store.found[2] = numbers()
    assert exchanged(one, numbers()) == {"step_time_max_over_median": 1.0}


def test_a_process_that_stays_slow_is_named_in_one_warning():
    store = Store({n: numbers() for n in range(4)} | {2: numbers(data=0.7)})
    one, lines = pace(store)
    for _ in range(PATIENCE - 1):
        exchanged(one, numbers())
    assert not lines
    for _ in range(PATIENCE):
        exchanged(one, numbers())

    (line,) = lines
    assert line.startswith("warning: process 2 (host-2) is slow and all others wait")
    assert "waits 0.7 s per step for data" in line


def test_a_process_that_is_slow_once_is_not_named():
    store = Store({n: numbers() for n in range(4)})
    one, lines = pace(store)
    for number in range(3 * PATIENCE):
        store.found[2] = numbers(data=0.05 if number % PATIENCE else 0.7)
        exchanged(one, numbers())

    assert not lines


def test_a_store_that_does_not_answer_holds_nothing_up():
    store, answers = Store({}), threading.Event()
    store.post = lambda *a: (answers.wait(60), store.posts.append(a))
    one, _ = pace(store)
    began = time.monotonic()
    for _ in range(5):
        one.exchange(numbers())
        assert one.numbers() == {}
    assert time.monotonic() - began < 5
    answers.set()
    one._thread.join()

    assert len(store.posts) == 1


def test_a_store_that_fails_ends_nothing():
    store = Store({})

    def fail(channel):
        raise RuntimeError("UNAVAILABLE")

    store.posted = fail
    one, lines = pace(store)

    assert exchanged(one, numbers()) == {} and not lines


def test_one_process_has_no_ratio():
    one, _ = pace(Store({}))

    assert exchanged(one, numbers()) == {}
    assert one.largest({"host_memory_gb": 2.0}) == {"host_memory_gb": 2.0}


def test_memory_is_that_of_the_fullest_process():
    store = Store({n: numbers(host_memory_gb=float(n)) for n in range(4)})
    one, _ = pace(store)
    exchanged(one, numbers())

    assert one.largest({"host_memory_gb": 1.0}) == {"host_memory_gb": 3.0}
