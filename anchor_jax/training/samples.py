"""Sample videos of a running training, made by the streams' sampler."""

import contextlib
import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from PIL import Image

from anchor_jax import flow, io, media, processes, prompts, sharding
from anchor_jax.cache.catalog import TEACHER
from anchor_jax.cache.policies import Policy
from anchor_jax.errors import UserError, suggest
from anchor_jax.prompts import Script, Segment, Timing
from anchor_jax.sampling.methods import Method, trained_method
from anchor_jax.sampling.resolve import make_policy
from anchor_jax.streaming.session import Session
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.training import placement
from anchor_jax.training.data import kinds
from anchor_jax.training.stages import build
from anchor_jax.training.stages.base import Prepared
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.training.state import TrainState
from anchor_jax.weights.bundle import Bundle

FOLDER = "samples"
"""Name of the videos' folder, in the folder of a training."""
_MOST = 64
_LONGEST = 3600.0
"""Seconds that other processes wait for the sample videos of the first."""
_OWN = dict.fromkeys(("window", "sink", "block", "rope", "on_switch"))


@dataclasses.dataclass(frozen=True)
class Video:
    """A sample video, which is made repeatedly: its script and its stream."""

    script: Script
    setup: StreamSetup


@dataclasses.dataclass(eq=False)
class Sampler:
    """Makes the sample videos of a training: the same prompts and noise each time.

    Attributes:
      folder: folder of the files.
      videos: the videos, all of one length.
      bundle: bundle of the initial generator.
      frozen: collections of the generator that are not trained.
      codec: parameters of the VAE, on the mesh.
      place: sharding of replicated arrays.
      negative_prompt: negative prompt of the guidance.
      seed: seed of the noise, to which a video's number is added.
      show: called with the contact sheet, uint8 [height, width, 3], and the step.
    """

    folder: io.Place
    videos: Sequence[Video]
    bundle: Bundle
    frozen: Mapping[str, Any]
    codec: Mapping[str, Any]
    place: NamedSharding
    negative_prompt: str
    seed: int
    show: Callable[[np.ndarray, int], None] = lambda image, step: None

    def __call__(self, state: TrainState, step: int) -> None:
        """Writes the videos of a state, side by side, and a sheet of their frames.

        The running mean of the generator is used if there is one.

        Raises:
          UserError: The files cannot be written.
        """
        trained = state.generator if state.ema is None else state.ema
        if processes.count() == 1:
            # Attention kernels are split over the current mesh.
            with jax.set_mesh(self.place.mesh):
                self._make(self._with(trained, self.frozen, self.codec), step)
            return
        arrays = self._on_one_device((trained, self.frozen, self.codec))
        try:
            if processes.is_first():
                self._make(self._with(*arrays), step)
        finally:
            processes.barrier("sample videos", _LONGEST)

    def _make(self, bundle: Bundle, step: int) -> None:
        """Writes the videos of a bundle."""
        made = [
            self._play(bundle, video, self.seed + number)
            for number, video in enumerate(self.videos)
        ]
        name = f"step-{step:06d}"
        rate = bundle.model.family.frames_per_second
        labels = [" | ".join(video.script.prompts) for video in self.videos]
        with io.filling(self.folder) as folder:
            movie, sheet = (folder / f"{name}{end}" for end in (".mp4", ".png"))
            with media.VideoWriter(movie, rate) as video:
                video.append(side_by_side(made))
                media.contact_sheet(made, labels, sheet)
            with Image.open(sheet) as image:
                shown = np.asarray(image.convert("RGB"))
        self.show(shown, step)

    def _on_one_device(self, arrays):
        """Returns arrays of all processes on a device of each; all take part."""
        leaves, form = jax.tree.flatten(arrays)
        found = self._gather(leaves, tuple(map(_is_split, leaves)))
        return jax.tree.unflatten(form, [x.addressable_data(0) for x in found])

    @functools.cached_property
    def _gather(self) -> Callable:
        """Matrices take the activations' type, to which the layers cast them anyway."""
        dtype = self.bundle.model.dtype

        def gather(leaves, split):
            pairs = zip(leaves, split, strict=True)
            return [x.astype(dtype) if is_split else x for x, is_split in pairs]

        return jax.jit(gather, static_argnums=1, out_shardings=self.place)

    def _with(self, trained: Mapping[str, Any], frozen, codec) -> Bundle:
        """Returns the bundle with the weights of a state."""
        networks = {name: tree for name, tree in trained.items() if name != "text"}
        variables = {**frozen, **networks}
        encoder = self.bundle.encode_prompts
        text = trained.get("text", encoder.params)
        place = jax.tree.leaves(codec)[0].sharding
        encoder = dataclasses.replace(encoder, load=lambda: text, place=place)
        return dataclasses.replace(
            self.bundle,
            encode_prompts=encoder,
            load_variables=lambda: variables,
            load_codec=lambda: codec,
        )

    def _play(self, bundle: Bundle, video: Video, seed: int) -> np.ndarray:
        """Returns a video's pixels, uint8 [frame, height, width, 3]."""
        script = video.script
        session = _session(bundle, video, seed, self.negative_prompt)
        return np.concatenate([frames for frames, _ in session.play(script)])


def _is_split(x: jax.Array) -> bool:
    axes = jax.tree.leaves(tuple(x.sharding.spec))
    return any(axis in sharding.VIDEOS for axis in axes)


def side_by_side(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Returns videos of one size as one video, a grid whose empty cells are black."""
    columns = math.ceil(math.sqrt(len(videos)))
    rows = -(-len(videos) // columns)
    empty = [np.zeros_like(videos[0])] * (rows * columns - len(videos))
    cells = iter([*videos, *empty])
    lines = [
        np.concatenate(list(itertools.islice(cells, columns)), axis=2)
        for _ in range(rows)
    ]
    return np.concatenate(lines, axis=1)


def make_sampler(
    config: TrainConfig, prepared: Prepared, folder: io.Place
) -> Sampler | None:
    """Returns the maker of a training's sample videos, or None if there are none.

    Args:
      config: config of the training; `samples` describes the videos.
      prepared: the stage with its state, on its mesh.
      folder: folder of the training.

    Raises:
      UserError: A field of `samples` is wrong.
    """
    _check(config)
    with _naming():
        block = _block(config)
    rate = prepared.bundle.model.family.latent_frames_per_second
    scripts = _scripts(config, block, rate)
    if not scripts or not config.sample_every:
        return None
    negative = build.find_stage(config).sample_negative(config)
    with _naming():
        videos = [Video(one, _setup(config, prepared, one)) for one in scripts]
        for video in videos:
            _session(prepared.bundle, video, config.seed, negative)
    mesh, frozen = prepared.compiled.mesh, prepared.compiled.frozen
    codec = frozen.get("codec")
    if codec is None:
        codec = {"codec": prepared.bundle.codec_params}
        codec = placement.put(codec, placement.of_frozen(codec, mesh))["codec"]
    return Sampler(
        folder=folder / FOLDER,
        videos=videos,
        bundle=prepared.bundle,
        frozen=frozen["generator"],
        codec=codec,
        place=placement.everywhere(mesh),
        negative_prompt=negative,
        seed=config.seed,
    )


def _session(bundle: Bundle, video: Video, seed: int, negative: str) -> Session:
    """Returns the session that makes a video, after checking it."""
    session = Session(bundle, video.setup, video.script.prompts[0], seed, negative)
    session.check(video.script.frames)
    return session


@contextlib.contextmanager
def _naming() -> Iterator[None]:
    """Adds the config's section to the message of an error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"config.samples: {error}") from error


def _check(config: TrainConfig) -> None:
    samples = config.samples
    for name in ("num", "frames", "steps"):
        if getattr(samples, name) < 1:
            raise UserError(
                f"config.samples.{name}={getattr(samples, name)}: must be at least 1"
            )
    if max(samples.num, len(samples.prompts)) > _MOST:
        raise UserError(f"config.samples: at most {_MOST} videos are allowed")
    if not 0 <= samples.guidance < math.inf:
        raise UserError(
            f"config.samples.guidance={samples.guidance}: must be at least 0; 1 turns"
            " guidance off"
        )
    if samples.grid not in flow.GRIDS:
        known = suggest(samples.grid, flow.GRIDS, "noise levels")
        raise UserError(f"config.samples.grid={samples.grid!r}{known}")
    if not all(isinstance(one, str) and one.strip() for one in samples.prompts):
        raise UserError(
            f"config.samples.prompts={samples.prompts}: must be texts, such as"
            " ('a red ring | a blue ring',)"
        )


def _setup(config: TrainConfig, prepared: Prepared, script: Script) -> StreamSetup:
    """Returns the static setup of a video's stream, as its weights are sampled."""
    method = _method(config)
    policy = _policy(method, script)
    return build.find_stage(config).sample_setup(prepared, method, policy)


def _method(config: TrainConfig) -> Method:
    method = trained_method(dataclasses.asdict(config))
    if config.samples.policy is None:
        return method
    return dataclasses.replace(method, policy=config.samples.policy)


def _policy(method: Method, script: Script) -> Policy:
    choice = types.SimpleNamespace(policy=method.policy, rules=method.rules, **_OWN)
    return make_policy(choice, script)


def _block(config: TrainConfig) -> int:
    """Returns the number of latent frames per block of the streams."""
    method = _method(config)
    if method.policy == TEACHER:
        return 1
    whole = Script((Segment("", 0),), config.samples.frames)
    return _policy(method, whole).block


def _scripts(config: TrainConfig, block: int, rate: float) -> tuple[Script, ...]:
    """Returns the scripts of the videos, all of one length."""
    stage, samples = build.find_stage(config), config.samples
    frames = samples.frames
    if _method(config).policy == TEACHER:
        frames = min(frames, stage.sample_frames(config))
    frames = max(1, round(frames / block)) * block
    if samples.prompts:
        return tuple(_parse(text, block, frames, rate) for text in samples.prompts)
    middle = frames // 2 // block * block
    is_switched = stage.sample_switches(config) and middle > 0
    texts = kinds.find_kind(config.data).first_texts(config.data, samples.num)
    return tuple(
        Script((Segment(first, 0), Segment(second, middle))[: 1 + is_switched], frames)
        for first, second in texts
    )


def _parse(text: str, block: int, frames: int, rate: float) -> Script:
    """Returns an inline script; segments without a duration share the frames."""
    seconds = frames / rate / (text.count("|") + 1)
    try:
        return prompts.parse_inline(text, Timing(block, frames, seconds, rate=rate))
    except UserError as error:
        raise UserError(f"config.samples.prompts, {text!r}: {error}") from error
