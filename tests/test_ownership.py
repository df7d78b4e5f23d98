"""One job to a folder: refused, joined, taken over, lost."""

import contextlib
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from anchor_jax import io, ownership
from anchor_jax.errors import UserError

# Owns a folder, writes into it, and ends on request. `where` "elsewhere": what this
# process says of itself can be checked by nobody, as in another container.
PROGRAM = """
import json, os, sys, time
from anchor_jax import io, ownership
from anchor_jax.errors import UserError
given = json.loads(sys.argv[1])
ownership.BEAT, ownership.LEASE = given.get("beat", 0.05), given.get("lease", 30.0)
if given.get("where"):
    ownership._where = lambda: [given["where"]]
if given.get("after"):
    print("ready", flush=True)
while given.get("after") and not os.path.exists(given["after"]):
    time.sleep(0.001)
try:
    lease = ownership.own(
        given["folder"], given.get("job", ""), given.get("seats", [""]),
        patience=given.get("patience", 0.0), tell=lambda line: print(line, flush=True)
    )
except UserError as error:
    print(f"error: {error}", flush=True)
    sys.exit(2)
part = io.temporary_name(io.pathlib.Path(given["folder"]) / "a.txt")
part.write_text("half")
print("owns", os.getpid(), flush=True)
with lease, io.unfinished(part):
    line = sys.stdin.readline().strip()
    if line == "write":
        with io.replacing(io.pathlib.Path(given["folder"]) / "b.txt") as new:
            new.write_text("whole")
"""


@contextlib.contextmanager
def job(folder, **given):
    """Starts a process that wants to own a folder."""
    line = [sys.executable, "-c", PROGRAM, json.dumps({"folder": str(folder), **given})]
    pipe = subprocess.PIPE
    process = subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def owner(folder, **given):
    with job(folder, **given) as process:
        line = process.stdout.readline()
        if "waiting" in line:
            line = process.stdout.readline()
        assert line.startswith("owns")
        yield process


def together(jobs, go):
    """Lets jobs that are ready try at once; returns whether each got the folder."""
    for one in jobs:
        assert one.stdout.readline() == "ready\n"
    go.touch()
    lines = []
    for one in jobs:
        line = one.stdout.readline()
        while "waiting" in line:
            line = one.stdout.readline()
        lines.append(line)
    assert all(line.startswith(("owns", "error: ")) for line in lines)
    return [line.startswith("owns") for line in lines]


def end(process, line=""):
    """Lets a process end; returns what else it printed, and its status."""
    printed, _ = process.communicate(line + "\n", timeout=60)
    return printed, process.returncode


def hidden(folder):
    return sorted(path.name for path in folder.glob(".*"))


def test_a_second_job_is_refused_in_one_line_and_the_first_continues(tmp_path):
    with owner(tmp_path) as first:
        with pytest.raises(UserError) as caught:
            ownership.own(tmp_path)
        message = str(caught.value)
        assert f"process {first.pid} on host" in message and " since " in message
        assert str(tmp_path) in message and "choose another folder" in message
        assert "\n" not in message
        assert end(first, "write") == ("", 0)

    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]
    with ownership.own(tmp_path):
        assert hidden(tmp_path) == [".owner"]
    assert hidden(tmp_path) == []


def test_a_process_may_own_a_folder_twice(tmp_path):
    with ownership.own(tmp_path) as outer:
        with ownership.own(tmp_path), ownership.own(tmp_path / "inner"):
            pass
        assert hidden(tmp_path) == [".owner"]
        outer.check()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            ownership.own(tmp_path, job="another")
    assert hidden(tmp_path) == []


def test_a_lease_that_nobody_holds_any_more_is_released(tmp_path):
    lease = ownership.own(tmp_path)
    del lease
    assert hidden(tmp_path) == []
    kept = ownership.own(tmp_path)
    io.remove_unfinished()
    assert hidden(tmp_path) == []
    kept.release()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_owner_is_followed_at_once_and_its_parts_are_removed(tmp_path, number):
    (tmp_path / ".a.0123456789ab-1.part.txt").touch()
    (tmp_path / "a.part.txt").touch()
    with owner(tmp_path) as first:
        first.send_signal(number)
        first.wait()
        assert len(hidden(tmp_path)) == 3

        with ownership.own(tmp_path):
            pass

    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {".a.0123456789ab-1.part.txt", "a.part.txt"}


def test_a_reused_process_number_is_not_taken_for_the_owner(tmp_path):
    with owner(tmp_path) as first:
        first.kill()
        first.wait()
        (file,) = (tmp_path / ".owner").iterdir()
        facts = json.loads(file.read_text())
        file.write_text(json.dumps(facts | {"pid": os.getpid()}))

        with ownership.own(tmp_path):
            pass


def test_another_containers_process_of_our_number_is_not_taken_for_dead(tmp_path):
    with (
        owner(tmp_path, where="elsewhere") as first,
        job(tmp_path, beat=0.1) as second,
    ):
        printed, status = end(second)
        assert status == 2 and f"in use by process {first.pid}" in printed
        assert end(first, "write")[1] == 0


def test_a_process_that_cannot_be_seen_is_watched_until_its_lease_ends(tmp_path):
    with owner(tmp_path, where="elsewhere") as first:
        first.kill()
        first.wait()
        began = time.monotonic()
        with job(tmp_path, lease=1.0) as second:
            line = second.stdout.readline()
            assert "waiting up to 1 s for a heartbeat of process" in line
            assert second.stdout.readline().startswith("owns")
            assert time.monotonic() - began >= 1.0
            assert end(second)[1] == 0
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_slept_and_lost_its_lease_writes_nothing_more(tmp_path):
    with owner(tmp_path, where="elsewhere") as first:
        first.send_signal(signal.SIGSTOP)
        with owner(tmp_path, lease=0.5) as second:
            first.send_signal(signal.SIGCONT)
            _, status = end(first, "write")
            assert status == 1
            assert not (tmp_path / "b.txt").exists()
            assert end(second, "write")[1] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


def test_what_was_lost_is_reported_with_the_new_owner(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "_where", lambda: ["elsewhere"])
    lease = ownership.own(tmp_path)
    (file,) = (tmp_path / ".owner").iterdir()
    file.unlink()

    with owner(tmp_path) as second:
        message = f"taken over by process {second.pid} .*it will write nothing more"
        with pytest.raises(UserError, match=message):
            io.write_text(tmp_path / "b.txt", "whole")
        lease.release()
        assert end(second)[1] == 0


def test_a_stopped_process_of_this_machine_keeps_its_lease(tmp_path):
    with owner(tmp_path) as first:
        first.send_signal(signal.SIGSTOP)
        with job(tmp_path, lease=0.3) as second:
            assert end(second)[1] == 2
        first.send_signal(signal.SIGCONT)
        assert end(first, "write")[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("where", [None, "elsewhere"])
def test_of_many_that_take_over_at_once_one_wins(tmp_path, where):
    folder, go = tmp_path / "folder", tmp_path / "go"
    with owner(folder, where=where) as first:
        first.kill()
        first.wait()
        with contextlib.ExitStack() as stack:
            given = {"after": str(go), "lease": 0.5}
            jobs = [stack.enter_context(job(folder, **given)) for _ in range(8)]
            won = together(jobs, go)
            ended = [end(one, "write")[1] for one in jobs]

    assert won.count(True) == 1
    assert ended == [0 if one else 2 for one in won]
    assert [path.name for path in folder.iterdir()] == ["b.txt"]


def test_processes_of_one_job_share_a_folder_each_with_its_own_part(tmp_path):
    folder, go = tmp_path / "folder", tmp_path / "go"
    given = {"after": str(go), "job": "one"}
    with contextlib.ExitStack() as stack:
        seats = ["0", "1", "2", "3", "3"]
        jobs = [
            stack.enter_context(job(folder, seats=[seat], **given)) for seat in seats
        ]
        won = together(jobs, go)
        with pytest.raises(UserError, match="in use by process"):
            ownership.own(folder, job="two", seats=["4"])
        ended = [end(one)[1] for one in jobs]

    assert won[:3] == [True] * 3 and sorted(won[3:]) == [False, True]
    assert ended == [0 if one else 2 for one in won]
    assert list(folder.iterdir()) == []


def test_who_is_patient_waits_for_the_owner(tmp_path):
    with owner(tmp_path) as first, job(tmp_path, patience=60) as second:
        end(first)
        assert second.stdout.readline().startswith("owns")
        assert end(second)[1] == 0


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"pid": -1, "where": 7}'])
def test_a_damaged_lease_is_waited_for_and_removed(tmp_path, monkeypatch, content):
    monkeypatch.setattr(ownership, "LEASE", 0.3)
    monkeypatch.setattr(ownership, "BEAT", 0.1)
    (tmp_path / ".owner").mkdir()
    (tmp_path / ".owner" / "a.json").write_bytes(content)

    with ownership.own(tmp_path):
        assert len(list((tmp_path / ".owner").iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_lease_says_is_shown_without_control_characters(tmp_path):
    with owner(tmp_path) as first:
        (file,) = (tmp_path / ".owner").iterdir()
        facts = json.loads(file.read_text())
        facts |= {"command": "\x1b[2J\n" * 5000}
        first.send_signal(signal.SIGSTOP)
        file.write_text(json.dumps(facts))
        with pytest.raises(UserError) as caught:
            ownership.own(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_a_lease_that_leads_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / ".owner").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=r"\.owner must be a folder"):
        ownership.own(tmp_path)


def test_a_folder_in_a_lease_is_named(tmp_path):
    (tmp_path / ".owner" / "a").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"\.owner/a must be a file, but is a folder; remove"
    ):
        ownership.own(tmp_path)


def test_a_target_is_owned_from_beside_it(tmp_path):
    target = tmp_path / "made"
    with ownership.own_target(target):
        assert [path.name for path in tmp_path.iterdir()] == [".made.owner"]
        with ownership.own_target(tmp_path / "other"):
            pass
        assert not target.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="part of the path is a file"):
        ownership.own(tmp_path / "file" / "inner")


def test_a_forked_child_owns_nothing(tmp_path):
    with ownership.own(tmp_path):
        child = os.fork()
        if child == 0:
            ownership.release_all()
            os._exit(0)
        os.waitpid(child, 0)
        assert hidden(tmp_path) == [".owner"]


def test_a_file_that_appeared_meanwhile_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"

    def fill():
        with io.replacing(path, keep_new=True) as part:
            part.write_text("mine")
            path.write_text("theirs")

    with pytest.raises(UserError, match="made by another program meanwhile"):
        fill()

    def no_links(*names):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    path.unlink()
    with pytest.raises(UserError, match="made by another program meanwhile"):
        fill()
    assert path.read_text() == "theirs"
    path.unlink()
    with io.replacing(path, keep_new=True) as part:
        part.write_text("mine")
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "mine"


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
    with pytest.raises(UserError, match="no room to write it"):
        ownership.own(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed_and_one_to_itself_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with ownership.own(tmp_path / "link"):
        assert hidden(tmp_path / "real") == [".owner"]
    for own in (ownership.own, ownership.own_target):
        with pytest.raises(UserError, match="loop cannot be resolved"):
            own(tmp_path / "loop")


def test_the_root_cannot_be_made():
    with pytest.raises(UserError, match="/ cannot be created"):
        ownership.own_target("/")
