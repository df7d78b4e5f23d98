import datetime
import types

import pytest

from anchor_jax import processes
from anchor_jax.errors import UserError
from anchor_jax.sampling import tasks


def test_two_jobs_in_one_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moment = datetime.datetime(2030, 1, 2, 3, 4, 5)
    now = types.SimpleNamespace(now=lambda: moment)
    monkeypatch.setattr(tasks.datetime, "datetime", now)

    with tasks.open_folder(None) as one, tasks.open_folder(None) as other:
        (other / "000.mp4").touch()

    assert (one.name, other.name) == ("2030-01-02-030405", "2030-01-02-030405-2")
    assert [one.name for one in (tmp_path / "out").iterdir()] == [other.name]


def as_process(monkeypatch, index, count=2):
    monkeypatch.setattr(processes, "count", lambda: count)
    monkeypatch.setattr(processes, "index", lambda: index)


def test_each_video_belongs_to_one_process(monkeypatch):
    todo = [0, 1, 4, 5, 6, 9]
    shares = []
    for index in range(3):
        as_process(monkeypatch, index, 3)
        shares.append(tasks.own_share(todo))

    assert shares == [[0, 6, 9], [1, 4], [5]]


def test_the_processes_of_a_job_share_a_folder_and_others_do_not(tmp_path, monkeypatch):
    told = []
    as_process(monkeypatch, 0)
    with tasks.own_folder(tmp_path, told.append):
        as_process(monkeypatch, 1)
        with tasks.own_folder(tmp_path, told.append):
            pass
        as_process(monkeypatch, 0, count=1)
        with pytest.raises(UserError, match="in use by"):
            tasks.own_folder(tmp_path, told.append)
