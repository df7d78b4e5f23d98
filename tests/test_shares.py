"""Shares of a large job; real processes are in tests/cli/test_shared_jobs.py."""

import signal
import time

import pytest

from anchor_jax import interrupts, io, ownership, processes, shares
from anchor_jax.errors import UserError

JOB = "job"


def working(lease):
    return shares.working(lease, "--out")


@pytest.fixture
def as_process(monkeypatch):
    """Makes this process one of several in a job, which has already met."""

    def become(index, count):
        monkeypatch.setattr(processes, "is_joined", lambda: True)
        monkeypatch.setattr(processes, "index", lambda: index)
        monkeypatch.setattr(processes, "count", lambda: count)
        monkeypatch.setattr(processes, "key", lambda: "key")
        monkeypatch.setattr(processes, "part", lambda seconds: None)
        monkeypatch.setattr(processes, "share", lambda value, seconds: value)
        monkeypatch.setattr(shares, "_POLL", 0.01)

    return become


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_item_belongs_to_one_process(as_process, tmp_path, count):
    numbers, found = [0, 1, 4, 5, 6, 9], []
    for index in range(count):
        as_process(index, count)
        lease = ownership.own(tmp_path, JOB, (str(index),))
        mine = shares.Share(lease).of(numbers)
        lease.release()
        assert {one % count for one in mine} <= {index}
        found += mine

    assert sorted(found) == numbers


def test_one_process_waits_for_nothing(tmp_path):
    with ownership.own(tmp_path) as lease, working(lease) as share:
        assert share.of(range(3)) == [0, 1, 2]
        share.await_others(lambda others: pytest.fail("waits"))
        assert (tmp_path / ".owner").exists()


def test_a_process_waits_until_the_others_have_left(as_process, tmp_path):
    as_process(0, 3)
    others = [ownership.own(tmp_path, JOB, (str(one),)) for one in (1, 2)]
    seen = []

    def tick(left):
        seen.append(left)
        if len(seen) % 3 == 0:
            others.pop().release()

    with (
        ownership.own(tmp_path, JOB, ("0",)) as lease,
        working(lease) as share,
    ):
        share.await_others(tick)

    assert seen == [2, 2, 2, 1, 1, 1]
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_taken_until_what_is_written_at_the_end(as_process, tmp_path):
    as_process(0, 2)
    other = ownership.own(tmp_path, JOB, ("1",))
    waits = other.with_seats("waits-1")
    other.release()

    with (
        ownership.own(tmp_path, JOB, ("0",)) as lease,
        working(lease) as share,
    ):
        share.await_others(lambda others: pytest.fail("awaits one that waits"))
        waits.release()
        with pytest.raises(UserError, match="in use by"):
            ownership.own(tmp_path, "another")
        io.write_text(tmp_path / "manifest", "")

    ownership.own(tmp_path, "another").release()
    assert [one.name for one in tmp_path.iterdir()] == ["manifest"]


def test_a_process_without_a_heartbeat_is_not_awaited(
    as_process, tmp_path, monkeypatch
):
    as_process(0, 2)
    monkeypatch.setattr(ownership, "LEASE", 0.3)
    monkeypatch.setattr(ownership._Hold, "beat", lambda hold: None)
    hung = ownership.own(tmp_path, JOB, ("1",))
    began, seen = time.monotonic(), []
    with (
        ownership.own(tmp_path, JOB, ("0",)) as lease,
        working(lease) as share,
    ):
        share.await_others(seen.append)

    assert set(seen) == {1} and 0.2 < time.monotonic() - began < 20
    hung.release()


def test_another_job_is_refused_and_not_awaited(as_process, tmp_path):
    as_process(0, 2)
    with ownership.own(tmp_path, JOB, ("0",)) as lease:
        with pytest.raises(UserError, match="in use by"):
            ownership.own(tmp_path, "another", ("1",))
        others = lease.others
    with ownership.own(tmp_path, "another", ("1",)):
        assert others.living() == []


def test_a_request_reaches_the_other_processes(as_process, tmp_path):
    as_process(0, 2)
    file = tmp_path / ".stop-key"
    with (
        interrupts.listening(),
        ownership.own(tmp_path, JOB, ("1",)),
        ownership.own(tmp_path, JOB, ("0",)) as lease,
        working(lease),
    ):
        assert not file.exists()
        for call in interrupts.on_request:
            call(signal.SIGTERM)
        assert file.read_text() == "15"
        deadline = time.monotonic() + 20
        while not interrupts.stop_requested() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert interrupts.stop_requested()


def test_a_request_of_an_earlier_start_is_forgotten(as_process, tmp_path):
    as_process(0, 2)
    (tmp_path / ".stop-old").write_text("15")
    (tmp_path / ".stop-key").write_text("15")
    with ownership.own(tmp_path, JOB, ("0",)) as lease, working(lease):
        time.sleep(0.1)
        assert not interrupts.stop_requested()
        assert [one.name for one in tmp_path.iterdir()] == [".owner"]


def test_missing_items_name_the_processes_to_blame(as_process, monkeypatch):
    as_process(0, 3)
    monkeypatch.setattr(processes, "name", "process {} (alpha)".format)

    error = shares.unfinished([2, 5, 7], 9, "videos")

    assert str(error).startswith(
        "3 of 9 videos are missing, because of process 1 (alpha), process 2 (alpha);"
        " start all processes again"
    )
