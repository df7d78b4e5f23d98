"""Reads and writes videos and contact sheets; only complete files get their names."""

import contextlib
import dataclasses
import errno
import fractions
import math
import os
import pathlib
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from anchor_jax import io, ownership, places
from anchor_jax.errors import Stopped, UserError
from anchor_jax.io import (
    explained,
    removed_at_end,
    replacing,
    temporary_name,
    unfinished,
)
from anchor_jax.wan.spec import WAN_2_1

_X264 = {"preset": "veryfast", "crf": "18", "tune": "zerolatency"}
_FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
_SMPTE_170M = 6  # matrix of the conversion from RGB, which players invert
_MARGIN = 6
_MIN_TILE = 96
MOST_ENLARGED = 16
"""Largest factor by which a video is enlarged."""
_SMALL, _ENLARGED = 128, 4  # pixels, factor
_LARGEST_SIDE = 8192
_MOST_PIXELS = 8192 * 4608  # per frame; a decoder may hold 16 frames or more
_MOST_DECODED = 1024  # decoded frames per frame that is used
_WIDEST_PIXEL = 4
_LATE = 1e-3  # seconds; some containers round times to milliseconds
# Formats that contain their own frames. Playlists refer to other files instead.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,"
    "flv,ogg,asf,ivf,obu,nut,mxf,dv,gif,apng,yuv4mpegpipe"
)
_CONTAINER = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
_DECODER = {"max_pixels": str(_MOST_PIXELS)}


class VideoWriter:
    """Writes an H.264 MP4 while frames arrive; use it as a context manager.

    Frames go to `part`, a file beside the video with a unique name. It has one fragment
    per second, so that it plays even if the process is killed. A clean exit writes the
    same packets again, with a duration and an index, under the final name. After an
    exception the part is renamed to `NAME.part.mp4` if it has frames, and an existing
    file with the final name stays. A full disk and a request to stop remove the part.
    With `keep_new`, a video that another program makes in the meantime is not replaced.
    `enlarge` is the factor by which frames are enlarged, without smoothing. None takes
    4 for frames of less than 128 pixels on both sides, otherwise 1.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: int = WAN_2_1.frames_per_second,
        keep_new: bool = False,
        enlarge: int | None = 1,
    ) -> None:
        self.path = places.local(path)
        if self.path.suffix != ".mp4":
            raise UserError(f"{path}: videos are written as .mp4; name it NAME.mp4")
        self.part = io.temporary_name(self.path)
        self.frames = 0
        self._fps, self._is_new, self._enlarge = fps, keep_new, enlarge
        self._file = self._container = self._stream = None
        self._size = (0, 0)
        self._registered = contextlib.ExitStack()

    def __enter__(self) -> "VideoWriter":
        with explained(self.path):
            if self.path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._is_new = self._is_new and not self.path.exists()
            self._file = open(self.part, "wb", buffering=0)
        self._registered.enter_context(removed_at_end(self.part))
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self._registered:
            if kind is None:
                self._finish()
            elif issubclass(kind, Stopped):
                self._discard()
            else:
                self._abandon()

    def append(self, frames: np.ndarray) -> None:
        """Writes frames of 8-bit RGB, [frame, height, width, 3].

        Raises:
          UserError: The disk is full, and the partial file is removed; or enlarged
            frames are too large.
          ValueError: The frames have another type or shape, or their size changes.
        """
        frames = np.asarray(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(
                f"frames: got {frames.dtype} of shape {frames.shape}, expected uint8"
                " [frame, height, width, 3]"
            )
        if self._stream is None:
            self._size = frames.shape[1:3]
        if frames.shape[1:3] != self._size:
            raise ValueError(f"frames: got {frames.shape[1:3]}, expected {self._size}")
        ownership.check(self.path)
        factor = self._enlarge or enlargement(self._size)
        if factor > 1:
            height, width = self._size
            _check_size(self.path, factor * width, factor * height)
        frames = _pad_to_even(enlarged(frames, factor))
        with self._writing():
            if self._stream is None:
                self._open_stream(*frames.shape[1:3])
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                self._container.mux(self._stream.encode(picture))
                self.frames += 1

    def _open_stream(self, height: int, width: int) -> None:
        self._container = av.open(
            self._file, "w", format="mp4", options=dict(_FRAGMENTED)
        )
        stream = self._container.add_stream(
            "libx264", rate=self._fps, options=dict(_X264)
        )
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p"
        stream.gop_size, stream.max_b_frames = self._fps, 0
        stream.codec_context.colorspace = _SMPTE_170M
        self._stream = stream

    def _finish(self) -> None:
        if self._stream is None:
            self._discard()
            raise UserError(f"{self.path}: no frames were written")
        with self._writing():
            self._container.mux(self._stream.encode())
            self._container.close()
            self._file.close()
        try:
            with explained(self.path), unfinished(temporary_name(self.path)) as whole:
                io.publish(_indexed(self.part, whole), self.path, self._is_new)
        except UserError:
            self._keep_part()
            raise
        self.part.unlink(missing_ok=True)
        # The part file of an earlier attempt is no longer needed.
        self._kept.unlink(missing_ok=True)

    @property
    def _kept(self) -> pathlib.Path:
        return self.path.with_suffix(".part.mp4")

    def _keep_part(self) -> None:
        """Renames the part to `NAME.part.mp4`, unless the folder was taken over."""
        try:
            io.publish(self.part, self._kept)
        except (OSError, UserError):
            self.part.unlink(missing_ok=True)

    def _abandon(self) -> None:
        if not self.frames:
            self._discard()
            return
        with contextlib.suppress(OSError, av.FFmpegError):
            self._container.mux(self._stream.encode())
            self._container.close()
            self._file.close()
        self._keep_part()

    def _discard(self) -> None:
        with contextlib.suppress(OSError, av.FFmpegError):
            if self._container is not None:
                self._container.close()
        self._file.close()
        self.part.unlink(missing_ok=True)
        self.frames = 0

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Removes the part if the disk is full, and raises UserError."""
        try:
            with explained(self.path):
                yield
        except UserError:
            self._discard()
            raise


def _indexed(part: pathlib.Path, whole: pathlib.Path) -> pathlib.Path:
    """Returns a file with the packets of `part`, a duration and an index.

    The file is `whole`. If the disk is too full for it, it is `part`, which is playable
    too.
    """
    options = {"movflags": "faststart"}
    try:
        with (
            av.open(f"file:{part}") as given,
            av.open(f"file:{whole}", "w", format="mp4", options=options) as made,
        ):
            stream = made.add_stream_from_template(given.streams.video[0])
            for packet in given.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    made.mux(packet)
    except (av.FFmpegError, OSError):
        return part
    return whole


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """The first frames of a video, at a fixed frame rate.

    Attributes:
      frames: uint8 [count, height, width, 3].
      repeated: number of frames that repeat the previous one, because the file has a
        lower frame rate.
    """

    frames: np.ndarray
    repeated: int


def read_video(
    path: str | os.PathLike,
    count: int,
    size: tuple[int, int],
    fps: int = WAN_2_1.frames_per_second,
) -> np.ndarray:
    """Returns the frames of `read_clip`, uint8 [count, height, width, 3]."""
    return read_clip(path, count, size, fps).frames


def read_clip(
    path: str | os.PathLike,
    count: int,
    size: tuple[int, int],
    fps: int = WAN_2_1.frames_per_second,
) -> Clip:
    """Returns the first frames of a video.

    Frames are sampled at `fps`, independent of the video's own rate. They are rotated
    and mirrored as the file's metadata say, resampled to square pixels, scaled to cover
    the size, and cropped at the centre. Only the file itself is read. A file that
    refers to others, such as a playlist, is refused.

    Args:
      path: the path of the file. Its suffix is ignored.
      count: number of frames.
      size: height and width.
      fps: frames per second.

    Raises:
      UserError: The file is not a video or is too short, or frames are too large or
        have no timestamps.
    """
    path = pathlib.Path(path)
    found: list[np.ndarray] = []
    repeated = 0
    try:
        with path.open("rb") as file, _opened(file) as container:
            stream = _pictures(path, container)
            for frame, times in _chosen(path, container.decode(stream), count, fps):
                image = _upright(frame, stream.sample_aspect_ratio)
                found += [_covering(image, size)] * times
                repeated += times - 1
    except UserError:
        raise
    # The library raises its own errors, and built-in ones for values out of range.
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        raise UserError(f"{path}: {_why_no_video(path, error)}") from error
    if len(found) < count:
        raise UserError(
            f"{path}: {len(found)} frames at {fps} per second, expected {count}; choose"
            " a longer video, or shorter clips"
        )
    return Clip(np.stack(found), repeated)


def decoded(path: str | os.PathLike) -> Iterator[np.ndarray]:
    """Yields the frames of a video that `VideoWriter` wrote, uint8 [height, width, 3].

    Raises:
      UserError: The file is not a readable video.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file, _opened(file) as container:
            for frame in container.decode(_pictures(path, container)):
                yield frame.to_ndarray(format="rgb24")
    except UserError:
        raise
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        raise UserError(f"{path}: {_why_no_video(path, error)}") from error


def _opened(file: Any) -> Any:
    """Returns the container of an open file; no other file is opened."""
    return av.open(
        file,
        options=_DECODER,
        container_options=_CONTAINER,
        metadata_errors="replace",
    )


def _chosen(
    path: pathlib.Path, frames: Iterable[Any], count: int, fps: int
) -> Iterator[tuple[Any, int]]:
    """Yields the sampled frames, and how often each is used."""
    taken, first = 0, None
    for number, frame in enumerate(frames):
        _check_size(path, frame.width, frame.height)
        if frame.time is None:
            raise UserError(f"{path}: frames have no timestamps; convert it to MP4")
        if number > _MOST_DECODED * count:
            raise UserError(
                f"{path}: the timestamps of {number} frames are too close together;"
                " convert it to an ordinary frame rate"
            )
        first = frame.time if first is None else first
        due = math.floor((frame.time - first + _LATE) * fps) + 1
        times = min(due, count) - taken
        if times > 0:
            yield frame, times
            taken += times
        if taken == count:
            return


def _pictures(path: pathlib.Path, container: Any) -> Any:
    """Returns the video stream; cover art of audio files is not a video stream."""
    streams = container.streams.video
    cover = av.stream.Disposition.attached_pic
    found = next((one for one in streams if not one.disposition & cover), None)
    if found is None:
        raise UserError(
            f"{path}: it has no video stream, or its end is missing; choose a file with"
            " a complete video"
        )
    shape = found.codec_context
    if shape is None:
        raise UserError(f"{path}: unknown video codec; convert it to H.264")
    # Checked before anything is decoded.
    _check_size(path, shape.width, shape.height)
    return found


def _check_size(path: pathlib.Path, width: int, height: int) -> None:
    if max(width, height) > _LARGEST_SIDE or width * height > _MOST_PIXELS:
        raise UserError(
            f"{path}: frames are {width} x {height}; sides must be at most"
            f" {_LARGEST_SIDE}, and frames at most {_MOST_PIXELS} pixels; scale it down"
        )


def _why_no_video(path: pathlib.Path, error: Exception) -> str:
    """Describes a file that is not a readable video."""
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as failure:
        return f"it cannot be read ({failure.strerror})"
    if not head:
        return "it is empty; copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not a video; fetch it with: git lfs pull"
    if _is_text(head):
        return (
            "it is a text file, such as a playlist, not a video; files that it refers"
            " to are not read: give the video itself"
        )
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    return f"not a readable video ({reason}); convert it to MP4"


def _is_text(head: bytes) -> bool:
    """Returns whether the start of a file is text."""
    text = head.decode("utf-8", "ignore")
    is_whole = len(text.encode()) >= len(head) - 3  # The last character may be cut.
    return is_whole and all(one.isprintable() or one.isspace() for one in text)


def _upright(frame: Any, ratio: fractions.Fraction | None) -> Image.Image:
    """Returns a frame as players show it: rotated, mirrored, with square pixels.

    Args:
      frame: the decoded frame.
      ratio: width of a pixel divided by its height; None is 1.
    """
    image = frame.to_image()
    if ratio and ratio != 1 and 1 / _WIDEST_PIXEL <= ratio <= _WIDEST_PIXEL:
        width = max(1, round(image.width * ratio))
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    for step in _transpositions(frame):
        image = image.transpose(step)
    return image


def _transpositions(frame: Any) -> list[Image.Transpose]:
    """Returns the transpositions that apply a frame's display matrix.

    A pixel at (x, y) is shown at (a x + c y, b x + d y). Angles are rounded to
    multiples of 90 degrees.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return []
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).astype(np.int64)
    steps, across, down = [], a, d
    if abs(b) + abs(c) > abs(a) + abs(d):
        steps, across, down = [Image.Transpose.TRANSPOSE], c, b
    if across < 0:
        steps.append(Image.Transpose.FLIP_LEFT_RIGHT)
    if down < 0:
        steps.append(Image.Transpose.FLIP_TOP_BOTTOM)
    return steps


def _covering(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))


def contact_sheet(
    rows: Sequence[np.ndarray],
    labels: Sequence[str],
    path: str | os.PathLike,
    columns: int = 8,
) -> None:
    """Writes a PNG with one row of frames per segment, and a label under each row.

    Args:
      rows: The frames of each segment, uint8 [frame, height, width, 3]. At most
        `columns` of them, evenly spaced, are shown. Tiles under 96 pixels are enlarged
        by an integer factor, without smoothing.
      labels: The text under each row.
      path: The PNG.
      columns: Tiles per row.
    """
    if len(rows) != len(labels) or not len(rows):
        raise ValueError(
            f"got {len(rows)} rows and {len(labels)} labels; each row needs one label"
        )
    strips = [_strip(np.asarray(frames), columns) for frames in rows]
    width = max(strip.width for strip in strips) + 2 * _MARGIN
    font = ImageFont.load_default(size=14)
    line_height = sum(font.getmetrics()) + 1
    texts = [_wrap(label, font, width - 2 * _MARGIN) for label in labels]
    heights = [
        strip.height + len(lines) * line_height + 2 * _MARGIN
        for strip, lines in zip(strips, texts, strict=True)
    ]
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN), "white")
    draw, top = ImageDraw.Draw(sheet), _MARGIN
    for strip, lines, height in zip(strips, texts, heights, strict=True):
        sheet.paste(strip, (_MARGIN, top))
        for number, line in enumerate(lines):
            below = top + strip.height + _MARGIN // 2 + number * line_height
            draw.text((_MARGIN, below), line, fill="black", font=font)
        top += height
    with replacing(path) as part:
        sheet.save(part, format="PNG")


def enlargement(size: tuple[int, int]) -> int:
    """Returns the factor by which videos of a height and width are enlarged."""
    return _ENLARGED if max(size) < _SMALL else 1


def check_enlarge(name: str, factor: int) -> None:
    """Raises UserError unless a video can be enlarged by a factor."""
    if not 1 <= factor <= MOST_ENLARGED:
        raise UserError(
            f"{name}={factor}: must be an integer from 1 (as made) to {MOST_ENLARGED}"
        )


def enlarged(frames: np.ndarray, factor: int) -> np.ndarray:
    """Returns frames [frame, height, width, 3], enlarged without smoothing."""
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def _pad_to_even(frames: np.ndarray) -> np.ndarray:
    """Pads frames to even height and width by repeating the last row or column."""
    height, width = frames.shape[1:3]
    padding = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    return np.ascontiguousarray(np.pad(frames, padding, mode="edge"))


def _strip(frames: np.ndarray, columns: int) -> Image.Image:
    """Returns up to `columns` evenly spaced frames side by side."""
    if frames.ndim != 4 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(
            f"frames: got {frames.dtype} of shape {frames.shape}, expected uint8"
            " [frame, height, width, 3] with at least one frame"
        )
    shown = min(columns, len(frames))
    chosen = np.linspace(0, len(frames) - 1, shown).round().astype(int)
    factor = math.ceil(_MIN_TILE / min(frames.shape[1:3]))
    tiles = enlarged(frames[chosen], factor)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
    return Image.fromarray(np.concatenate(list(tiles), axis=1)[:, :-2])


def _wrap(label: str, font: Any, width: int) -> list[str]:
    """Wraps the label into lines that fit the width."""
    letter = font.getlength("n")
    lines = textwrap.wrap(label, width=max(8, int(width / letter)))
    while lines and max(map(font.getlength, lines)) > width and letter < width:
        letter *= 1.1
        lines = textwrap.wrap(label, width=max(1, int(width / letter)))
    return lines
