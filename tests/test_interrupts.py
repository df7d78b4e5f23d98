"""Requests to stop, in processes of their own: a Ctrl-C is never lost."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from anchor_jax import interrupts, io
from anchor_jax.errors import Stopped

ROOT = pathlib.Path(interrupts.__file__).parents[1]
BEGIN = """
import contextlib, ctypes, gc, os, pathlib, signal, sys, threading, time, weakref
from anchor_jax import interrupts, io
from anchor_jax.errors import Stopped

interrupts.GRACE = 0.3
ready = lambda: print("ready", flush=True)

def hang():  # without running Python, as loading and compiling do
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)

def work(seconds):  # without a check
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
"""
END = "\nsys.exit(interrupts.leave_with(0))\n"


def start(program, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + program + END, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def press(process, number=signal.SIGINT):
    process.send_signal(number)


def ends(process):
    """Returns status, output and errors."""
    with process:
        out, err = process.stdout.read(), process.stderr.read()
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_work_ends_at_its_next_check(number):
    process = start("""
interrupts.install()
ready()
try:
    while True:
        interrupts.check()
        time.sleep(0.01)
except Stopped as error:
    print(error)
""")

    press(process, number)

    assert ends(process) == (130, "interrupted\n", "")


def test_a_press_within_a_librarys_callback_is_not_lost():
    # A KeyboardInterrupt that is raised in a finalizer is printed and ignored.
    process = start("""
interrupts.install()
class Thing: pass
def finalize():
    ready()
    end = time.monotonic() + 0.2
    while time.monotonic() < end: pass
thing = Thing()
weakref.finalize(thing, finalize)
del thing
try:
    interrupts.check()
    print("lost")
except Stopped:
    print("stopped")
""")

    press(process)

    assert ends(process) == (130, "stopped\n", "")


def test_a_blocked_process_ends_without_incomplete_files(tmp_path):
    process = start(
        """
interrupts.install()
with io.making_folder(pathlib.Path(sys.argv[1]) / "made") as part:
    (part / "x").write_text("x")
    ready()
    hang()
""",
        tmp_path,
    )

    press(process)

    assert ends(process) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_once_the_end_is_decided(tmp_path):
    process = start(
        """
interrupts.install()
real = io.remove_unfinished
def slow():
    real()
    time.sleep(0.5)
io.remove_unfinished = slow
ready()
while True:  # never checks
    time.sleep(0.001)
    with io.replacing(pathlib.Path(sys.argv[1]) / "file") as part:
        part.write_text("x" * 1000)
""",
        tmp_path,
    )

    press(process)

    assert ends(process) == (130, "", "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_patient_section_is_waited_for():
    process = start("""
interrupts.install()
with interrupts.patient("stopping soon"):
    ready()
    work(0.8)
    assert interrupts.stop_requested()
print("saved")
""")

    press(process)

    assert ends(process) == (130, "saved\n", "stopping soon\n")


def test_patience_lasts_as_long_as_what_would_be_lost():
    process = start("""
interrupts.install()
began = time.monotonic()
with interrupts.patient("stopping soon", lambda: began):
    ready()
    hang()
""")

    press(process)

    assert ends(process) == (130, "", "stopping soon\ninterrupted\n")


def test_a_section_may_be_waited_for_longer_than_what_would_be_lost_took():
    process = start("""
interrupts.install()
with interrupts.patient("", time.monotonic, least=60):
    ready()
    time.sleep(interrupts.GRACE + 1)
    print("saved", flush=True)
interrupts.check()
""")

    press(process)

    status, shown, _ = ends(process)
    assert (status, shown) == (130, "saved\n")


def test_a_section_that_cannot_tell_its_work_is_not_waited_for():
    process = start("""
interrupts.install()
with interrupts.patient("stopping soon", lambda: 1 / 0):
    ready()
    hang()
""")

    press(process)

    assert ends(process) == (130, "", "stopping soon\ninterrupted\n")


def test_a_second_press_ends_a_patient_section():
    process = start("""
interrupts.install()
with interrupts.patient("stopping soon"):
    ready()
    hang()
""")

    press(process)
    time.sleep(2 * interrupts._REBOUND)
    press(process)

    assert ends(process) == (130, "", "stopping soon\ninterrupted\n")


def test_a_press_that_arrives_twice_at_once_is_one():
    process = start("""
interrupts.install()
with interrupts.patient():
    ready()
    work(1)
print("saved")
""")

    press(process)
    press(process)
    press(process, signal.SIGTERM)

    assert ends(process) == (130, "saved\n", "")


def test_renames_are_not_torn_apart(tmp_path):
    process = start(
        """
interrupts.install()
folder = pathlib.Path(sys.argv[1])
with interrupts.uninterrupted():
    (folder / "a").touch()
    ready()
    work(0.8)
    (folder / "b").touch()
hang()
""",
        tmp_path,
    )

    press(process)

    assert ends(process)[0] == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_libraries_say_nothing_after_the_request():
    process = start("""
import atexit
atexit.register(lambda: print("a library's last words", file=sys.stderr))
interrupts.install()
ready()
while not interrupts.stop_requested():
    time.sleep(0.01)
print("stopped")
""")

    press(process)

    assert ends(process) == (130, "stopped\n", "")


@pytest.mark.parametrize("held", ["thread", "exit handler"])
def test_a_process_that_does_not_end_by_itself_is_ended(held):
    process = start(f"""
import atexit
interrupts.install()
if {held!r} == "thread":
    threading.Thread(target=time.sleep, args=(30,)).start()
else:
    atexit.register(time.sleep, 30)
ready()
""")
    time.sleep(0.3)

    press(process)

    assert ends(process)[0] == 130


def test_a_press_while_the_command_line_is_imported():
    program = "import sys; sys.argv = ['anchor-jax', 'policies']\n"
    program += "import anchor_jax.__main__ as main\n"
    program += "from anchor_jax import interrupts\n"
    program += "interrupts.install()\nimport os, signal\n"
    program += "os.kill(os.getpid(), signal.SIGINT)\nsys.exit(main.main())\n"

    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted\n"


@pytest.mark.slow
def test_a_press_while_jax_compiles():
    process = start("""
interrupts.install()
import jax, jax.numpy as jnp
jax.config.update("jax_compilation_cache_dir", None)
def long(x):
    for number in range(400):
        x = jnp.sin(x) @ jnp.cos(x.T + number)
    return x
lowered = jax.jit(long).lower(jnp.ones((8, 8)))
ready()
for _ in range(1000):
    lowered.compile()
""")

    press(process)

    assert ends(process) == (130, "", "interrupted\n")


def test_a_child_gets_the_request_that_its_start_held_back():
    process = start("""
interrupts.install()
import subprocess
with interrupts.held_back():
    child = subprocess.Popen([sys.executable, "-c", '''
import os, signal, sys, time
os.kill(os.getpid(), signal.SIGINT)
from anchor_jax import interrupts
interrupts.install()
time.sleep(0.1)
sys.exit(interrupts.leave_with(0))
'''])
assert child.wait() == 130
ready()
print("both")
""")

    assert ends(process) == (0, "both\n", "")


def test_a_forked_childs_signals_are_its_own():
    process = start("""
import multiprocessing
interrupts.install()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
ready()
time.sleep(0.2)
child.terminate()
child.join(10)
work(0.5)
print(child.exitcode, interrupts.stop_requested())
""")

    assert ends(process) == (0, "-15 False\n", "")


def test_a_process_outside_the_command_line_continues():
    with interrupts.listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.stop_requested()
        with pytest.raises(Stopped):
            interrupts.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    assert not interrupts.stop_requested()
    interrupts.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_that_are_not_pythons_stay(monkeypatch):
    installed = []
    foreign = {signal.SIGTERM: None, signal.SIGINT: signal.default_int_handler}
    monkeypatch.setattr(signal, "getsignal", foreign.get)
    monkeypatch.setattr(
        signal, "signal", lambda one, handler: installed.append(one) or foreign[one]
    )

    with interrupts.listening():
        pass

    assert installed == [signal.SIGINT] * 2


def test_other_threads_are_not_stopped():
    failed = []

    def work():
        try:
            interrupts.check()
        except Stopped as error:
            failed.append(error)

    with interrupts.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    assert not failed


def test_progress_is_a_place_to_stop(tmp_path):
    seen = []
    report = interrupts.checking(seen.append)

    with interrupts.listening():
        report(1)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped), io.scratch_folder() as scratch:
            report(2)

    assert seen == [1] and not scratch.exists()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_only_sigterm_asks_a_job_to_be_started_again(number, status):
    process = start("""
interrupts.install()
interrupts.join_job()
ready()
while not interrupts.stop_requested():
    time.sleep(0.01)
print("stopped")
""")

    press(process, number)

    assert ends(process) == (status, "stopped\n", "")


def test_ctrl_c_after_sigterm_does_not_ask_to_be_started_again():
    process = start("""
interrupts.install()
interrupts.join_job()
with interrupts.patient():
    ready()
    hang()
""")

    press(process, signal.SIGTERM)
    time.sleep(interrupts.REBOUND_IN_JOB + 1)
    press(process)

    assert ends(process)[0] == 130


def test_a_second_sigterm_ends_a_process_of_a_job():
    process = start("""
interrupts.install()
interrupts.join_job()
with interrupts.patient("stopping soon"):
    ready()
    hang()
""")

    press(process, signal.SIGTERM)
    time.sleep(interrupts.REBOUND_IN_JOB + 1)
    press(process, signal.SIGTERM)

    assert ends(process) == (75, "", "stopping soon\ninterrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_late_copy_of_a_signal_does_not_end_a_process_of_a_job(number):
    process = start("""
interrupts.install()
interrupts.join_job()
with interrupts.patient("stopping soon"):
    ready()
    work(2)
print("saved")
""")

    press(process, number)
    time.sleep(1.2)  # The parent may be slow to pass the signal on.
    press(process, number)

    status = 130 if number == signal.SIGINT else 75
    assert ends(process) == (status, "saved\n", "stopping soon\n")


def test_a_request_of_another_process_is_passed_on_and_is_not_a_second_one():
    process = start("""
interrupts.install()
interrupts.join_job()
interrupts.be_quiet()
interrupts.on_request.append(lambda number: print("passed on", number, flush=True))
with interrupts.patient("not shown"):
    ready()
    interrupts.request(signal.SIGTERM)
    work(interrupts.REBOUND_IN_JOB + 1)
    print("again", flush=True)
    work(1)
print("saved")
""")
    assert process.stdout.readline() == "passed on 15\n"
    assert process.stdout.readline() == "again\n"

    press(process, signal.SIGTERM)

    assert ends(process) == (75, "saved\n", "")


def test_a_process_tells_its_status_before_it_is_ended():
    process = start("""
interrupts.install()
interrupts.at_end.append(lambda status: os.write(1, f"ends with {status}\\n".encode()))
interrupts._silence = lambda: None
ready()
threading.Thread(target=interrupts.end, args=(76, "no progress")).start()
work(60)
""")

    assert ends(process) == (76, "ends with 76\n", "no progress\n")
