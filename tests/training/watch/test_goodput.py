"""The wall time of a run by cause, over starts and kills."""

import json

import pytest

from anchor_jax.errors import UserError
from anchor_jax.training import files
from anchor_jax.training.watch.goodput import EVERY, Goodput
from anchor_jax.training.watch.times import DEVICE, HOST, SAVING, Times


class Run:
    """A start of a run in a folder, with one clock for everything."""

    now = 1000.0

    def __init__(self, folder, first):
        self.times = Times(lambda: Run.now)
        Run.now += 10  # until the first step
        self.goodput = Goodput(folder, self.times, first, lambda: Run.now)
        self.done = first

    def steps(self, count, seconds=1.0):
        for _ in range(count):
            with self.times.of(HOST):
                Run.now += seconds / 4
            with self.times.of(DEVICE):
                Run.now += 3 * seconds / 4
            self.done += 1
            self.goodput.note(self.done)

    def save(self, seconds=5.0):
        with self.times.of(SAVING):
            Run.now += seconds
        self.goodput.note(self.done, is_saved=True)


def close(found, **expected):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_one_start_has_the_share_of_its_steps(tmp_path):
    run = Run(tmp_path, 0)
    run.steps(25)
    run.save()

    close(run.goodput.totals(), steps=25, starting=10, saving=5, lost=0, stopped=0)
    numbers = run.goodput.numbers()
    close(numbers, goodput=25 / 40, share_starting=0.25, share_saving=0.125)
    assert sum(numbers.values()) == pytest.approx(1)


def test_steps_after_the_checkpoint_are_lost_at_a_kill(tmp_path):
    run = Run(tmp_path, 0)
    run.steps(40)
    run.save()
    run.steps(31)  # The record is written at the 15th and the 30th.
    Run.now += 100

    again = Run(tmp_path, 40)
    close(again.goodput.totals(), steps=40, lost=30, saving=5, starting=20, stopped=101)
    again.steps(40)
    again.save()

    close(again.goodput.totals(), steps=80, lost=30, saving=10, starting=20)
    wall = 80 + 30 + 10 + 20 + 101
    close(again.goodput.numbers(), goodput=80 / wall, share_lost=30 / wall)


def test_a_kill_before_the_first_checkpoint_loses_all(tmp_path):
    Run(tmp_path, 0).steps(int(EVERY) + 1)

    again = Run(tmp_path, 0)

    close(again.goodput.totals(), steps=0, lost=EVERY + 1, starting=20)


def test_an_older_checkpoint_loses_its_part_of_the_time(tmp_path):
    run = Run(tmp_path, 0)
    run.steps(10, seconds=1.0)
    run.save()
    run.steps(10, seconds=3.0)
    run.save()

    again = Run(tmp_path, 15)

    close(again.goodput.totals(), steps=10 + 15, lost=15, stopped=0)


def test_a_run_that_is_older_than_the_record_counts_from_now(tmp_path):
    run = Run(tmp_path, 1000)
    run.steps(10)
    run.save()
    run.steps(20)

    close(Run(tmp_path, 1010).goodput.totals(), steps=10, lost=15)
    close(Run(tmp_path, 1005).goodput.totals(), steps=5, lost=20)


def test_an_orderly_stop_loses_nothing(tmp_path):
    run = Run(tmp_path, 0)
    run.steps(7)
    run.save()
    Run.now += 1000

    close(Run(tmp_path, 7).goodput.totals(), steps=7, lost=0, stopped=1000)


def test_a_clock_that_was_set_back_gives_no_negative_time(tmp_path):
    run = Run(tmp_path, 0)
    run.steps(7)
    run.save()
    Run.now -= 500

    close(Run(tmp_path, 7).goodput.totals(), steps=7, stopped=0)


def test_a_long_run_keeps_few_points(tmp_path):
    run = Run(tmp_path, 0)
    run.steps(3000)
    run.save()

    assert len(files.read_goodput(tmp_path)["points"]) <= 200
    close(Run(tmp_path, 2000).goodput.totals(), steps=2000, lost=1000)


def test_the_record_is_not_written_at_every_line(tmp_path, monkeypatch):
    written = []
    run = Run(tmp_path, 0)
    monkeypatch.setattr(
        "anchor_jax.training.watch.goodput.write_json", lambda *a: written.append(a)
    )
    run.steps(100, seconds=0.3)

    assert len(written) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": [1]},
        {"seconds": {"steps": "1"}},
        {"points": []},
        {"points": [[3, 1.0], [2, 0.5]]},
        {"points": [[1, 2, 3]]},
        {"at": None},
    ],
)
def test_a_damaged_record_is_named_with_its_remedy(tmp_path, change):
    run = Run(tmp_path, 0)
    run.save()
    path = tmp_path / files.GOODPUT
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(UserError, match=r"goodput\.json holds .*remove it"):
        files.check(tmp_path)
