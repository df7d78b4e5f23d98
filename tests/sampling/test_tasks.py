import datetime
import types

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
