import numpy as np
import pytest

from anchor_jax import media
from anchor_jax.errors import UserError
from anchor_jax.sampling import panels


def write(path, level, count=3, size=(48, 64)):
    with media.VideoWriter(path) as video:
        video.append(np.full((count, *size, 3), level, np.uint8))
    return path


def test_each_video_is_below_its_name(tmp_path):
    paths = [write(tmp_path / f"{level}.mp4", level) for level in (80, 160, 240)]

    moments = list(panels.side_by_side(paths, ["a", "bb", "ccc"]))

    assert len(moments) == 3
    frames, whole = moments[0]
    assert [round(float(frame.mean()), -1) for frame in frames] == [80, 160, 240]
    assert whole.shape[1] == 3 * 64 + 2 * 4
    below = whole[-48:]
    for number, level in enumerate((80, 160, 240)):
        left = number * 68
        assert abs(below[:, left : left + 64].mean() - level) < 4
        assert whole[:-48, left : left + 64].max() == 255


def test_many_videos_take_several_rows(tmp_path):
    path = write(tmp_path / "a.mp4", 200, 1)

    whole = next(panels.side_by_side([path] * 5, list("abcde")))[1]

    strip = panels.label("a", 64).shape[0]
    assert whole.shape == (2 * (strip + 48) + 4, 3 * 64 + 2 * 4, 3)
    assert whole[-48:, -64:].max() == 0, "the last place is empty"


@pytest.mark.parametrize("name", ["a", "self_forcing_rolling", "x" * 60])
@pytest.mark.parametrize("width", [64, 256, 832])
def test_a_label_is_as_wide_as_its_video(name, width):
    strip = panels.label(name, width)

    assert strip.shape[1:] == (width, 3)
    assert strip.max() > 150 and 10 < len(strip) < 40


@pytest.mark.parametrize("other", [{"count": 2}, {"size": (64, 64)}])
def test_videos_that_differ_are_refused(tmp_path, other):
    paths = [write(tmp_path / "a.mp4", 0), write(tmp_path / "b.mp4", 0, **other)]

    with pytest.raises(UserError, match="differ in size or length"):
        list(panels.side_by_side(paths, ["a", "b"]))


def test_a_file_that_is_not_a_video_is_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"text")

    with pytest.raises(UserError, match="a.mp4"):
        list(panels.side_by_side([tmp_path / "a.mp4"], ["a"]))
