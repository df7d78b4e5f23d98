import errno
import json
import os
import re
import signal
import weakref

import av
import pytest
from PIL import Image

from anchor_jax import media, ownership
from anchor_jax.cli import main
from anchor_jax.compile_cache import CACHE_VARIABLE
from anchor_jax.sampling import render
from anchor_jax.sampling.tasks import VideoTasks
from anchor_jax.streaming.session import Session

pytestmark = pytest.mark.usefixtures("optimized_compilation")

CLIP = "a red ring[3f] | a blue square[3f]"


@pytest.fixture
def sample(tmp_path, monkeypatch, capsys, weights):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, "off")

    def run(*argv, prompt=CLIP, out="out/test"):
        given = ["--config=tiny", f"--config.weights={weights}"]
        from_file = any("--config.prompt_file" in argument for argument in argv)
        given += [f"--config.prompt={prompt}"] if prompt and not from_file else []
        given += ["--config.sampler.steps=(1000, 500)"]
        given += [f"--out={out}"] if out else []
        status = main.main(["sample", *given, *map(str, argv)])
        printed, err = capsys.readouterr()
        return status, printed, err

    return run


def count_frames(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def files(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.slow
def test_a_sample_is_a_video_a_sheet_and_a_recipe(sample, tmp_path):
    status, printed, _ = sample()

    out = tmp_path / "out/test"
    assert status == 0
    assert "out/test/000.mp4" in printed
    assert files(out) == ["000.json", "000.mp4", "000.png"]
    assert count_frames(out / "000.mp4") == 21
    assert Image.open(out / "000.png").width == 8 * 96 + 7 * 2 + 12
    assert (out / "000.png").read_bytes().startswith(b"\x89PNG")
    recipe = json.loads((out / "000.json").read_text())
    assert [one["landed"] for one in recipe["prompts"]] == [0, 3]
    assert recipe["frames"] == 6
    assert recipe["config"]["policy"] == "anchor_forcing"
    assert {"jax", "jaxlib", "weights", "machine"} <= recipe["fingerprint"].keys()


def size_of(path):
    with av.open(str(path)) as container:
        return container.streams.video[0].width, container.streams.video[0].height


@pytest.mark.slow
def test_a_small_video_is_enlarged_and_its_digests_are_those_of_its_own_pixels(
    sample, tmp_path
):
    sample(out="chosen")
    sample("--config.enlarge=1", out="made")

    assert size_of(tmp_path / "chosen/000.mp4") == (128, 128)
    assert size_of(tmp_path / "made/000.mp4") == (32, 32)
    chosen, made = (
        json.loads((tmp_path / name / "000.json").read_text())
        for name in ("chosen", "made")
    )
    assert chosen["blocks"] == made["blocks"]
    assert chosen["request"] == made["request"]
    assert (chosen["config"]["enlarge"], made["config"]["enlarge"]) == (None, 1)


@pytest.mark.slow
def test_the_same_command_makes_the_same_bytes(sample, tmp_path):
    sample(out="a")
    sample(out="b")
    sample("--config.seed=1", out="c")

    a, b, c = ((tmp_path / name / "000.mp4").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_without_a_folder_a_new_one_is_made(sample, tmp_path):
    status, _, _ = sample(out=None)

    assert status == 0
    (made,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}", made.name)


def test_a_folder_that_another_job_owns_is_left_alone(sample, tmp_path):
    out = tmp_path / "out/test"
    with ownership.own(out, job="another"):
        status, _, err = sample("--overwrite")
        assert files(out) == [".owner"]

    assert status == 2
    (error,) = [line for line in err.splitlines() if line.startswith("error")]
    assert f"{out} is in use by process" in error and "another --out" in error
    assert sample()[0] == 0


def test_a_video_that_appeared_meanwhile_is_not_replaced(sample, tmp_path, monkeypatch):
    out, play = tmp_path / "out/test", Session.play

    def meanwhile(session, script):
        yield from play(session, script)
        (out / "000.mp4").write_text("theirs")

    monkeypatch.setattr(Session, "play", meanwhile)
    status, printed, err = sample()

    assert status == 2 and "made by another program meanwhile" in err
    assert "Wrote" not in printed
    assert (out / "000.mp4").read_text() == "theirs"
    assert files(out) == ["000.mp4", "000.part.mp4"]
    assert sample("--overwrite")[0] == 0
    assert files(out) == ["000.json", "000.mp4", "000.png"]
    assert count_frames(out / "000.mp4") == 21


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_a_damaged_recipe_is_named_and_stays(sample, tmp_path, content):
    path = tmp_path / "out/test/000.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)

    status, _, err = sample()

    assert status == 2 and "000.json" in err and "--overwrite" in err
    assert path.read_text() == content
    assert sample("--overwrite")[0] == 0
    assert json.loads(path.read_text())["request"]


def test_a_batch_resumes_and_other_recipes_are_safe(sample, tmp_path):
    (tmp_path / "p.txt").write_text("a red ring[3f]\na blue square[3f]\n")
    batch = "--config.prompt_file=p.txt"
    out = tmp_path / "out/test"
    sample(batch)
    first = (out / "000.mp4").stat().st_mtime_ns
    (out / "001.mp4").unlink()

    status, printed, _ = sample(batch)
    assert status == 0
    assert "Skipped 1 video that already exists." in printed
    assert "Wrote 1 video, contact sheet and recipe." in printed
    assert (out / "000.mp4").stat().st_mtime_ns == first
    assert (out / "001.mp4").exists()

    status, _, err = sample(batch, "--config.seed=1")
    assert status == 2
    assert "000.png was made by another recipe: seed: 0 -> 1 (and 1 other video)" in err
    assert "--overwrite" in err
    assert (out / "000.mp4").stat().st_mtime_ns == first

    status, _, err = sample(
        *(batch, "--config.seed=1", "--config.window=12"),
        *("--config.policy=longlive", "--config.sampler.steps=(1000, 300)"),
    )
    assert status == 2
    assert "seed: 0 -> 1, setup.policy." in err
    assert "kind: 'Relative' -> 'Absolute' and 2 more fields (and 1 other" in err

    status, _, _ = sample(batch, "--config.seed=1", "--overwrite")
    assert status == 0
    assert (out / "000.mp4").stat().st_mtime_ns != first


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.prompt_file=bad.txt"], "bad.txt, line 2"),
        (["--config.prompt_file=no.txt"], "no such file"),
        (["--config.policy=self_forcing", "--config.frames=24"], "limited to 21"),
        (["--config.policy=nothing"], "unknown policy"),
        (["--config.weights=nowhere"], "nowhere"),
        (["--config.sampler.steps=(1,2)"], "decreasing"),
        (["--config.seed=-1"], "from 0 to"),
        (["--config.seed=9223372036854775808"], "from 0 to"),
    ],
)
def test_a_mistake_leaves_nothing_written(sample, tmp_path, argv, message):
    (tmp_path / "bad.txt").write_text("a red ring[3f]\na blue[0s]\n")

    status, _, err = sample(*argv)

    assert status == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_refused(sample, tmp_path):
    (tmp_path / "taken").write_text("mine")

    status, _, err = sample(out="taken")

    assert status == 2
    assert "taken" in err
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("argv", [[], ["--overwrite"]])
def test_a_folder_in_place_of_a_video_is_refused(sample, tmp_path, argv):
    (tmp_path / "out/test/000.mp4").mkdir(parents=True)

    status, _, err = sample(*argv)

    assert status == 2
    assert "000.mp4 is a folder" in err and "another --out" in err
    assert files(tmp_path / "out/test") == ["000.mp4"]


def test_an_old_video_stays_until_the_new_one_is_whole(sample, tmp_path, monkeypatch):
    out = tmp_path / "out/test"
    sample()
    before = {name: (out / name).read_bytes() for name in files(out)}

    def full(*_, **__):
        assert (out / "000.mp4").read_bytes() == before["000.mp4"]
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(media.Image.Image, "save", full)
        status, _, err = sample("--config.seed=1", "--overwrite")

    assert status == 2 and "no room" in err
    kept = {name: (out / name).read_bytes() for name in before}
    assert kept == before
    assert sample("--config.seed=1", "--overwrite")[0] == 0
    assert (out / "000.mp4").read_bytes() != before["000.mp4"]


def test_every_script_is_checked_before_the_first_is_made(sample, tmp_path):
    (tmp_path / "p.txt").write_text("a red ring[3f]\na blue square[24f]\n")

    status, _, err = sample(
        "--config.prompt_file=p.txt", "--config.policy=self_forcing"
    )

    assert status == 2 and "limited to 21" in err
    assert not (tmp_path / "out").exists()


def test_one_stream_at_a_time_is_held(sample, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a red ring[3f]\na blue square[3f]\na ring[3f]\n")
    held, counts = weakref.WeakSet(), []

    def watched(session, script):
        held.add(session)
        counts.append(len(held))
        yield from play(session, script)

    play = Session.play
    monkeypatch.setattr(Session, "play", watched)

    assert sample("--config.prompt_file=p.txt")[0] == 0
    assert counts == [1, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"rulez": "paper"}', "did you mean 'rules'?"),
        ('{"window": "abc"}', "config.window: got 'abc'"),
        ('{"frames": 30.0}', "config.frames: got 30.0"),
    ],
)
def test_a_mistake_in_a_config_file_gives_no_traceback(tmp_path, capsys, text, message):
    (tmp_path / "mine.py").write_text(
        "from anchor_jax.config import load_config\n"
        "from ml_collections import ConfigDict\n\n\n"
        "def get_config():\n"
        "    shipped = load_config('tiny').to_dict()\n"
        f"    return ConfigDict(shipped | {text})\n"
    )
    for command in ("sample", "score"):
        assert main.main([command, f"--config={tmp_path / 'mine.py'}"]) == 2
        assert message in capsys.readouterr().err


def test_words_that_mean_nothing_here_are_named_once(sample):
    status, _, err = sample(prompt="a red elephant[3f] | a blue elephant sings[3f]")

    warnings = [line for line in err.splitlines() if line.startswith("warning")]
    assert status == 0
    assert len(warnings) == 1
    assert warnings[0].endswith("elephant, sings")


@pytest.mark.slow
def test_prompts_that_are_cut_are_reported_with_their_line(sample, tmp_path):
    long = "a red ring a blue square moves up"
    (tmp_path / "p.csv").write_text(f"id,prompt\n1,a red ring\n2,{long}\n")
    argv = ["--config.prompt_file=p.csv", "--config.frames=3"]
    argv += ["--config.sampler.guidance=2.0"]
    argv += [f"--config.sampler.negative_prompt={long} {long}"]

    status, _, err = sample(*argv)

    assert status == 0
    assert "note: p.csv: a table; read the column 'prompt'" in err
    assert "warning: 2 prompts are longer than the 6 tokens" in err
    assert f"p.csv, line 3: {long!r}: 6 of 9 tokens are read" in err
    assert "the negative prompt: " in err and "6 of 17 tokens" in err
    assert "cut after 'a red ring a blue'" in err


def test_prompts_beyond_those_looked_at_are_reported_with_their_video(
    sample, tmp_path, monkeypatch
):
    monkeypatch.setattr(VideoTasks, "prompts_checked", 1)
    long = "a red ring a blue square moves up"
    (tmp_path / "p.txt").write_text(f"a red ring[3f]\n{long}[3f]\n")

    status, _, err = sample("--config.prompt_file=p.txt")

    assert status == 0
    assert "only the prompts of the first 1 of 2 videos were checked" in err
    assert "p.txt, line 2: " in err


@pytest.mark.parametrize(
    "argv, part",
    [
        (["--config.prompt=caf\udce9"], "--config.prompt: byte 0xe9"),
        (["--config.prompt=a\0b"], "--config.prompt: U+0000"),
        (["--config.prompt", "a\x1bb"], "--config.prompt: U+001B"),
        (["--config.prompt_file=caf\udce9.txt"], "--config.prompt_file: byte 0xe9"),
        (["--out=a\0b"], "--out: U+0000"),
        (["--config.sampler.negative_prompt=\ud800"], "negative_prompt: U+D800"),
        (["--config.prompt=a[99999999999s]"], "at most 1000000"),
        ([f"--config.frames={'9' * 400}"], "config.frames: got"),
        ([f"--config.frames={10**8}"], "must be at most 10000000 latent frames"),
        (["--config.seed=-1"], "config.seed=-1"),
    ],
)
def test_an_invalid_text_or_number_is_refused_by_its_flag(sample, tmp_path, argv, part):
    status, _, err = sample(*argv, prompt=None)

    assert status == 2
    assert part in err
    assert not (tmp_path / "out").exists()


def test_many_prompts_are_described_one_at_a_time(sample, tmp_path, monkeypatch):
    """One of 2,000 videos is made; the others are only counted."""
    made = []
    monkeypatch.setattr(render, "run", lambda tasks, todo, *_: made.extend(todo))
    describe = VideoTasks.__getitem__
    described = []
    monkeypatch.setattr(
        VideoTasks,
        "__getitem__",
        lambda tasks, number: described.append(number) or describe(tasks, number),
    )
    (tmp_path / "p.txt").write_text("a red ring[3f]\n" * 2000)

    status, printed, _ = sample("--config.prompt_file=p.txt")

    assert status == 0 and made == list(range(2000))
    assert printed.count(".mp4\n") == 2000
    assert len(described) < 5


def test_what_has_no_effect_is_said(sample):
    prompt = "a red ring[3f] | a blue ring[3f#]"
    _, _, err = sample("--config.sampler.negative_prompt=a green ring", prompt=prompt)

    assert "no effect, because sampler.guidance is 1" in err
    assert "no scene cuts" in err


@pytest.mark.parametrize("where", ["append", "contact_sheet"])
def test_a_request_to_stop_leaves_no_file(sample, tmp_path, monkeypatch, where):
    owner = media if where == "contact_sheet" else media.VideoWriter
    real = getattr(owner, where)

    def ask(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(owner, where, ask)
    status, printed, err = sample()

    if where == "append":
        assert (status, printed) == (130, "") and err.endswith("interrupted\n")
        assert files(tmp_path / "out/test") == []
    else:  # What is nearly made is made.
        assert len(files(tmp_path / "out/test")) == 3


@pytest.mark.parametrize("where", ["append", "sheet"])
def test_a_full_disk_leaves_no_finished_file(sample, tmp_path, monkeypatch, where):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "append":
        monkeypatch.setattr(media, "_pad_to_even", full)
    else:
        monkeypatch.setattr(media.Image.Image, "save", full)

    status, _, err = sample()

    assert status == 2
    assert "no room" in err
    assert [file for file in files(tmp_path / "out/test") if ".part" not in file] == []


def test_the_largest_seed_makes_a_video(sample, tmp_path):
    assert sample("--config.seed=9223372036854775807")[0] == 0
    assert (tmp_path / "out/test/000.mp4").exists()
