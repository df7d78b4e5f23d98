"""Manifests, and the videos of a job of several processes, without making them."""

import contextlib
import dataclasses
import json
import threading

import bundles
import pytest

from anchor_jax import ownership, processes, shares
from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.sampling import batch, overwriting, render, resolve
from anchor_jax.sampling.config import read_config
from anchor_jax.sampling.manifest import NAME, Manifest
from anchor_jax.sampling.tasks import VideoTasks, choose


@pytest.fixture
def tasks(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": f"a red ring {number}", "seed": number, "durations": [1]}
        for number in range(5)
    ]
    file.write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    bundle = bundles.load()
    given = load_config("tiny", [f"--config.prompt_file={file}"])
    config = resolve.resolve(read_config(given), bundle.metadata)
    scripts = resolve.read_scripts(config, bundle.model.family)
    folder = tmp_path / "out"
    folder.mkdir()
    return VideoTasks(folder, scripts, config, bundle, "")


@pytest.fixture
def as_process(monkeypatch):
    def become(index, count):
        monkeypatch.setattr(processes, "is_joined", lambda: count > 1)
        monkeypatch.setattr(processes, "is_printing", lambda: index == 0)
        monkeypatch.setattr(processes, "is_first", lambda: index == 0)
        monkeypatch.setattr(processes, "index", lambda: index)
        monkeypatch.setattr(processes, "count", lambda: count)
        monkeypatch.setattr(processes, "hosts", lambda: ["alpha", "beta", "gamma"])
        monkeypatch.setattr(processes, "key", lambda: "key")
        monkeypatch.setattr(processes, "part", lambda seconds: None)
        monkeypatch.setattr(shares, "check_shared", lambda *given: None)
        monkeypatch.setattr(shares, "_POLL", 0.01)

    return become


def make(tasks, number):
    """Writes small files in place of a video's."""
    task = tasks[number]
    recipe = {"request": task.request, "blocks": [f"{number}a", f"{number}b"]}
    task.file(".mp4").write_text("video")
    task.file(".json").write_text(json.dumps(recipe | batch.made_by()))
    task.file(".png").write_text("sheet")


def making(tasks):
    def work(numbers, after):
        for number in numbers:
            make(tasks, number)
            after()

    return work


def lines(tasks):
    text = (tasks.folder / NAME).read_text()
    return [json.loads(line) for line in text.splitlines()]


def start(tasks, index, count, todo, work=None):
    """Does what a process of a job does."""
    own = (str(index),) if count > 1 else ("",)
    with ownership.own(tasks.folder, "job", own) as lease:
        work = work or making(tasks)
        batch.work_on(tasks, todo, lease, work, lambda line: None)


def test_processes_agree_on_prompts_seeds_and_weights(tasks, monkeypatch):
    facts = []
    monkeypatch.setattr(shares, "agree", facts.append)
    batch.agree(tasks)
    assert not facts  # one process reads no million prompts twice
    monkeypatch.setattr(processes, "is_joined", lambda: True)

    batch.agree(tasks)
    for changed in (("negative", "ugly"), ("scripts", shortened(tasks.scripts))):
        with monkeypatch.context() as change:
            change.setattr(tasks, *changed)
            batch.agree(tasks)

    assert facts[0]["hash of the weights"] == tasks.bundle.digest
    assert len({one["hash of the prompts"] for one in facts}) == 3


def shortened(scripts):
    return dataclasses.replace(scripts, all=scripts.all[:-1])


def test_one_process_lists_every_video(tasks):
    make(tasks, 3)
    start(tasks, 0, 1, [0, 1, 2, 4])

    found = lines(tasks)
    assert [one["number"] for one in found] == list(range(5))
    assert {one["state"] for one in found} == {"finished"}
    digest = found[3].pop("digest")
    assert found[3] == {
        "number": 3,
        "state": "finished",
        "source": f"{tasks.scripts.place(3)}",
        "prompts": ["a red ring 3"],
        "starts": [0],
        "frames": tasks.scripts.all[3].frames,
        "seed": 3,
        "files": {"video": "003.mp4", "sheet": "003.png", "recipe": "003.json"},
        "made_by": {"process": 0, "processes": 1},
    }
    assert len(digest) == 64 and len({one.get("digest") for one in found}) == 5


def test_a_job_that_another_number_of_processes_resumes(tasks, as_process):
    as_process(1, 3)
    with pytest.raises(shares.Unfinished, match="3 of 5 videos are missing"):
        start(tasks, 1, 3, range(5))
    # Process 0 has not done its share, so another one has written the manifest.
    assert [one["state"] for one in lines(tasks)] == [
        "missing", "finished", "missing", "missing", "finished"
    ]  # fmt: skip
    before = tasks[4].file(".mp4").stat().st_mtime_ns

    as_process(1, 2)
    with pytest.raises(shares.Unfinished, match="because of process 0"):
        start(tasks, 1, 2, [0, 2, 3])
    as_process(0, 2)
    start(tasks, 0, 2, [0, 2])

    assert [one["made_by"] for one in lines(tasks)] == [
        {"process": 0, "processes": 2, "host": "alpha"},
        {"process": 1, "processes": 3, "host": "beta"},
        {"process": 0, "processes": 2, "host": "alpha"},
        {"process": 1, "processes": 2, "host": "beta"},
        {"process": 1, "processes": 3, "host": "beta"},
    ]
    assert tasks[4].file(".mp4").stat().st_mtime_ns == before


def test_old_videos_do_not_count_in_a_job_that_replaces_them(tasks, as_process):
    for number in range(5):
        make(tasks, number)
    as_process(0, 2)
    told = []

    # Process 1 is lost before it has made one.
    todo, done = choose(tasks, True)
    assert (todo, done) == ([0, 1, 2, 3, 4], [])
    with ownership.own(tasks.folder, "job", ("0",)) as lease:
        overwriting.begin(tasks.folder)
        with pytest.raises(shares.Unfinished, match="2 of 5 .* because of process 1"):
            batch.work_on(tasks, todo, lease, making(tasks), told.append)

    assert told == ["1 of 5 videos are finished"]
    # The next start resumes; one that replaces nothing has nothing to do.
    assert choose(tasks, True) == ([1, 3], [0, 2, 4])
    assert choose(tasks, False) == ([], [0, 1, 2, 3, 4])
    as_process(1, 2)
    assert choose(tasks, True) == ([1, 3], [0, 2, 4])
    start(tasks, 1, 2, [1, 3])

    assert choose(tasks, True) == ([], [0, 1, 2, 3, 4])
    overwriting.finish(tasks.folder)
    assert [*tasks.folder.glob(".over*")], "process 0 ends the job"
    as_process(0, 2)
    overwriting.finish(tasks.folder)
    assert choose(tasks, True)[1] == []  # the whole job is finished
    assert {one["state"] for one in lines(tasks)} == {"finished"}


def test_a_job_that_was_stopped_after_its_last_video_ends_at_the_next_start(
    tasks, as_process, tmp_path, monkeypatch
):
    as_process(0, 2)
    monkeypatch.setattr(processes, "gather", lambda value, *more: [value, value])
    monkeypatch.setattr(render.resolve, "load_weights", lambda given: tasks.bundle)
    overwriting.begin(tasks.folder)
    for number in range(5):
        make(tasks, number)
    given = load_config("tiny", [f"--config.prompt_file={tmp_path / 'prompts.jsonl'}"])

    render.sample(given, str(tasks.folder), True, None, lambda line: None)

    assert not [*tasks.folder.glob(".over*")]


def test_a_video_that_appears_late_on_a_network_disk_is_waited_for(
    as_process, monkeypatch
):
    def gather(value, *more):
        if isinstance(value, dict):
            return [value, dict.fromkeys(value, 1)]
        return [value, 1 if isinstance(value, int) else "another hash"]

    as_process(0, 2)
    monkeypatch.setattr(processes, "gather", gather)
    monkeypatch.setattr(processes, "share", lambda value, *more: value)
    monkeypatch.setattr(batch.time, "sleep", lambda seconds: None)
    found = iter([([3, 4], [0]), ([4], [0, 3])])

    assert batch.agree_on_missing(lambda: next(found)) == ([4], [0, 3])

    monkeypatch.setattr(shares, "SEEN_BY", -1.0)
    with pytest.raises(UserError, match="videos that --out"):
        batch.agree_on_missing(lambda: ([3, 4], [0]))


def test_one_process_replaces_every_video(tasks, as_process):
    as_process(0, 2)
    make(tasks, 0)
    overwriting.begin(tasks.folder)
    assert choose(tasks, True)[1] == [0]

    as_process(0, 1)
    assert choose(tasks, True)[1] == []


@pytest.mark.parametrize("content", ["", "{}", "[1]", '["other"]'])
def test_a_damaged_list_of_starts_replaces_every_video(tasks, as_process, content):
    as_process(0, 2)
    make(tasks, 0)
    (tasks.folder / ".overwriting").write_text(content)

    assert choose(tasks, True)[1] == []


def test_the_first_process_waits_for_the_others_and_lists_theirs(tasks, as_process):
    as_process(0, 2)
    other = ownership.own(tasks.folder, "job", ("1",))
    told = []

    def theirs():
        for number in (1, 3):
            make(tasks, number)
        other.release()

    with ownership.own(tasks.folder, "job", ("0",)) as lease:
        timer = threading.Timer(0.3, theirs)
        timer.start()
        batch.work_on(tasks, range(5), lease, making(tasks), told.append)

    assert {one["state"] for one in lines(tasks)} == {"finished"}
    assert told[0] == "1 of 5 videos are finished"


def test_a_failure_leaves_a_list_of_what_exists(tasks):
    def fail(numbers, after):
        make(tasks, numbers[0])
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no device"):
        start(tasks, 0, 1, range(5), fail)

    assert [one["state"] for one in lines(tasks)] == ["finished"] + ["missing"] * 4


@pytest.mark.parametrize("content", ["", "{", '{"request": {}}', "[1]"])
def test_a_video_with_a_torn_or_foreign_recipe_is_missing(tasks, content):
    make(tasks, 2)
    tasks[2].file(".json").write_text(content)

    assert Manifest(tasks)._entry(2)["state"] == "missing"


def test_a_video_without_its_sheet_is_missing(tasks):
    make(tasks, 2)
    tasks[2].file(".png").unlink()

    assert Manifest(tasks)._entry(2)["state"] == "missing"


def test_a_reader_sees_whole_manifests_of_concurrent_writers(tasks):
    for number in range(5):
        make(tasks, number)
    Manifest(tasks).write()
    has_ended = threading.Event()

    def write():
        with contextlib.suppress(StopIteration):
            while not has_ended.is_set():
                Manifest(tasks).write()

    writers = [threading.Thread(target=write) for _ in range(3)]
    for one in writers:
        one.start()
    try:
        for _ in range(200):
            assert [one["number"] for one in lines(tasks)] == list(range(5))
    finally:
        has_ended.set()
        for one in writers:
            one.join()
    assert sorted(one.name for one in tasks.folder.glob("[.m]*")) == [NAME]


def test_the_next_start_repairs_a_manifest(tasks):
    for number in range(5):
        make(tasks, number)
    (tasks.folder / NAME).write_text('{"number": 0, "sta')

    batch.keep_manifest(tasks, pytest.fail)
    assert {one["state"] for one in lines(tasks)} == {"finished"}

    before = (tasks.folder / NAME).stat().st_ino
    batch.keep_manifest(tasks, pytest.fail)
    assert (tasks.folder / NAME).stat().st_ino == before


def test_a_folder_in_use_keeps_its_manifest(tasks):
    told = []
    with ownership.own(tasks.folder, "another"):
        batch.keep_manifest(tasks, told.append)

    assert "in use by" in told[0]
    assert not (tasks.folder / NAME).exists()
