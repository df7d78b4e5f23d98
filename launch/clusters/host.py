"""Keeps one process of a job running on this host.

    python3 host.py start NAME -- COMMAND ...   in the background; log: NAME/HOST/log
    python3 host.py stop NAME                   SIGTERM: the process saves and leaves
    python3 host.py run NAME -- COMMAND ...     in the foreground

The command starts again if its exit status is 75, and at most three times if it is 76
or a signal ended it. Every other status ends it. Python 3.8 is enough.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

SELF = pathlib.Path(__file__).resolve()
AGAIN = 75
WATCHDOG = 76
CTRL_C = 130
MOST_FAILURES = 3
# A process that asks for a restart within ten minutes, again and again, is broken.
QUICK = 600  # seconds
MOST_QUICK = 5
# Processes that lose another one leave within 60 s. An earlier start would meet them.
SETTLE = 90  # seconds


def say(text):
    """Writes a line into the log."""
    sys.stderr.write(f"host.py: {text}\n")
    sys.stderr.flush()


class Keeper:
    """Runs a command and starts it again as its exit status says."""

    def __init__(self, command, settle):
        self.command, self.settle = command, settle
        self.failures = self.quick = 0
        self.child = self.signal = None
        self.stopping = threading.Event()

    def stop(self, number, frame):
        """Passes a signal to the command, which is then not started again."""
        del frame
        self.signal = number
        self.stopping.set()
        if self.child is not None:
            self.pass_on()

    def pass_on(self):
        """Sends the last signal to the command, once."""
        number, self.signal = self.signal, None
        if number is not None:
            self.child.send_signal(number)

    def request(self, number, frame):
        """Passes a signal to the command, which continues: it requests a profile."""
        del frame
        if self.child is not None:
            self.child.send_signal(number)

    def run(self):
        """Returns the last exit status."""
        signal.signal(signal.SIGUSR1, self.request)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        while True:
            began = time.monotonic()
            status = self.once()
            reason = self.reason_to_end(status, time.monotonic() - began)
            if reason is not None:
                say(f"exit status {status}; {reason}")
                return status
            say(f"exit status {status}; starts again in {self.settle:g} s")
            if self.stopping.wait(self.settle):
                say("stopped")
                return status

    def once(self):
        """Runs the command once and returns its exit status."""
        try:
            self.child = subprocess.Popen(self.command)
        except OSError as error:
            say(f"{self.command[0]}: {error.strerror}")
            return 127
        self.pass_on()  # A signal may come before there is a child.
        status = self.child.wait()
        return status if status >= 0 else 128 - status

    def reason_to_end(self, status, seconds):
        """Returns why the command is not started again, or None."""
        if self.stopping.is_set():
            return "stopped; the same command resumes"
        if status == AGAIN:
            self.quick = self.quick + 1 if seconds < QUICK else 0
            if self.quick > MOST_QUICK:
                return f"{self.quick} runs in a row were shorter than {QUICK} s"
            return None
        if status == WATCHDOG or (status > 128 and status != CTRL_C):
            self.failures += 1
            if self.failures > MOST_FAILURES:
                return f"not started again after {MOST_FAILURES} restarts"
            return None
        return "done" if status == 0 else "not started again"


def folder_of(name):
    """Returns the folder of a job on this host, with its log and process id.

    Hosts that share a home folder have one each.
    """
    return SELF.parent / name / os.uname().nodename


def running(folder):
    """Returns the process id of a job's keeper, or None if it does not run."""
    try:
        number = int((folder / "pid").read_text())
        line = pathlib.Path(f"/proc/{number}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return number if os.fsencode(str(SELF)) in line.split(b"\0") else None


def start(name, command, settle):
    """Starts the keeper of a job in the background and returns the exit status."""
    folder = folder_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    if running(folder) is not None:
        say(f"{name} already runs on this host; stop it first")
        return 2
    line = [sys.executable, str(SELF), "run", name, f"--settle={settle:g}", "--"]
    with (folder / "log").open("a") as log:
        keeper = subprocess.Popen(
            line + command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (folder / "pid").write_text(str(keeper.pid))
    say(f"{name} runs as process {keeper.pid}; log: {folder / 'log'}")
    return 0


def stop(name):
    """Asks a job to save and leave, and returns the exit status."""
    number = running(folder_of(name))
    if number is None:
        say(f"{name} does not run on this host")
        return 0
    os.kill(number, signal.SIGTERM)
    say(f"{name} saves and leaves")
    return 0


def main(argv):
    """Runs the program and returns its exit status."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("start", "stop", "run"))
    parser.add_argument("name")
    parser.add_argument("--settle", type=float, default=SETTLE)
    given, command = parser.parse_args(argv[:end]), argv[end + 1 :]
    if given.action == "stop":
        return stop(given.name)
    if not command:
        parser.error("give the command after --")
    if given.action == "start":
        return start(given.name, command, given.settle)
    return Keeper(command, given.settle).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
