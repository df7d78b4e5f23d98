"""A user's own videos with captions, as latent clips."""

import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from anchor_jax import media
from anchor_jax.errors import UserError, naming
from anchor_jax.io import expand, inside
from anchor_jax.prompt_files import decode
from anchor_jax.prompts import MAX_PROMPT_CHARACTERS
from anchor_jax.text import check_text
from anchor_jax.training.data import datasets, pairs
from anchor_jax.training.data.digests import digest
from anchor_jax.training.data.kinds import ClipKind, ClipRequest, DataConfig, path_of
from anchor_jax.training.data.order import Order

_SHOWN = 10  # videos in a message
_READS = 'a file of JSON lines {"video": NAME, "caption": TEXT}'
_EXPECTED = 'expected {"video": NAME, "caption": TEXT}'


def read_list(path: str) -> list[tuple[pathlib.Path, str]]:
    """Returns the videos and captions of a file.

    It holds JSON lines, or one JSON list, of `{"video": "NAME.mp4", "caption": TEXT}`,
    or is a `.csv` or `.tsv` with these columns; the video is beside the file or in a
    folder below it.

    Raises:
      UserError: A line is wrong; the message names it.
    """
    file = pairs.open_file(expand(path), ("video", "caption"))
    found = []
    for number, value in file:
        where = file.place(number)
        name, caption = _entry(value, where)
        pairs.check_length(where, caption, MAX_PROMPT_CHARACTERS)
        check_text(name, where)
        found.append((_beside(file.path, name, where), caption))
    if not found:
        raise UserError(f"{file.path}: the file has no lines; {_EXPECTED} in each")
    return found


def _entry(value: Any, where: str) -> tuple[str, str]:
    """Returns the name of a video, and its caption."""
    try:
        entry = decode(value) if isinstance(value, str) else value
    except UserError:
        entry = None
    got = entry if isinstance(entry, dict) else {}
    name, caption = got.get("video"), got.get("caption")
    if not isinstance(name, str) or not isinstance(caption, str):
        raise UserError(f"{where}: got {str(value)[:60]}, {_EXPECTED}")
    return name, caption


def identity(path: str) -> str:
    """Returns a hash of a list's videos and captions, independent of their names."""
    found = [[digest(video), text] for video, text in read_list(path)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _beside(file: pathlib.Path, name: str, where: str) -> pathlib.Path:
    with naming(where):
        return inside(file.parent, name)


def _check(
    videos: Iterable[pathlib.Path], count: int, size: tuple[int, int], fps: int
) -> None:
    """Raises one error with the faults of all videos, before any is encoded.

    Warns about videos with fewer frames per second than a clip.
    """
    wrong, slow = [], {}
    for video in tqdm(list(videos), desc="checks videos", unit="video"):
        try:
            repeated = media.read_clip(video, count, size, fps).repeated
        except UserError as error:
            wrong.append(str(error))
        else:
            slow |= {video: repeated} if repeated else {}
    if wrong:
        shown = "; ".join(wrong[:_SHOWN]) + "; ..." * (len(wrong) > _SHOWN)
        raise UserError(f"{len(wrong)} videos cannot be used: {shown}")
    if slow:
        first, repeated = next(iter(slow.items()))
        tqdm.write(
            f"warning: {len(slow)} videos have fewer than"
            f" {fps} frames per second, so that some pictures"
            f" are used more than once: {first}, {repeated} of {count} frames are"
            " repeats; motion stutters there. Leave such videos out if that matters",
            file=sys.stderr,
        )


class Videos:
    """Batches of clips as pure functions of their number. Clips are encoded once."""

    def __init__(self, request: ClipRequest):
        """Reads the list, and encodes the videos unless they are already encoded.

        Raises:
          UserError: The list or a video is wrong.
        """
        bundle, grid = request.bundle, request.bundle.grid
        self._tokenizer, self._share = bundle.tokenizer, request.share
        self._data, self._frames = request.data, request.frames
        listed = read_list(request.data.path)[: request.most]
        hashes = [[digest(video), caption] for video, caption in listed]
        self._clips = datasets.prepare(
            datasets.Clips,
            request.cache,
            examples=lambda: self._encode(listed, bundle),
            size=len(listed),
            shape=(self._frames, grid.height, grid.width, bundle.model.latent_channels),
            made_from={"videos": hashes, "weights": bundle.digest},
        )
        self._order = Order(len(self._clips), request.data.seed)

    def _encode(self, listed, bundle) -> Iterator[dict[str, Any]]:
        family = bundle.model.family
        size, fps = family.pixel_size(bundle.grid), family.frames_per_second
        count = family.pixel_frames(self._frames)
        _check((video for video, _ in listed), count, size, fps)
        encode = jax.jit(functools.partial(bundle.codec.encode, bundle.codec_params))
        for video, caption in listed:
            pixels = media.read_video(video, count, size, fps)
            unit = jnp.asarray(pixels[None], jnp.float32) / 127.5 - 1
            yield {"latents": np.asarray(encode(unit))[0], "captions": [caption]}

    def __call__(self, number: int) -> Mapping[str, Any]:
        """Returns latents and token ids of batch `number`; dropout removes captions."""
        rng, share = np.random.default_rng((self._data.seed, 31, number)), self._share
        found = [
            self._clips[self._order.index(place)] for place in share.places(number)
        ]
        kept = rng.random(share.size)[share.rows] >= self._data.dropout
        texts = [
            one["captions"][0] if keep else ""
            for one, keep in zip(found, kept, strict=True)
        ]
        ids, mask = self._tokenizer.encode(texts)
        latents = np.stack([one["latents"] for one in found]).astype(np.float32)
        return {"latents": latents, "ids": ids[:, None], "mask": mask[:, None]}


class VideoKind(ClipKind):
    """The kind `videos`: a user's own files with captions."""

    columns = ("video", "caption")

    def open_clips(self, request: ClipRequest) -> Videos:
        """Returns batches of the listed videos, which the first call encodes."""
        path_of(request.data, _READS)
        return Videos(request)

    def identity(self, data: DataConfig) -> dict[str, Any]:
        """Returns a hash of the videos and their captions."""
        return {} if data.path is None else {"videos": identity(data.path)}


VIDEOS = VideoKind()
