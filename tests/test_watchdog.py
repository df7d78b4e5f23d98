"""A training that hangs is ended; slow work of a legitimate kind is not."""

import subprocess
import sys

import pytest

from anchor_jax import interrupts
from anchor_jax.watchdog import STATUS, Watchdog, WatchdogConfig

CONFIG = WatchdogConfig(medians=10, least=20, most=500)


class Watched:
    """A watchdog whose clock and end are set by hand."""

    def __init__(self, folder, config=CONFIG):
        self.now, self.ends = 100.0, []
        self.stacks = folder / "stacks-0.txt"
        self.dog = Watchdog(
            config, self.stacks, lambda *end: self.ends.append(end), lambda: self.now
        )

    def steps(self, count, seconds, kind="critic"):
        for _ in range(count):
            self.dog.started(kind)
            self.wait(seconds)
            self.dog.ended()

    def wait(self, seconds):
        """Passes time, as its thread sees it."""
        for _ in range(int(seconds)):
            self.now += 1
            self.dog.check()
        self.now += seconds % 1


@pytest.fixture
def watched(tmp_path):
    return Watched(tmp_path)


def test_a_step_that_hangs_ends_the_process(watched):
    watched.steps(4, 3.0)
    watched.dog.started("critic")
    watched.wait(29)
    assert not watched.ends
    watched.wait(3)

    ((status, line),) = watched.ends
    assert status == STATUS == 76
    assert "no step for 31 s, while a step usually takes 3 s" in line
    assert str(watched.stacks) in line
    assert "test_a_step_that_hangs" in watched.stacks.read_text()


def test_short_steps_may_take_the_least_time(watched):
    watched.steps(9, 0.5)
    watched.dog.started("critic")
    watched.wait(20)
    assert not watched.ends
    watched.wait(2)
    assert watched.ends


def test_the_first_step_of_each_kind_may_compile(watched):
    watched.dog.started("critic")
    watched.wait(400)
    watched.dog.ended()
    watched.steps(3, 1.0)
    watched.dog.started("generator")
    watched.wait(400)
    assert not watched.ends
    watched.wait(101)
    assert watched.ends


def test_a_step_in_flight_does_not_count_as_known(watched):
    watched.dog.started("critic")
    watched.dog.started("critic")
    watched.wait(400)

    assert not watched.ends


def test_saving_and_samples_may_take_long_and_do_not_count_as_steps(watched):
    watched.steps(4, 1.0)
    watched.dog.started("critic")
    with watched.dog.busy("saving"):
        watched.wait(400)
    watched.wait(19)
    assert not watched.ends
    watched.wait(2)
    assert "while a step usually takes 1 s" in watched.ends[0][1]


def test_a_save_that_hangs_is_named(watched):
    watched.steps(4, 1.0)
    with watched.dog.busy("saving"):
        watched.wait(501)

    assert "saving takes 501 s" in watched.ends[0][1]


def test_a_process_that_was_suspended_is_not_ended(watched):
    watched.steps(4, 1.0)
    watched.dog.started("critic")
    watched.now += 5000
    watched.wait(15)

    assert not watched.ends


def test_nothing_is_watched_before_the_first_step(watched):
    watched.wait(1000)

    assert not watched.ends


def test_stacks_are_written_too_if_another_process_hangs(watched):
    with watched.dog:
        for call in interrupts.at_end:
            call(75)
        assert not watched.stacks.exists()
        for call in interrupts.at_end:
            call(STATUS)
        assert watched.stacks.exists()

    assert watched.dog._write_for not in interrupts.at_end


def test_it_can_be_turned_off(tmp_path):
    with Watched(tmp_path, WatchdogConfig(medians=0)).dog as dog:
        assert dog._write_for not in interrupts.at_end


BLOCKED = """
import ctypes, sys, threading
from anchor_jax import interrupts, supervisor, watchdog
supervisor.start()
interrupts.install()
supervisor.tell(name="process 1 (host-b)", index=1, folder=sys.argv[1])
config = watchdog.WatchdogConfig(most=float(sys.argv[2]))
with watchdog.Watchdog(config, sys.argv[1] + "/stacks-1.txt"):
    threading.Event().wait(2)
    print("blocked", flush=True)
    ctypes.PyDLL(None).sleep(int(sys.argv[3]))  # It keeps Python's lock.
threading.Event().wait(5)
print("continued")
"""


def run_blocked(folder, most, seconds):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, str(folder), str(most), str(seconds)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_call_that_lets_no_python_run_ends_a_process_of_a_job(tmp_path):
    done = run_blocked(tmp_path, 3, 50)

    kept = tmp_path / "process-1.log"
    assert (done.returncode, done.stdout) == (STATUS, "blocked\n")
    assert done.stderr == (
        "process 1 (host-b) ends with status 76: no Python code ran for 0:00:03, see"
        f" the stacks of all threads; messages of C++: {kept}\n"
    )
    assert "line 11 in <module>" in kept.read_text()


def test_a_call_that_ends_in_time_and_a_watchdog_that_has_ended_do_not(tmp_path):
    done = run_blocked(tmp_path, 4, 2)

    assert (done.returncode, done.stdout) == (0, "blocked\ncontinued\n")
    assert not done.stderr and not list(tmp_path.iterdir())
