"""Trajectories of a bidirectional teacher from noise to clips, on disk."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from anchor_jax import flow, interrupts, shares
from anchor_jax import processes as jobs
from anchor_jax.cache import policies
from anchor_jax.config import from_config
from anchor_jax.errors import UserError
from anchor_jax.io import place
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
"""Number of noisy states per trajectory. The clean state comes last."""
_STOPPING = "stopping after these clips; press Ctrl-C again to stop at once"


@dataclasses.dataclass(frozen=True)
class TrajectoryConfig:
    """The fields of a config of `anchor-jax trajectories`.

    Attributes:
      weights: weights of the teacher: a folder of ported weights, or of a training.
      data: the prompts: kind `world_prompts`, or `prompts` from files.
      count: total number of trajectories.
      batch: videos per program. The exact values depend on it.
      frames: latent frames per video.
      steps: number of Euler steps, a multiple of 4. Noise levels are even before the
        shift, also if the teacher's own sampler uses others.
      shift: shift of the noise levels towards noise.
      guidance: guidance scale in u + guidance (c - u).
      negative_prompt: prompt of u.
      seed: seed of the noise.
      size: height and width in pixels, such as "480x832". None takes the size of the
        weights.
      dtype: type of activations. None takes the type that the weights name.
      attention: a kernel, or "auto".
      out: folder of the trajectories.
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
    """Returns the config with every field converted to its type.

    Raises:
      UserError: A field is missing, unknown or of another type or range.
    """
    read = from_config(TrajectoryConfig, config, "config")
    for name in ("count", "batch", "frames"):
        if getattr(read, name) < 1:
            raise UserError(f"config.{name}={getattr(read, name)}: must be at least 1")
    if read.steps < STORED or read.steps % STORED:
        raise UserError(
            f"config.steps={read.steps}: must be a multiple of {STORED}, such as 48:"
            " a state is stored every quarter of the steps"
        )
    if not 0 < read.shift < float("inf") or not 0 <= read.guidance < float("inf"):
        raise UserError(
            f"config.shift={read.shift}, config.guidance={read.guidance}: the"
            " shift must be above 0 and the guidance at least 0; 1 turns guidance off"
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
    """Returns states from noisy to clean.

    They are [video, STORED + 1, frame, height, width, channel]: the state before each
    quarter of the steps, and the last one. A video's noise depends only on the seed and
    the video's number.
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
    # Euler's method draws no noise between steps.
    fresh = jnp.zeros((len(setup.levels) - 1, *initial.shape), dtype)
    return BlockNoise(initial=initial, fresh=fresh)


def write(
    config: TrajectoryConfig, bundle: Bundle, process: int, processes: int
) -> tuple[int, int]:
    """Writes the missing trajectories of this process.

    Returns the numbers of trajectories written and still missing. SIGTERM or one Ctrl-C
    stops it after the current clips. In a job it then waits for the other processes.

    Raises:
      UserError: The folder holds other trajectories, or a file is wrong.
      shares.Unfinished: Another process of the job was lost or has failed, and its
        trajectories are missing.
    """
    folder = files.make_folder(config.out)
    setup = make_setup(config, bundle)
    grid, channels = bundle.grid, bundle.model.latent_channels
    shape = (STORED + 1, config.frames, grid.height, grid.width, channels)
    inputs = _inputs(config, bundle, setup)
    shares.agree({f"config.{name}": value for name, value in inputs.items()})
    writer = TrajectoryWriter(folder, process, processes, shape, inputs=inputs)
    with contextlib.closing(writer):
        texts = sources.open_texts(config.data, folder)
        with shares.working(writer.lease, "config.out") as share:
            written, missing = _write(
                config, bundle, setup, writer, texts, (process, processes)
            )
            if not missing and jobs.is_joined():
                _await_others(config, writer, share)
    return written, missing


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
            # Batches are always full, so one program is compiled.
            filled = [*numbers, *[numbers[-1]] * (config.batch - len(numbers))]
            chosen = [texts(number)[0] for number in filled]
            states = trajectories(
                bundle, setup, chosen, filled, config.seed, config.negative_prompt
            )
            for number, state, text in zip(numbers, states, chosen, strict=False):
                writer.add(number, state, text)
            written += len(numbers)
            bar.update(len(numbers))
            if not began:  # The slow first clips (compilation) must not be lost.
                began.append(time.monotonic())
            if interrupts.stop_requested():
                break
        writer.flush()
    return written, len(missing) - written


def _await_others(
    config: TrajectoryConfig, writer: TrajectoryWriter, share: shares.Share
) -> None:
    """Waits for the other processes of a job.

    Raises:
      shares.Unfinished: Trajectories are missing at the end.
    """
    hidden = None if jobs.is_printing() else True
    with tqdm(desc="waiting for other processes", disable=hidden) as bar:
        share.await_others(lambda others: bar.set_postfix(left=others))
    absent = sorted({*range(config.count)} - writer.done())
    if absent:
        raise shares.unfinished(absent, config.count, "trajectories")


def _inputs(config: TrajectoryConfig, bundle: Bundle, setup: StreamSetup) -> dict:
    """Returns everything that the examples depend on."""
    kept = dataclasses.asdict(config)
    for name in ("weights", "out", "count", "attention"):
        del kept[name]
    kept["data"] = _prompts_of(config.data)
    quarter = len(setup.levels) // STORED
    sigma = [round(float(one), 7) for one in setup.levels.sigma[::quarter]]
    return {**kept, "weights": bundle.digest, "sigma": [*sigma, 0.0]}


def _prompts_of(data: DataConfig) -> dict:
    """Returns everything that the prompts depend on: files by content, not by path."""
    hashes = [digest(place(path)) for path in data.paths]
    return {"kind": data.kind, "seed": data.seed, "files": hashes}


@contextlib.contextmanager
def _bar(config, writer, process: int, processes: int, missing) -> Iterator[tqdm]:
    mine = len(range(process, config.count, processes))
    hidden = None if jobs.is_printing() else True
    done = mine - len(missing)
    with tqdm(total=mine, initial=done, unit="clip", disable=hidden) as bar:
        bar.set_description("trajectories")
        try:
            yield bar
        except BaseException:
            writer.flush()  # Finished examples are kept; unfinished ones are lost.
            raise
