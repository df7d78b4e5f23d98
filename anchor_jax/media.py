"""Videos and contact sheets; a file appears under its name when whole."""

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

from anchor_jax import io, ownership
from anchor_jax.errors import Stopped, UserError
from anchor_jax.io import (
    explained,
    removed_at_end,
    replacing,
    temporary_name,
    unfinished,
)

PIXEL_FRAMES_PER_SECOND = 16

_X264 = {"preset": "veryfast", "crf": "18", "tune": "zerolatency"}
_FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
_SMPTE_170M = 6  # the matrix that the conversion from RGB uses, so players undo it
_MARGIN = 6
_MIN_TILE = 96
_LARGEST_SIDE = 8192
_MOST_PIXELS = 8192 * 4608  # of a frame; a decoder may hold 16 of them and more
_MOST_DECODED = 1024  # frames of a file for one that is taken
_WIDEST_PIXEL = 4
_LATE = 1e-3  # seconds; some containers round times to milliseconds
# Formats that hold their pictures themselves. Playlists name other files instead.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,"
    "flv,ogg,asf,ivf,obu,nut,mxf,dv,gif,apng,yuv4mpegpipe"
)
_CONTAINER = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
_DECODER = {"max_pixels": str(_MOST_PIXELS)}


class VideoWriter:
    """An H.264 MP4 that is written while frames arrive; use it as a context manager.

    Frames go to `part`, a file beside it that no other process chooses, a fragment a
    second, so that what has been written plays even if the process is killed. A clean
    exit writes the same packets once more, as a file with a duration and an index,
    under the final name. An exception renames the part to `NAME.part.mp4`, if it holds
    frames, and leaves whatever had the final name; a full disk and a request to stop
    remove the part. With `keep_new` a video that another program makes there meanwhile
    stays.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: int = PIXEL_FRAMES_PER_SECOND,
        keep_new: bool = False,
    ) -> None:
        self.path = pathlib.Path(path)
        if self.path.suffix != ".mp4":
            raise UserError(f"{path}: a video is written as .mp4; name it NAME.mp4")
        self.part = io.temporary_name(self.path)
        self.frames = 0
        self._fps, self._is_new = fps, keep_new
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
          UserError: The disk is full; the partial file is removed.
          ValueError: The frames are not of this form, or change size.
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
        with self._writing():
            if self._stream is None:
                self._open_stream()
            for frame in _pad_to_even(frames):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                self._container.mux(self._stream.encode(picture))
                self.frames += 1

    def _open_stream(self) -> None:
        height, width = self._size
        self._container = av.open(
            self._file, "w", format="mp4", options=dict(_FRAGMENTED)
        )
        stream = self._container.add_stream(
            "libx264", rate=self._fps, options=dict(_X264)
        )
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.gop_size, stream.max_b_frames = self._fps, 0
        stream.codec_context.colorspace = _SMPTE_170M
        self._stream = stream

    def _finish(self) -> None:
        if self._stream is None:
            self._discard()
            raise UserError(f"{self.path}: no frames were written, so no video is kept")
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
        # What an earlier attempt left is of no use any more.
        self._kept.unlink(missing_ok=True)

    @property
    def _kept(self) -> pathlib.Path:
        return self.path.with_suffix(".part.mp4")

    def _keep_part(self) -> None:
        """Leaves what was made under a name to look at, unless the folder was lost."""
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
        """Removes the part when the disk is full, and says so."""
        try:
            with explained(self.path):
                yield
        except UserError:
            self._discard()
            raise


def _indexed(part: pathlib.Path, whole: pathlib.Path) -> pathlib.Path:
    """Returns a file with the packets of `part`, a duration and an index.

    It is `whole`; where there is no room for it, `part`, which plays too.
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
    """The first frames of a video, at a fixed rate.

    Attributes:
      frames: uint8 [count, height, width, 3].
      repeated: how many of them show the same picture of the file as the one before,
        since the file has fewer frames a second.
    """

    frames: np.ndarray
    repeated: int


def read_video(
    path: str | os.PathLike,
    count: int,
    size: tuple[int, int],
    fps: int = PIXEL_FRAMES_PER_SECOND,
) -> np.ndarray:
    """Returns the first frames of a video, uint8 [count, height, width, 3].

    As `read_clip`, which says more.
    """
    return read_clip(path, count, size, fps).frames


def read_clip(
    path: str | os.PathLike,
    count: int,
    size: tuple[int, int],
    fps: int = PIXEL_FRAMES_PER_SECOND,
) -> Clip:
    """Returns the first frames of a video.

    Frames are taken at `fps`, whatever the video's own rate is; they are turned and
    mirrored as the file says, their pixels are made square, and they are scaled until
    they cover the size, and cut around their middle. Only the file itself is read: one
    that names others, such as a playlist, is refused.

    Args:
      path: of the file; its name does not say what it holds.
      count: of frames.
      size: height and width.
      fps: frames a second.

    Raises:
      UserError: It is no video, too short, or frames are too large or have no times.
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
    # The library raises its own errors, and Python's for values out of range.
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError) as error:
        raise UserError(f"{path}: {_why_no_video(path, error)}") from error
    if len(found) < count:
        raise UserError(
            f"{path}: {len(found)} frames at {fps} a second, expected {count}; choose a"
            " longer video, or shorter clips"
        )
    return Clip(np.stack(found), repeated)


def _opened(file: Any) -> Any:
    """Returns the container in an open file; nothing else is opened for it."""
    return av.open(
        file,
        options=_DECODER,
        container_options=_CONTAINER,
        metadata_errors="replace",
    )


def _chosen(
    path: pathlib.Path, frames: Iterable[Any], count: int, fps: int
) -> Iterator[tuple[Any, int]]:
    """Yields the frames that are taken, and how many times each is."""
    taken, first = 0, None
    for number, frame in enumerate(frames):
        _check_size(path, frame.width, frame.height)
        if frame.time is None:
            raise UserError(f"{path}: frames without times; write it as an mp4")
        if number > _MOST_DECODED * count:
            raise UserError(
                f"{path}: {number} frames, and their times are too close together;"
                " write it again at an ordinary rate"
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
    """Returns the stream with the video; the cover of a song is none."""
    streams = container.streams.video
    cover = av.stream.Disposition.attached_pic
    found = next((one for one in streams if not one.disposition & cover), None)
    if found is None:
        raise UserError(
            f"{path}: it holds no pictures, or its end is missing; choose a file with a"
            " whole video"
        )
    shape = found.codec_context
    if shape is None:
        raise UserError(f"{path}: an unknown way of coding; write it again as H.264")
    # Nothing has been decoded so far.
    _check_size(path, shape.width, shape.height)
    return found


def _check_size(path: pathlib.Path, width: int, height: int) -> None:
    if max(width, height) > _LARGEST_SIDE or width * height > _MOST_PIXELS:
        raise UserError(
            f"{path}: frames of {width} x {height}; sides must be at most"
            f" {_LARGEST_SIDE}, and frames at most {_MOST_PIXELS} pixels; scale it down"
        )


def _why_no_video(path: pathlib.Path, error: Exception) -> str:
    """Says what a file is that holds no video."""
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError as failure:
        return f"it cannot be read ({failure.strerror})"
    if not head:
        return "it is empty; copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, no video; fetch the file with: git lfs pull"
    if _is_text(head):
        return (
            "it is a text file, for instance a playlist, no video; other files that it"
            " names are not read: name the video itself"
        )
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    return f"no video that can be read ({reason}); write it again as an mp4"


def _is_text(head: bytes) -> bool:
    """Returns whether a file that begins so is text."""
    text = head.decode("utf-8", "ignore")
    is_whole = len(text.encode()) >= len(head) - 3  # The last letter may be cut.
    return is_whole and all(one.isprintable() or one.isspace() for one in text)


def _upright(frame: Any, ratio: fractions.Fraction | None) -> Image.Image:
    """Returns a frame as players show it: turned, mirrored, with square pixels.

    Args:
      frame: that was decoded.
      ratio: width of a pixel divided by its height; None is 1.
    """
    image = frame.to_image()
    if ratio and ratio != 1 and 1 / _WIDEST_PIXEL <= ratio <= _WIDEST_PIXEL:
        width = max(1, round(image.width * ratio))
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    for step in _turns(frame):
        image = image.transpose(step)
    return image


def _turns(frame: Any) -> list[Image.Transpose]:
    """Returns the steps that a frame's display matrix asks for.

    A pixel at (x, y) is shown at (a x + c y, b x + d y). Angles between right ones
    count as the nearest.
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
    """Writes a PNG with a row of frames a segment, and its label under it.

    Args:
      rows: A segment's frames each, uint8 [frame, height, width, 3]; at most
        `columns` of them, evenly spaced, are shown. Tiles under 96 pixels are
        enlarged by a whole factor, without smoothing.
      labels: The text under each row.
      path: The PNG.
      columns: Tiles in a row.
    """
    if len(rows) != len(labels) or not len(rows):
        raise ValueError(
            f"{len(rows)} rows but {len(labels)} labels; expected one each"
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


def _pad_to_even(frames: np.ndarray) -> np.ndarray:
    """Returns frames of even height and width, the last row or column repeated."""
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
    enlarge = math.ceil(_MIN_TILE / min(frames.shape[1:3]))
    tiles = frames[chosen].repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
    return Image.fromarray(np.concatenate(list(tiles), axis=1)[:, :-2])


def _wrap(label: str, font: Any, width: int) -> list[str]:
    """Returns the label in lines that fit the width."""
    letter = font.getlength("n")
    lines = textwrap.wrap(label, width=max(8, int(width / letter)))
    while lines and max(map(font.getlength, lines)) > width and letter < width:
        letter *= 1.1
        lines = textwrap.wrap(label, width=max(1, int(width / letter)))
    return lines
