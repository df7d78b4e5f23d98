"""Batches of every stage, by the kind of data that a config names.

A source is a pure function of a batch's number.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from anchor_jax.errors import UserError, suggest
from anchor_jax.io import expand
from anchor_jax.tiny_world import clips as world_clips
from anchor_jax.tiny_world import data as world_data
from anchor_jax.tiny_world import events, scene
from anchor_jax.tiny_world import windows as world_windows
from anchor_jax.training.data.order import Order, Share
from anchor_jax.weights.bundle import Bundle

LOOKED_AT = 1000  # pairs
Batches = Callable[[int], Mapping[str, Any]]
Texts = Callable[[int], tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The section `data`.

    Attributes:
      kind: of `KINDS`.
      path: prompts: a file with a prompt a line, or JSON lines with `prompt` and
        `switch`; trajectories: the folder that `anchor-jax trajectories` wrote; videos:
        JSON lines with `video` and `caption`. In place of JSON lines there may be one
        JSON list, or a `.csv` or `.tsv` with these columns.
      switch_path: a file whose line k is the second prompt of line k of `path`;
        without it another line of `path` is.
      cache: where datasets are built; without a value in the training's folder.
      size: examples of a generated world.
      dropout: share of prompts left out, for guidance.
      seed: of what is generated and of the order.
    """

    kind: str = "world_prompts"
    path: str | None = None
    switch_path: str | None = None
    cache: str | None = None
    size: int = 4096
    dropout: float = 0.1
    seed: int = 0


def open_source(
    config,
    bundle: Bundle,
    folder: pathlib.Path,
    share: Share | None = None,
    most: int | None = None,
) -> Batches:
    """Returns the batches of a stage.

    Args:
      config: `TrainConfig` of the stage.
      bundle: its tokenizer, text encoder and codec.
      folder: of the training.
      share: the videos that this process makes; None: all of a batch.
      most: videos that are encoded; None: all of the data.

    Raises:
      UserError: The kind does not suit the stage, or a file is wrong.
    """
    _check(config)
    share = share or Share.whole(config.batch)
    if config.stage == "distillation":
        texts = open_texts(config.data, folder)
        if config.distillation.switches:
            _check_switching(texts)
        negative = config.distillation.negative_prompt
        return _prompts(texts, bundle, share, negative)
    section = config.regression
    if config.data.kind == "videos":
        draw = _videos(config.data, bundle, share, section, folder, most)
    else:
        draw = CLIPS[config.data.kind](config.data, bundle, share, section, folder)
    if section.guidance is None:
        return draw
    negative = _negative(bundle, section.negative_prompt, share)
    return lambda number: {**draw(number), "negative": negative}


def _check_switching(texts: Texts) -> None:
    """Raises unless a switch changes the prompt of some sequences."""
    if all(first == second for first, second in map(texts, range(LOOKED_AT))):
        raise UserError(
            "config.data: each prompt is the same text as its switch, so that no switch"
            " would change anything; expected others, in `switch` of the JSON lines or"
            " in data.switch_path"
        )


def _check(config) -> None:
    """Raises unless data and stage go together."""
    data, section = config.data, config.regression
    known = TEXTS if config.stage == "distillation" else CLIPS
    if data.kind not in known:
        found = suggest(data.kind, known, f"kinds for stage {config.stage}")
        raise UserError(f"config.data.kind={data.kind!r}{found}")
    if not 0 <= data.dropout < 1:
        raise UserError(f"config.data.dropout={data.dropout}: expected 0 to below 1")
    if config.stage == "distillation":
        return
    stored = data.kind == "trajectories"
    if stored != section.endpoints or stored and section.forcing != "noise":
        raise UserError(
            f"config.data.kind={data.kind!r} with regression.endpoints="
            f"{section.endpoints} and forcing={section.forcing!r}: endpoints are those"
            " of data.kind='trajectories', regressed with forcing='noise'"
        )


def identity(data: DataConfig) -> dict[str, Any]:
    """Returns what tells whether data are still those that a training began with.

    Raises:
      UserError: The folder of trajectories has none.
    """
    if data.kind == "trajectories":
        from anchor_jax.training.data.trajectories import Trajectories

        stored = Trajectories(data.path)
        return {"count": len(stored), "made_from": stored.inputs}
    if data.path is None:
        return {}
    from anchor_jax.training.data import datasets

    if data.kind == "videos":
        from anchor_jax.training.data import videos

        return {"videos": videos.identity(data.path)}
    paths = (path for path in (data.path, data.switch_path) if path is not None)
    return {path: datasets.digest(expand(path)) for path in paths}


def open_texts(data: DataConfig, folder: pathlib.Path) -> Texts:
    """Returns number -> a prompt and the one that it is switched to.

    Args:
      data: of a kind in `TEXTS`.
      folder: where datasets are built, in `data`, unless the config says otherwise.

    Raises:
      UserError: The kind has no prompts, or a file is wrong.
    """
    if data.kind not in TEXTS:
        known = suggest(data.kind, TEXTS, "kinds with prompts")
        raise UserError(f"config.data.kind={data.kind!r}{known}")
    return TEXTS[data.kind](data, folder)


def _world_texts(data: DataConfig, folder: pathlib.Path) -> Texts:
    """Two scenes of the world, an event between them."""
    del folder

    def draw(number: int) -> tuple[str, str]:
        rng = np.random.default_rng((data.seed, 11, number))
        first, second = world_clips.stream_scenes(rng)
        return events.caption(first, rng), events.caption(second, rng)

    return draw


def _file_texts(data: DataConfig, folder: pathlib.Path) -> Texts:
    """Pairs of a file or of two, another order in every epoch."""
    from anchor_jax.training.data import datasets

    if data.path is None:
        raise UserError(
            "config.data.path is missing; data.kind='prompts' reads a prompt a line, or"
            " JSON lines with prompt and switch"
        )
    place = _cache(data, folder)
    paths = {"path": data.path, "switch_path": data.switch_path, "seed": data.seed}
    pairs = datasets.prepare(datasets.PromptPairs, place, **paths)
    order = Order(len(pairs), data.seed)

    def draw(number: int) -> tuple[str, str]:
        pair = pairs[order.index(number)]
        return pair["prompt"], pair["switch"]

    return draw


def _cache(data: DataConfig, folder: pathlib.Path) -> pathlib.Path:
    return expand(data.cache) if data.cache else folder / "data"


def _prompts(texts: Texts, bundle, share: Share, negative_prompt: str) -> Batches:
    negative = _negative(bundle, negative_prompt, share)

    def draw(number: int) -> Mapping[str, Any]:
        first, second = zip(*map(texts, share.places(number)), strict=True)
        return {
            "prompt": np.asarray(bundle.encode_prompts(list(first))),
            "switch": np.asarray(bundle.encode_prompts(list(second))),
            "negative": negative,
        }

    return draw


def _negative(bundle, prompt: str, share: Share) -> np.ndarray:
    """Returns what guidance leads away from, [row, text, dim]."""
    return np.asarray(bundle.encode_prompts([prompt] * len(share.rows)))


def _trajectories(data, bundle, share: Share, section, folder) -> Batches:
    """Stored states of a teacher's way from noise, each block at a level of its own.

    Source: training/README.md, "Trajectories".
    """
    from anchor_jax.training.data.trajectories import Trajectories

    del folder
    if data.path is None:
        raise UserError(
            "config.data.path is missing; data.kind='trajectories' reads the folder"
            " that anchor-jax trajectories wrote"
        )
    stored, grid = Trajectories(data.path), bundle.grid
    frames, block = section.block * section.blocks, section.block
    shape = (frames, grid.height, grid.width, bundle.model.latent_channels)
    if stored.shape[1:] != shape:
        raise UserError(
            f"{data.path}: trajectories of {stored.shape[1:]} (frame, height, width,"
            f" channel), expected {shape}; choose the same size and number of frames"
        )
    sigma = _levels(data.path, stored)
    order = Order(len(stored), data.seed)

    def draw(number: int) -> Mapping[str, Any]:
        rng = np.random.default_rng((data.seed, 30, number))
        examples = [stored[order.index(place)] for place in share.places(number)]
        states = np.stack([one["states"] for one in examples]).astype(np.float32)
        level = rng.integers(len(sigma), size=(share.size, frames // block))[share.rows]
        of_frame = np.repeat(level, block, axis=1)
        rows, columns = np.arange(len(states))[:, None], np.arange(frames)
        embedding = bundle.encode_prompts([one["prompt"] for one in examples])
        return {
            "noisy": states[rows, of_frame, columns],
            "sigma": sigma[level],
            "target": states[:, -1],
            "embedding": np.asarray(embedding)[:, None],
        }

    return draw


def _levels(path: str, stored) -> np.ndarray:
    """Returns the noise level of each stored state but the last, in [0, 1]."""
    found = stored.inputs.get("sigma")
    is_list = isinstance(found, list) and len(found) == stored.shape[0]
    if not is_list or not all(
        type(one) in (int, float) and 0 <= one <= 1 for one in found
    ):
        raise UserError(
            f"{path}/spec.json: sigma={str(found)[:60]}, expected {stored.shape[0]}"
            " noise levels from 0 to 1; put the file back, or write the trajectories"
            " again"
        )
    return np.asarray(found, np.float32)


def _world_clips(data, bundle, share: Share, section, folder) -> Batches:
    frames = section.block * section.blocks

    def make(codec):
        return world_clips.make_clips(codec, data.seed, data.size, frames)

    clips = world_clips.gather(_kept(data, bundle, folder, frames, make))
    draw = world_clips.ClipBatches(
        clips, bundle.tokenizer, share.size, frames, data.seed, data.dropout
    )
    return _ready(lambda number: share.of(draw(number)), bundle, section)


def _world_windows(data, bundle, share: Share, section, folder) -> Batches:
    frames = section.block * section.blocks
    if frames != world_windows.FRAMES:
        raise UserError(
            f"config.data.kind='world_windows': windows have {world_windows.FRAMES}"
            f" latent frames, got regression.block x regression.blocks = {frames}"
        )

    def make(codec):
        return world_windows.make_windows(codec, data.seed, data.size)

    kept = _kept(data, bundle, folder, frames, make, world_windows.ARRAYS)
    windows = world_windows.gather(kept)
    draw = world_windows.WindowBatches(
        windows, bundle.tokenizer, share.size, data.seed, data.dropout
    )
    return _ready(lambda number: share.of(draw(number)), bundle, section)


def _videos(data, bundle, share: Share, section, folder, most=None) -> Batches:
    from anchor_jax.training.data.videos import Videos

    if data.path is None:
        raise UserError(
            "config.data.path is missing; data.kind='videos' reads a file of JSON lines"
            ' {"video": NAME, "caption": TEXT}'
        )
    draw = Videos(data, bundle, share, section, _cache(data, folder), most)
    return _ready(draw, bundle, section)


def _kept(data, bundle, folder, frames: int, make, arrays=None) -> Iterator[dict]:
    """Yields the examples of a generated world, which are made once and then kept."""
    from anchor_jax.training.data import datasets

    codec = _codec(bundle)
    side = scene.SIZE // scene.CELL
    values = [codec[name].tobytes() for name in sorted(codec)]
    made_from = {
        "kind": [data.kind, world_data.VERSION],
        "seed": data.seed,
        "codec": hashlib.sha256(b"".join(values)).hexdigest(),
    }
    examples = datasets.prepare(
        datasets.Clips,
        _cache(data, folder),
        examples=lambda: make(codec),
        size=data.size,
        shape=(frames, side, side, codec["encode"].shape[1]),
        made_from=made_from,
        arrays=arrays,
    )
    return (examples[number] for number in range(len(examples)))


def _codec(bundle) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in bundle.codec_params.items()}


def _ready(draw: Batches, bundle, section) -> Batches:
    """Where the text encoder is not trained along, its embeddings are data."""
    if section.text:
        return draw

    def encoded(number: int) -> Mapping[str, Any]:
        found = dict(draw(number))
        ids, mask = found.pop("ids"), found.pop("mask")
        embedding = bundle.encode_prompts.encode_ids(
            ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, mask.shape[-1])
        )
        shape = (*ids.shape, embedding.shape[-1])
        return {**found, "embedding": np.asarray(embedding).reshape(shape)}

    return encoded


TEXTS: dict[str, Callable[[DataConfig, pathlib.Path], Texts]] = {
    "world_prompts": _world_texts,
    "prompts": _file_texts,
}
"""Kinds of prompts, for distillation and for trajectories."""

CLIPS: dict[str, Callable[..., Batches]] = {
    "world_clips": _world_clips,
    "world_windows": _world_windows,
    "trajectories": _trajectories,
    "videos": _videos,
}
"""Kinds of clips, for regression."""

KINDS = (*TEXTS, *CLIPS)


def check_folder(path: str) -> pathlib.Path:
    """Returns a folder that can be written to.

    Raises:
      UserError: It cannot.
    """
    folder = expand(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"config.out={path!r}: cannot be written to ({error.strerror}); choose"
            " another folder"
        ) from error
    return folder
