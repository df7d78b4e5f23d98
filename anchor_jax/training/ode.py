"""Trajectories of a bidirectional teacher: its ways from noise to clips, on disk."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from anchor_jax import flow, interrupts
from anchor_jax.cache import policies
from anchor_jax.config import from_config
from anchor_jax.errors import UserError
from anchor_jax.io import expand
from anchor_jax.streaming import stream
from anchor_jax.streaming.loop import Euler
from anchor_jax.streaming.types import BlockNoise, StreamSetup
from anchor_jax.training import files
from anchor_jax.training.data import sources
from anchor_jax.training.data.digests import digest
from anchor_jax.training.data.kinds import DataConfig
from anchor_jax.training.data.trajectories import TrajectoryWriter
from anchor_jax.wan import kernels
from anchor_jax.wan.spec import WAN_2_1
from anchor_jax.weights.bundle import Bundle

STORED = 4
"""States of each trajectory that have noise; the clean one comes last."""
_STOPPING = "stopping after these clips; press Ctrl-C again to end at once"


@dataclasses.dataclass(frozen=True)
class TrajectoryConfig:
    """The fields of a config of `anchor-jax trajectories`.

    Attributes:
      weights: the teacher's: a folder of ported weights, or of a training.
      data: prompts: `world_prompts`, or `prompts` from files.
      count: trajectories in all.
      batch: videos at once; part of what the numbers depend on.
      frames: latent frames.
      steps: of Euler's method, at even noise levels before the shift, whatever the
        teacher's own sampler has; a multiple of 4.
      shift: moves noise levels towards noise.
      guidance: u + guidance (c - u).
      negative_prompt: u.
      seed: of the noise.
      size: pixels, such as "480x832"; without a value the weights' own.
      dtype: of activations; without a value the weights' own.
      attention: a kernel, or "auto".
      out: folder.
    """

    weights: str = "tiny"
    data: DataConfig = DataConfig()
    count: int = 1000
    batch: int = 8
    frames: int = WAN_2_1.clip_frames
    steps: int = 48
    shift: float = 5.0
    guidance: float = 6.0
    negative_prompt: str = ""
    seed: int = 0
    size: str | None = None
    dtype: str | None = None
    attention: str = "auto"
    out: str = "data/trajectories"


def read_config(config) -> TrajectoryConfig:
    """Returns the config with every field of the type that it must have.

    Raises:
      UserError: A field is missing, unknown or of another type or range.
    """
    read = from_config(TrajectoryConfig, config, "config")
    for name in ("count", "batch", "frames"):
        if getattr(read, name) < 1:
            raise UserError(f"config.{name}={getattr(read, name)}: expected 1 or more")
    if read.steps < STORED or read.steps % STORED:
        raise UserError(
            f"config.steps={read.steps}: expected a multiple of {STORED}, such as 48:"
            " every quarter a state is stored"
        )
    if not 0 < read.shift < float("inf") or not 0 <= read.guidance < float("inf"):
        raise UserError(
            f"config.shift={read.shift}, config.guidance={read.guidance}: expected a"
            " shift above 0, and a guidance of 0 or more; 1 is none"
        )
    return read


def make_setup(config: TrajectoryConfig, bundle: Bundle) -> StreamSetup:
    """Returns the teacher's sampler: whole clips, Euler, guidance.

    Source: training/README.md, "Trajectories".
    """
    model = bundle.model
    return StreamSetup(
        model=model,
        grid=bundle.grid,
        policy=policies.whole_clip(config.frames),
        levels=flow.even_levels(config.steps, config.shift),
        solver=Euler(),
        guidance=float(config.guidance),
        kernel=kernels.named(config.attention, model.dtype, model.head_dim),
    )


def trajectories(
    bundle: Bundle,
    setup: StreamSetup,
    texts: Sequence[str],
    numbers: Sequence[int],
    seed: int,
    negative_prompt: str = "",
) -> np.ndarray:
    """Returns states, noisy to clean.

    They are [video, STORED + 1, frame, height, width, channel]: those that enter
    every quarter of the steps, and the last one. A video's noise depends on the seed
    and its number alone.
    """
    every = [*texts, *[negative_prompt] * (len(texts) * (setup.copies - 1))]
    embedding = bundle.encode_prompts(every)
    context = stream.project(bundle.variables, embedding, setup=setup)
    noise = _noise(jax.random.key(seed), jnp.asarray(numbers), setup)
    state = stream.start(context, setup=setup)
    _, block = stream.step(bundle.variables, state, noise, setup=setup)
    quarter = len(setup.levels) // STORED
    noisy = np.asarray(block.passes.noisy[::quarter])
    states = np.concatenate([noisy, np.asarray(block.latents)[None]])
    return np.moveaxis(states, 0, 1)


def _noise(key: jax.Array, numbers: jax.Array, setup: StreamSetup) -> BlockNoise:
    grid, dtype = setup.grid, setup.solver.dtype(setup.model.dtype)
    shape = (setup.policy.block, grid.height, grid.width, setup.model.latent_channels)
    initial = jax.vmap(
        lambda number: jax.random.normal(jax.random.fold_in(key, number), shape, dtype)
    )(numbers)
    # Euler's method draws nothing on the way.
    fresh = jnp.zeros((len(setup.levels) - 1, *initial.shape), dtype)
    return BlockNoise(initial=initial, fresh=fresh)


def write(
    config: TrajectoryConfig, bundle: Bundle, process: int, processes: int
) -> tuple[int, int]:
    """Writes this process's trajectories that are missing.

    Returns how many it wrote, and how many it did not: SIGTERM, or Ctrl-C once, ends it
    after the clips that are under way.

    Raises:
      UserError: The folder holds trajectories of another kind, or a file is wrong.
    """
    folder = files.make_folder(config.out)
    setup = make_setup(config, bundle)
    grid, channels = bundle.grid, bundle.model.latent_channels
    shape = (STORED + 1, config.frames, grid.height, grid.width, channels)
    inputs = _inputs(config, bundle, setup)
    writer = TrajectoryWriter(folder, process, processes, shape, inputs=inputs)
    with contextlib.closing(writer):
        texts = sources.open_texts(config.data, folder)
        return _write(config, bundle, setup, writer, texts, (process, processes))


def _write(config, bundle, setup, writer, texts, share: tuple[int, int]):
    missing, written, began = writer.remaining(config.count), 0, []

    def since() -> float:
        return began[0] if began else time.monotonic()

    with (
        interrupts.listening(),
        interrupts.patient(_STOPPING, since),
        _bar(config, writer, *share, missing) as bar,
    ):
        for first in range(0, len(missing), config.batch):
            numbers = missing[first : first + config.batch]
            # Whole batches, for one program.
            filled = [*numbers, *[numbers[-1]] * (config.batch - len(numbers))]
            chosen = [texts(number)[0] for number in filled]
            states = trajectories(
                bundle, setup, chosen, filled, config.seed, config.negative_prompt
            )
            for number, state, text in zip(numbers, states, chosen, strict=False):
                writer.add(number, state, text)
            written += len(numbers)
            bar.update(len(numbers))
            if not began:  # The first clips have compiled; they would be lost now.
                began.append(time.monotonic())
            if interrupts.asked():
                break
        writer.flush()
    return written, len(missing) - written


def _inputs(config: TrajectoryConfig, bundle: Bundle, setup: StreamSetup) -> dict:
    """Returns what the examples depend on."""
    kept = dataclasses.asdict(config)
    for name in ("weights", "out", "count", "attention"):
        del kept[name]
    kept["data"] = _prompts_of(config.data)
    quarter = len(setup.levels) // STORED
    sigma = [round(float(one), 7) for one in setup.levels.sigma[::quarter]]
    return {**kept, "weights": bundle.digest, "sigma": [*sigma, 0.0]}


def _prompts_of(data: DataConfig) -> dict:
    """Returns what the prompts depend on: of files their content, not their place."""
    hashes = [digest(expand(path)) for path in data.paths]
    return {"kind": data.kind, "seed": data.seed, "files": hashes}


@contextlib.contextmanager
def _bar(config, writer, process: int, processes: int, missing) -> Iterator[tqdm]:
    mine = len(range(process, config.count, processes))
    with tqdm(total=mine, initial=mine - len(missing), unit="clip") as bar:
        bar.set_description("trajectories")
        try:
            yield bar
        except BaseException:
            writer.flush()  # What is done is kept; what was under way is not.
            raise
