import fractions
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from anchor_jax import io, media
from anchor_jax.errors import Stopped, UserError

ROOT = str(pathlib.Path(media.__file__).parents[1])


def shades(count, height=32, width=48):
    levels = (np.arange(count) * 5 % 256).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def decode(path):
    with av.open(str(path)) as container:
        frames = [
            frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)
        ]
        stream = container.streams.video[0]
        return np.stack(frames), float(stream.average_rate), stream.codec_context.name


def test_a_video_decodes_to_the_frames_that_were_written(tmp_path):
    path = tmp_path / "new" / "video.mp4"
    frames = shades(40)

    with media.VideoWriter(path) as video:
        for start in range(0, 40, 10):
            video.append(frames[start : start + 10])

    decoded, rate, codec = decode(path)
    assert (decoded.shape, rate, codec) == (frames.shape, 16.0, "h264")
    assert np.abs(decoded.astype(int) - frames).max() <= 4
    assert [file.name for file in path.parent.iterdir()] == ["video.mp4"]


def test_colours_survive(tmp_path):
    colours = np.array([[255, 0, 0], [0, 160, 40], [30, 60, 220]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (3, 32, 32, 3))
    with media.VideoWriter(tmp_path / "a.mp4") as video:
        video.append(frames)
    decoded = decode(tmp_path / "a.mp4")[0]
    assert np.abs(decoded.astype(int) - frames).max() <= 8
    with av.open(str(tmp_path / "a.mp4")) as container:
        matrix = container.streams.video[0].codec_context.colorspace
    assert matrix == 6, "players would guess the matrix"


def test_odd_sizes_are_padded_to_even_ones(tmp_path):
    with media.VideoWriter(tmp_path / "odd.mp4") as video:
        video.append(shades(3, 31, 47))
    decoded = decode(tmp_path / "odd.mp4")[0]
    assert decoded.shape == (3, 32, 48, 3)
    assert np.abs(decoded[:, -1].astype(int) - decoded[:, -2]).max() <= 2


def test_enlarged_pixels_become_squares(tmp_path):
    corner = np.zeros((2, 16, 24, 3), np.uint8)
    corner[:, :8, :8] = 255
    sizes = {}
    for enlarge in (1, 3, None):
        path = tmp_path / f"{enlarge}.mp4"
        with media.VideoWriter(path, enlarge=enlarge) as video:
            video.append(corner)
        sizes[enlarge] = decode(path)[0]

    assert sizes[1].shape == (2, 16, 24, 3)
    assert sizes[3].shape == (2, 48, 72, 3)
    assert sizes[None].shape == (2, 64, 96, 3)
    expected = corner.repeat(4, axis=1).repeat(4, axis=2)
    assert np.abs(sizes[None].astype(int) - expected).max() <= 24


def test_frames_that_players_show_well_are_written_as_made(tmp_path):
    assert media.enlargement((64, 128)) == 1
    assert media.enlargement((120, 127)) == 4


def test_frames_are_not_enlarged_without_limit(tmp_path):
    with (
        pytest.raises(UserError, match="sides must be at most 8192"),
        media.VideoWriter(tmp_path / "a.mp4", enlarge=16) as video,
    ):
        video.append(shades(1, 16, 1024))


def test_a_killed_process_leaves_a_part_that_plays(tmp_path):
    code = (
        "import os, signal, sys; import numpy as np; from anchor_jax import media\n"
        "with media.VideoWriter(sys.argv[1]) as video:\n"
        "    video.append(np.full((40, 32, 32, 3), 90, np.uint8))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "a.mp4"
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False)

    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    (part,) = tmp_path.glob(".a.*.part.mp4")
    assert len(decode(part)[0]) >= 32


def test_an_exception_keeps_the_part_and_the_old_video(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    with pytest.raises(RuntimeError), media.VideoWriter(path) as video:
        video.append(shades(20))
        raise RuntimeError

    assert path.read_bytes() == b"old"
    assert len(decode(tmp_path / "a.part.mp4")[0]) == 20
    with media.VideoWriter(path) as video:
        video.append(shades(20))
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_two_writers_of_one_video_do_not_share_a_file(tmp_path):
    path = tmp_path / "a.mp4"
    one, other = media.VideoWriter(path, keep_new=True), media.VideoWriter(path)
    with pytest.raises(UserError, match="made by another program meanwhile"), one:
        one.append(shades(10))
        with other:
            other.append(shades(20))
    assert len(decode(path)[0]) == 20
    assert len(decode(tmp_path / "a.part.mp4")[0]) == 10


def test_a_request_to_stop_leaves_no_part(tmp_path):
    with pytest.raises(Stopped), media.VideoWriter(tmp_path / "a.mp4") as video:
        video.append(shades(20))
        raise Stopped

    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_ended_leaves_no_part(tmp_path):
    with media.VideoWriter(tmp_path / "a.mp4") as video:
        video.append(shades(20))
        io.remove_unfinished()
        assert list(tmp_path.iterdir()) == []
        video.part.touch()  # for the end of the test


def test_an_exception_before_any_frame_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), media.VideoWriter(tmp_path / "a.mp4"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    path, part = tmp_path / "a.mp4", tmp_path / "a.part.mp4"
    part.symlink_to("/dev/full")
    monkeypatch.setattr(media.io, "temporary_name", lambda path: part)

    with pytest.raises(UserError) as caught, media.VideoWriter(path) as video:
        video.append(shades(40))

    assert str(path) in str(caught.value)
    assert "no room" in str(caught.value) and "free some space" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing_is_reported(tmp_path):
    code = (
        "import resource, sys; import numpy as np; from anchor_jax import media\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "noise = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), np.uint8)\n"
        "try:\n"
        "    with media.VideoWriter(sys.argv[1]) as video:\n"
        "        video.append(noise)\n"
        "except media.UserError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "a.mp4"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert "no room" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_video_without_frames_is_refused(tmp_path):
    with pytest.raises(UserError, match="no frames"):
        with media.VideoWriter(tmp_path / "a.mp4"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written_are_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match="name it NAME.mp4"):
        media.VideoWriter(tmp_path / "a.avi")
    with pytest.raises(UserError, match="part of the path is a file"):
        media.VideoWriter(tmp_path / "file" / "a.mp4").__enter__()
    with pytest.raises(UserError, match="it is a folder"):
        media.VideoWriter(tmp_path / "folder.mp4").__enter__()


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((2, 16, 8, 3), np.uint8),
    ],
)
def test_frames_of_another_form_are_refused(tmp_path, frames):
    with media.VideoWriter(tmp_path / "a.mp4") as video:
        video.append(np.zeros((1, 8, 8, 3), np.uint8))
        with pytest.raises(ValueError, match="expected"):
            video.append(frames)


def test_a_whole_video_has_a_duration_and_a_killed_one_none(tmp_path):
    path = tmp_path / "a.mp4"
    with media.VideoWriter(path) as video:
        video.append(shades(40))
        part = video.part.read_bytes()

    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert container.duration == 2_500_000 and stream.frames == 40
        assert stream.duration * stream.time_base == 2.5
        container.seek(2_000_000)
        assert next(container.decode(stream)).time == 2.0
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert b"moof" in part and b"moof" not in content


def test_a_video_is_whole_where_there_is_no_room_for_its_index(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    monkeypatch.setattr(media, "temporary_name", lambda path: tmp_path / "no" / "a.mp4")
    with media.VideoWriter(path) as video:
        video.append(shades(40))

    assert len(decode(path)[0]) == 40
    assert os.listdir(tmp_path) == ["a.mp4"]


QUARTERS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
TURNED = {
    # a, b, c, d: a pixel at (x, y) is shown at (a x + c y, b x + d y).
    (1, 0, 0, 1): ("red", "green", "blue"),
    (0, 1, -1, 0): ("blue", "red", "white"),
    (-1, 0, 0, -1): ("white", "blue", "green"),
    (0, -1, 1, 0): ("green", "white", "red"),
    (-1, 0, 0, 1): ("green", "red", "white"),
    (1, 0, 0, -1): ("blue", "white", "red"),
    (0, 1, 1, 0): ("red", "blue", "green"),
    (0, -1, -1, 0): ("white", "green", "blue"),
    (0, 0, 0, 0): ("red", "green", "blue"),
}


def quarters(path, frames=3, fps=16):
    """A video of 64 x 32 pixels with a colour in each quarter."""
    pixels = np.full((frames, 32, 64, 3), 255, np.uint8)
    pixels[:, :16, :32] = QUARTERS["red"]
    pixels[:, :16, 32:] = QUARTERS["green"]
    pixels[:, 16:, :32] = QUARTERS["blue"]
    with media.VideoWriter(path, fps) as video:
        video.append(pixels)


@pytest.mark.parametrize("matrix", TURNED)
def test_a_video_is_turned_and_mirrored_as_it_says(tmp_path, matrix):
    path = tmp_path / "phone.mp4"
    quarters(path)
    a, b, c, d = (65536 * one for one in matrix)
    content = path.read_bytes()
    place = content.index(b"tkhd") + 44
    stored = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(content[:place] + stored + content[place + 36 :])

    (frame,) = media.read_video(path, 1, (64, 32) if matrix[1] else (32, 64))

    high, wide = (side // 4 for side in frame.shape[:2])
    corners = frame[high, wide], frame[high, -wide], frame[-high, wide]
    for corner, name in zip(corners, TURNED[matrix], strict=True):
        wanted = QUARTERS.get(name, (255, 255, 255))
        assert np.abs(corner.astype(int) - wanted).max() < 40


def encode(path, times, size=(32, 32), ratio=None, base=1000, **metadata):
    """A video of a shade a frame, at times in milliseconds."""
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata)
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height = size
        stream.pix_fmt, stream.codec_context.max_b_frames = "yuv420p", 0
        stream.codec_context.time_base = fractions.Fraction(1, base)
        if ratio:
            stream.codec_context.sample_aspect_ratio = ratio
        for number, time in enumerate(times):
            pixels = np.full((size[1], size[0], 3), 10 * number, np.uint8)
            pixels[:, size[0] // 2 :] //= 2
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_pixels_become_square(tmp_path):
    encode(tmp_path / "a.mkv", [0, 63], (32, 32), fractions.Fraction(2))

    shown = media.read_video(tmp_path / "a.mkv", 2, (32, 64))[1]

    # Twice as wide: nothing is cut away above and below, so the middle is the edge.
    assert shown[:, 2:30].min() > 7 and shown[:, 34:].max() < 7


@pytest.mark.parametrize(
    ("times", "shown"),
    [
        ([0, 62, 125, 187, 250], [0, 1, 2, 3, 4]),  # Rounded to milliseconds.
        ([0, 125, 250], [0, 1, 1, 2, 2]),
        ([0, 20, 63, 63 + 250], [0, 2, 3, 3, 3]),
        (range(0, 260, 10), [0, 7, 13, 19, 25]),
        ([-500, -437, -375, -312, -250], [0, 1, 2, 3, 4]),
    ],
)
def test_frames_are_chosen_by_their_times(tmp_path, times, shown):
    encode(tmp_path / "a.mkv", times)

    clip = media.read_clip(tmp_path / "a.mkv", 5, (32, 32))

    found = [round(value / 10) for value in clip.frames[:, 16, 8, 0].astype(float)]
    assert found == shown
    assert clip.repeated == 5 - len(set(shown))


def test_a_title_that_is_not_utf_8_does_not_matter(tmp_path):
    path = tmp_path / "a.mp4"
    encode(path, [0, 63], title="Zuerich....")
    content = path.read_bytes()
    assert b"Zuerich...." in content
    path.write_bytes(content.replace(b"Zuerich....", b"Z\xfcrich \xff\xfe.."))

    assert media.read_video(path, 2, (8, 8)).shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\n",
        "[playlist]\nFile1={}\n",
        "<?xml version='1.0'?><MPD><Period><BaseURL>{}</BaseURL></Period></MPD>",
    ],
)
@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.ffconcat", "list.mpd"])
def test_a_playlist_leads_nowhere(tmp_path, text, name):
    quarters(tmp_path / "other.mp4")
    (tmp_path / name).write_text(text.format(tmp_path / "other.mp4"))

    with pytest.raises(UserError, match=f"{name}: it is a text file.*playlist"):
        media.read_video(tmp_path / name, 3, (8, 8))


def test_an_unreadable_video_is_named_with_the_reason(tmp_path):
    quarters(tmp_path / "a.mp4")
    cut = (tmp_path / "a.mp4").read_bytes()
    coded = cut.replace(b"avc1", b"xxxx")
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name, content in {
        "cut": cut[:200],
        "coded": coded,
        "empty": b"",
        "noise": bytes(range(256)) * 9,
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    }.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
    (tmp_path / "folder.mp4").mkdir()

    for name, reason in {
        "cut": "no video stream, or its end is missing",
        "coded": "unknown video codec",
        "empty": "it is empty",
        "noise": "not a readable video .*Invalid data",
        "lfs": "Git LFS pointer",
        "song": "it has no video stream",
        "folder": "cannot be read .Is a directory",
        "none": "cannot be read .No such file",
    }.items():
        with pytest.raises(UserError, match=f"{name}.mp4: .*{reason}"):
            media.read_video(tmp_path / f"{name}.mp4", 3, (8, 8))


def test_large_frames_are_refused_before_any_is_decoded(tmp_path, monkeypatch):
    quarters(tmp_path / "a.mp4")
    monkeypatch.setattr(media, "_chosen", None)
    monkeypatch.setattr(media, "_MOST_PIXELS", 64 * 32 - 1)

    with pytest.raises(UserError, match="a.mp4: frames are 64 x 32; .*scale it down"):
        media.read_video(tmp_path / "a.mp4", 1, (8, 8))


def test_frames_without_end_at_one_time_are_refused(tmp_path, monkeypatch):
    quarters(tmp_path / "a.mp4", frames=40, fps=1000)
    monkeypatch.setattr(media, "_MOST_DECODED", 10)

    with pytest.raises(UserError, match="a.mp4: .*too close together"):
        media.read_video(tmp_path / "a.mp4", 3, (8, 8))


def test_a_contact_sheet_enlarges_small_tiles_without_smoothing(tmp_path):
    rows = [shades(12, 64, 64), shades(3, 64, 64)]
    path = tmp_path / "sheet.png"

    media.contact_sheet(rows, ["a red ball rolls", "night falls"], path, columns=4)

    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] >= 4 * 128
    tiles = sheet[10:100, 6 : 6 + 4 * 130]
    shown = [tiles[:, 130 * n + 5, 0] for n in range(4)]
    assert [int(tile[0]) for tile in shown] == [0, 20, 35, 55]  # frames 0, 4, 7, 11
    assert all((tile == tile[0]).all() for tile in shown)
    assert os.listdir(tmp_path) == ["sheet.png"]


def test_a_contact_sheet_has_each_label_under_its_row(tmp_path):
    path = tmp_path / "sheet.png"
    grey = np.full((2, 96, 96, 3), 200, np.uint8)

    def dark_rows(labels):
        media.contact_sheet([grey] * len(labels), labels, path)
        return np.flatnonzero((np.asarray(Image.open(path)) < 90).any(axis=(1, 2)))

    first, both = dark_rows(["words", ""]), dark_rows(["words", "words"])
    assert first.size and 102 <= first.min() and first.max() < 130
    assert both.max() > first.max() + 96
    long = dark_rows(["many words " * 20])
    assert long.max() - long.min() > 60  # wrapped, not cut


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.json"
    io.write_json(path, {"a": np.float32(0.5), "b": np.arange(2), "c": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "a": 0.5,
        "b": [0, 1],
        "c": "é",
    }

    with pytest.raises(TypeError):
        io.write_json(path, {"a": object()})

    assert json.loads(path.read_text(encoding="utf-8"))["a"] == 0.5
    assert os.listdir(path.parent) == ["a.json"]


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    with pytest.raises(UserError, match="no room"), io.replacing(path) as part:
        part.write_text("new")
        open("/dev/full", "w").write("x" * 100_000)

    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
