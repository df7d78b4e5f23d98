"""A user's own videos as training data."""

import dataclasses
import json

import bundles
import numpy as np
import pytest
import shares

from anchor_jax import media
from anchor_jax.errors import UserError
from anchor_jax.training.data import sources, videos
from anchor_jax.training.data.kinds import DataConfig
from anchor_jax.training.stages import build
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.training.stages.regression import RegressionConfig

SIDE, FRAMES = 32, 5  # pixels; two latent frames


def write_video(path, frames=FRAMES, colors=(255, 0), fps=16, size=(SIDE, SIDE)):
    """A video whose first half has one gray, and whose second half another."""
    first, second = np.array(colors, np.uint8)
    pixels = np.full((frames, *size, 3), first, np.uint8)
    pixels[frames // 2 :] = second
    path.parent.mkdir(parents=True, exist_ok=True)
    with media.VideoWriter(path, fps) as writer:
        writer.append(pixels)


def write_list(folder, *lines):
    path = folder / "list.jsonl"
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def listed(tmp_path):
    write_video(tmp_path / "a.mp4")
    write_video(tmp_path / "below" / "b.mp4", colors=(0, 255))
    lines = (
        {"video": "a.mp4", "caption": "up"},
        {"video": "below/b.mp4", "caption": "b"},
    )
    return write_list(tmp_path, *lines)


def test_frames_are_taken_by_time_and_cut_around_the_middle(tmp_path):
    write_video(tmp_path / "a.mp4", frames=40, fps=32, size=(SIDE, 2 * SIDE))

    pixels = media.read_video(tmp_path / "a.mp4", 20, (16, 16))

    assert pixels.shape == (20, 16, 16, 3)
    assert (pixels[:10] > 250).all() and (pixels[10:] < 5).all()


def config(path, **changes):
    section = RegressionConfig(blocks=1, block=2)
    data = DataConfig("videos", str(path), dropout=0.0)
    made = TrainConfig(stage="regression", batch=2, regression=section, data=data)
    return dataclasses.replace(made, **changes)


def test_batches_hold_the_encoded_videos_with_their_captions(listed, tmp_path):
    bundle = bundles.load()
    draw = build.open_source(config(listed), bundle, tmp_path / "run")

    batch = draw(0)

    grid, channels = bundle.grid, bundle.model.latent_channels
    assert batch["latents"].shape == (2, 2, grid.height, grid.width, channels)
    texts = np.asarray(bundle.encode_prompts(["up", "b"]))
    size = grid.height * 8, grid.width * 8
    for name, text in zip(("a.mp4", "below/b.mp4"), texts, strict=True):
        pixels = media.read_video(tmp_path / name, FRAMES, size) / np.float32(127.5) - 1
        latents = bundle.codec.encode(bundle.codec_params, pixels[None])
        row = int(np.argmin([np.abs(latents[0] - x).max() for x in batch["latents"]]))
        np.testing.assert_allclose(batch["latents"][row], latents[0], atol=2e-2)
        np.testing.assert_allclose(batch["embedding"][row, 0], text, atol=1e-6)
    np.testing.assert_array_equal(draw(0)["latents"], batch["latents"])


def test_processes_share_a_batch(listed, tmp_path):
    wanted = config(listed, batch=4)

    shares.assert_shared(
        lambda share: build.open_source(wanted, bundles.load(), tmp_path, share)(4)
    )


def test_videos_are_encoded_once(listed, tmp_path, monkeypatch):
    bundle = bundles.load()
    build.open_source(config(listed), bundle, tmp_path / "run")
    monkeypatch.setattr(media, "read_video", None)

    again = build.open_source(config(listed), bundle, tmp_path / "run")

    assert again(3)["latents"].shape[0] == 2


def test_a_run_knows_its_videos_by_what_they_hold(listed, tmp_path):
    first = sources.identity(config(listed).data)
    (tmp_path / "a.mp4").rename(tmp_path / "c.mp4")
    listed.write_text(listed.read_text().replace("a.mp4", "c.mp4"))
    assert sources.identity(config(listed).data) == first

    write_video(tmp_path / "c.mp4", colors=(255, 100))

    assert sources.identity(config(listed).data) != first


def test_some_captions_are_left_out_for_guidance(listed, tmp_path):
    bundle = bundles.load()
    data = DataConfig("videos", str(listed), dropout=0.5)
    draw = build.open_source(config(listed, data=data), bundle, tmp_path)
    empty = np.asarray(bundle.encode_prompts([""]))[0]

    rows = np.concatenate([draw(n)["embedding"][:, 0] for n in range(20)])
    left_out = [np.allclose(row, empty) for row in rows]

    assert 10 <= sum(left_out) <= 30


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1: got {, expected"),
        ({"video": "a.mp4"}, "line 1: got"),
        ({"video": "a.mp4", "caption": ""}, "line 1: empty"),
        (
            {"video": "../a.mp4", "caption": "x"},
            "'../a.mp4' leads to .*outside",
        ),
        ({"video": "/etc/hostname", "caption": "x"}, "leads to /etc/hostname, outside"),
        ({"video": "none.mp4", "caption": "x"}, "'none.mp4' is not a file in"),
        ({"video": "a\0.mp4", "caption": "x"}, r"line 1: U\+0000"),
        ({"video": "a\ud800.mp4", "caption": "x"}, r"line 1: U\+D800"),
        ({"video": "a.mp4", "caption": "\udcff"}, "line 1: byte 0xff"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path, line, message):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(tmp_path / "a.mp4")

    with pytest.raises(UserError, match=message):
        videos.read_list(str(write_list(folder, line)))


def test_a_list_may_be_a_table_or_one_document(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"")
    table = 'video,id,caption\na.mp4,1,"a ring, red"\nb.mp4,2,b\n'
    entries = [{"video": "a.mp4", "caption": "a ring, red"}]
    entries += [{"video": "b.mp4", "caption": "b"}]
    (tmp_path / "list.csv").write_text(table)
    (tmp_path / "list.json").write_text(json.dumps(entries, indent=1))

    read = [videos.read_list(str(tmp_path / f"list.{end}")) for end in ("csv", "json")]

    assert read[0] == read[1]
    assert [(path.name, text) for path, text in read[0]] == [
        ("a.mp4", "a ring, red"),
        ("b.mp4", "b"),
    ]
    (tmp_path / "list.csv").write_text("file,caption\na.mp4,b\n")
    with pytest.raises(UserError, match="expected one named 'video'"):
        videos.read_list(str(tmp_path / "list.csv"))


def test_a_short_or_broken_video_is_named(tmp_path):
    write_video(tmp_path / "a.mp4", frames=3)
    (tmp_path / "b.mp4").write_bytes(b"no video")

    with pytest.raises(UserError, match=r"a.mp4: 3 frames .*expected 5; choose"):
        media.read_video(tmp_path / "a.mp4", FRAMES, (8, 8))
    with pytest.raises(UserError, match="b.mp4: it is a text file"):
        media.read_video(tmp_path / "b.mp4", FRAMES, (8, 8))


def test_all_videos_that_are_wrong_are_named_before_any_is_encoded(tmp_path):
    for name, frames in (("a.mp4", FRAMES), ("b.mp4", 2), ("c.mp4", 1)):
        write_video(tmp_path / name, frames=frames)
    rows = [{"video": f"{name}.mp4", "caption": name} for name in "abc"]
    bundle = dataclasses.replace(bundles.load(), codec=None)

    with pytest.raises(UserError, match="2 videos .*b.mp4: 2 frames.*c.mp4: 1 frames"):
        build.open_source(config(write_list(tmp_path, *rows)), bundle, tmp_path)


def test_pictures_that_are_used_more_than_once_are_reported(tmp_path, capfd):
    for name, fps in (("a.mp4", 16), ("b.mp4", 8), ("c.mp4", 4)):
        write_video(tmp_path / name, fps=fps)
    rows = [{"video": f"{name}.mp4", "caption": name} for name in "abc"]

    build.open_source(config(write_list(tmp_path, *rows)), bundles.load(), tmp_path)

    lines = [line for line in capfd.readouterr().err.splitlines() if "warn" in line]
    (line,) = lines
    assert "2 videos have fewer than 16 frames per second" in line
    assert f"{tmp_path / 'b.mp4'}, 2 of 5 frames are repeats" in line


def test_links_of_a_hubs_download_are_followed_and_no_others(tmp_path):
    hub, videos_of = tmp_path / "datasets--a--b", "snapshots/0123/videos"
    write_video(tmp_path / "other.mp4")
    write_video(hub / "blobs" / "beef.mp4")
    (hub / videos_of).mkdir(parents=True)
    (hub / videos_of / "a.mp4").symlink_to("../../../blobs/beef.mp4")
    (hub / videos_of / "b.mp4").symlink_to(tmp_path / "other.mp4")

    def read(name):
        line = {"video": name, "caption": "x"}
        return videos.read_list(str(write_list(hub / "snapshots" / "0123", line)))

    ((found, _),) = read("videos/a.mp4")
    assert found.name == "a.mp4" and media.read_video(found, FRAMES, (8, 8)).any()
    wrong = f"line 1: 'videos/b.mp4' is a link to {tmp_path / 'other.mp4'}, outside"
    with pytest.raises(UserError, match=wrong):
        read("videos/b.mp4")
    with pytest.raises(UserError, match="leads to .*beef.mp4, outside"):
        read("../../blobs/beef.mp4")


def test_videos_need_a_list(tmp_path):
    wanted = config("x", data=DataConfig("videos"))

    with pytest.raises(UserError, match="config.data.path is missing"):
        build.open_source(wanted, bundles.load(), tmp_path)
    with pytest.raises(UserError, match="none.jsonl: no such file"):
        videos.read_list(str(tmp_path / "none.jsonl"))
