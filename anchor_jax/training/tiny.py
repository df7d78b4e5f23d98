"""Stages of the embedded tiny model: teacher, causal teacher, few-step student.

1. `teacher`: bidirectional flow matching on six latent frames.
2. `causal`: block-causal flow matching with teacher forcing, on windows laid out as
   a stream remembers them, prompt switches included.
3. `student`: regresses the guided causal teacher's ODE endpoints from the four noise
   levels of the few-step sampler, so that it needs no guidance.

The text encoder is trained with the first stage and frozen afterwards.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from anchor_jax import flow
from anchor_jax.bundle import TINY_TEXT as TEXT
from anchor_jax.errors import UserError
from anchor_jax.media import replacing, write_json
from anchor_jax.streaming.loop import Euler, approach, guide
from anchor_jax.training import world_data as data
from anchor_jax.training.fit import FitConfig, fit
from anchor_jax.training.fresh import init_params
from anchor_jax.wan import dit
from anchor_jax.wan.attention import (
    ContextKV,
    LayersKV,
    Spans,
    bidirectional,
    teacher_forcing,
)
from anchor_jax.wan.rope import rotary, rotate
from anchor_jax.wan.spec import TINY
from anchor_jax.wan.text import Umt5Encoder

CHANNELS = TINY.latent_channels
TEACHER_FRAMES = 6
SHIFT = 3.0
LEVELS = flow.few_step_levels((1000, 750, 500, 250), shift=5.0)
PAIR_STEPS = 8
_TF = teacher_forcing((data.BLOCK,) * data.BLOCKS)


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    """How much each stage trains; the defaults made the embedded weights."""

    seed: int = 0
    clips: int = 4096
    windows: int = 3072
    pairs: int = 960
    guidance: float = 2.5
    teacher: FitConfig = FitConfig(steps=1800, batch=32)
    causal: FitConfig = FitConfig(
        steps=1200, batch=8, learning_rate=1e-3, warmup=50, ema=0.995
    )
    student: FitConfig = FitConfig(
        steps=700, batch=8, learning_rate=7e-4, warmup=50, ema=0.995
    )

    def scaled(self, factor: float) -> "TinyConfig":
        """Returns the config with every stage's length and data multiplied."""

        def scale(fit_config: FitConfig) -> FitConfig:
            steps = max(2, round(fit_config.steps * factor))
            return dataclasses.replace(fit_config, steps=steps)

        return dataclasses.replace(
            self,
            clips=max(32, round(self.clips * min(1, factor))),
            windows=max(48, round(self.windows * min(1, factor))),
            pairs=max(48, round(self.pairs * min(1, factor))),
            teacher=scale(self.teacher),
            causal=scale(self.causal),
            student=scale(self.student),
        )


def encode_text(params, ids, mask) -> jax.Array:
    """Returns prompt embeddings [batch, text, dim], padded rows zero."""
    return Umt5Encoder(TEXT).apply({"params": params}, ids, mask)


def teacher_loss(params, batch, rng, frozen):
    """Returns the flow-matching loss of whole clips under bidirectional attention."""
    del frozen
    model = dit.WanDit(TINY)
    text = encode_text(params["text"], batch["ids"], batch["mask"])
    variables = {"params": params["generator"]}
    context = model.apply(variables, text, method="project")
    x0, sigma = batch["latents"], batch["sigma"]
    noise = jax.random.normal(rng, x0.shape)
    timestep = jnp.broadcast_to(1000 * sigma[:, None], x0.shape[:2])
    frames = x0.shape[1]
    noisy = flow.add_noise(x0, noise, sigma)
    predicted, _ = model.apply(
        variables,
        noisy,
        timestep,
        context,
        bidirectional(frames),
        jnp.arange(frames),
    )
    return jnp.mean(jnp.square(predicted - (noise - x0)))


def _block_contexts(params, text, batch) -> ContextKV:
    """Returns a context per block of the clean and the noisy half of each window."""
    ids, mask = batch["ids"], batch["mask"]
    flat = (x.reshape(-1, x.shape[-1]) for x in (ids, mask))
    embedding = encode_text(text, *flat)
    context = dit.WanDit(TINY).apply({"params": params}, embedding, method="project")
    pick = batch["prompt"] + 2 * jnp.arange(ids.shape[0])[:, None]
    return jax.tree.map(lambda x: x[:, pick.reshape(-1)], context)


def _forced(params, text, batch, noisy, sigma):
    """Returns the flow of every noisy block, each given the clean blocks before it."""
    context = _block_contexts(params, text, batch)
    times = jnp.repeat(1000 * sigma, data.BLOCK, axis=1)
    latents = jnp.concatenate([batch["latents"], noisy], axis=1)
    timestep = jnp.concatenate([jnp.zeros_like(times), times], axis=1)
    position = jnp.tile(batch["position"], 2)
    predicted, _ = dit.WanDit(TINY).apply(
        {"params": params}, latents, timestep, context, _TF, position
    )
    return predicted[:, noisy.shape[1] :]


def causal_loss(params, batch, rng, frozen):
    """Returns the flow-matching loss of blocks that see clean past blocks."""
    x0, sigma = batch["latents"], batch["sigma"]
    noise = jax.random.normal(rng, x0.shape)
    noisy = flow.add_noise(x0, noise, jnp.repeat(sigma, data.BLOCK, axis=1))
    predicted = _forced(params["generator"], frozen["text"], batch, noisy, sigma)
    error = jnp.mean(jnp.square(predicted - (noise - x0)), axis=(2, 3, 4))
    weight = jnp.repeat(batch["weight"], data.BLOCK, axis=1)
    return jnp.sum(error * weight) / jnp.sum(weight)


def student_loss(params, batch, rng, frozen):
    """Returns the distance of one-step x0 from the teacher's ODE endpoints."""
    del rng
    sigma = batch["sigma"]
    predicted = _forced(
        params["generator"], frozen["text"], batch, batch["noisy"], sigma
    )
    level = jnp.repeat(sigma, data.BLOCK, axis=1)
    x0 = flow.x0_from_flow(predicted, batch["noisy"], level)
    error = jnp.mean(jnp.square(x0 - batch["target"]), axis=(2, 3, 4))
    weight = jnp.repeat(batch["weight"], data.BLOCK, axis=1)
    return jnp.sum(error * weight) / jnp.sum(weight)


class Batches:
    """Batches of every stage as pure functions of the step."""

    def __init__(self, config: TinyConfig, tokenizer, codec):
        self.config, self.codec = config, codec
        self.ids, self.mask = tokenizer.encode(data.captions())

    def teacher(self, fit_config: FitConfig):
        clips = data.sample_clips(
            self.codec, self.config.seed, self.config.clips, TEACHER_FRAMES
        )

        def batch(step: int) -> dict:
            rng = np.random.default_rng((self.config.seed, 10, step))
            rows = rng.integers(len(clips.latents), size=fit_config.batch)
            words = data.pick_captions(rng, clips.attributes[rows], dropout=0.1)
            sigma = data.stratified(rng, (fit_config.batch,))
            return {
                "latents": data.roll(rng, clips.latents[rows]),
                "ids": self.ids[words],
                "mask": self.mask[words],
                "sigma": flow.shift_sigma(sigma, SHIFT).astype(np.float32),
            }

        return batch

    def windows(self) -> data.Windows:
        return data.sample_windows(self.codec, self.config.seed, self.config.windows)

    def window_batch(self, windows, rng, rows, layout: int, dropout: float) -> dict:
        """Returns latents, prompts, positions and loss weights of some windows."""
        both = np.stack([windows.before[rows], windows.after[rows]], axis=1)
        words = data.pick_captions(rng, both, dropout)
        return {
            "latents": windows.latents[rows],
            "ids": self.ids[words],
            "mask": self.mask[words],
            "position": np.asarray(
                (data.START, data.STEADY, data.JUNCTION)[layout], np.int32
            ),
            **_switch_arrays(windows.switch[rows]),
        }

    def causal(self, fit_config: FitConfig, windows: data.Windows):
        by_layout = [np.flatnonzero(windows.layout == i) for i in range(3)]

        def batch(step: int) -> dict:
            rng = np.random.default_rng((self.config.seed, 20, step))
            layout = int(rng.integers(3))
            rows = rng.choice(by_layout[layout], fit_config.batch)
            out = self.window_batch(windows, rng, rows, layout, dropout=0.1)
            sigma = data.stratified(rng, (fit_config.batch, data.BLOCKS))
            out["latents"] = data.roll(rng, out["latents"])
            out["sigma"] = flow.shift_sigma(sigma, SHIFT).astype(np.float32)
            return out

        return batch

    def student(self, fit_config: FitConfig, pairs: dict):
        """Returns batches of stored trajectories, a random level for every block."""
        by_layout = [np.flatnonzero(pairs["layout"] == i) for i in range(3)]
        sigmas = np.asarray(LEVELS.sigma, np.float32)

        def batch(step: int) -> dict:
            rng = np.random.default_rng((self.config.seed, 30, step))
            layout = int(rng.integers(3))
            rows = rng.choice(by_layout[layout], fit_config.batch)
            level = rng.integers(len(LEVELS), size=(fit_config.batch, data.BLOCKS))
            frame = np.repeat(level, data.BLOCK, axis=1)
            states = pairs["states"][rows]
            picked = np.take_along_axis(
                states, frame[:, None, :, None, None, None], axis=1
            )
            out = {k: pairs[k][rows] for k in ("latents", "ids", "mask", "prompt")}
            return out | {
                "weight": pairs["weight"][rows],
                "position": pairs["positions"][layout],
                "noisy": picked[:, 0].astype(np.float32),
                "target": states[:, -1].astype(np.float32),
                "sigma": sigmas[level],
            }

        return batch


def _switch_arrays(switch: np.ndarray) -> dict:
    """Returns which prompt each block of both halves takes, and loss weights.

    As a stream has it after a re-cache: the sink keeps the old prompt's keys, later
    clean blocks take the new one's. Noisy blocks between sink and switch have no
    such past and get no loss.
    """
    block = np.arange(data.BLOCKS)
    changed = switch[:, None] > 0
    half = (changed & (block >= 1)).astype(np.int32)
    skipped = (block >= 1) & (block < switch[:, None])
    return {
        "prompt": np.concatenate([half, half], axis=1),
        "weight": (~skipped).astype(np.float32),
    }


@functools.partial(jax.jit, static_argnames=("guidance",))
def guided_trajectory(params, text, batch, noise, guidance: float):
    """Returns the guided ODE's states at the student's levels, then its endpoint.

    [batch, level + 1, frame, ...]. Euler steps on the schedule of shift 5; every
    block is denoised given the clean blocks before it, whose keys are made once.
    """
    model, variables = dit.WanDit(TINY), {"params": params}
    empty = {**batch, "ids": batch["empty_ids"], "mask": batch["empty_mask"]}
    both = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], axis=1),
        _block_contexts(params, text, batch),
        _block_contexts(params, text, empty),
    )
    half = data.BLOCKS
    split = jax.tree.map(
        lambda x: x.reshape(x.shape[0], -1, 2, half, *x.shape[2:]), both
    )
    clean, noisy = (_half(split, i) for i in range(2))
    latents = jnp.concatenate([batch["latents"]] * 2)
    zeros = jnp.zeros(latents.shape[:2])
    spans = Spans(_TF.spans[:half])
    _, past = model.apply(variables, latents, zeros, clean, spans, batch["position"])
    turn = rotary(batch["position"], (4, 4), TINY.head_dim, TINY.rope_theta)
    past = LayersKV(k=rotate(past.k, turn), v=past.v)
    # Own frames come first among the keys here, the clean past after them.
    frames = half * data.BLOCK
    own_first = Spans(
        tuple(
            (first - frames, end - frames, _swapped(keys, frames))
            for first, end, keys in _TF.spans[half:]
        )
    )

    def denoise(x, timestep, carry):
        pair = jnp.concatenate([x, x])
        times = jnp.full(pair.shape[:2], timestep)
        predicted, _ = model.apply(
            variables, pair, times, noisy, own_first, batch["position"], None, past
        )
        return guide(predicted, guidance), carry

    levels = flow.even_levels(PAIR_STEPS, shift=5.0)
    x0, passes, _ = approach(denoise, noise, levels, Euler())
    keep = passes.noisy[:: PAIR_STEPS // len(LEVELS)]
    return jnp.concatenate([jnp.moveaxis(keep, 0, 1), x0[:, None]], axis=1)


def _half(split, number: int):
    def pick(x):
        return x[:, :, number].reshape(x.shape[0], -1, *x.shape[4:])

    return jax.tree.map(pick, split)


def _swapped(spans, frames: int):
    """Returns key spans after the two halves of the key frames change places."""
    return tuple(
        ((a + frames) % (2 * frames), (b - 1 + frames) % (2 * frames) + 1)
        for a, b in spans
    )


def make_pairs(
    config: TinyConfig, batches: Batches, params, windows, folder: pathlib.Path
) -> dict:
    """Returns stored guided trajectories of `config.pairs` windows, made once."""
    path = folder / "trajectories.npz"
    if path.exists():
        with np.load(path) as stored:
            return dict(stored)
    rng = np.random.default_rng((config.seed, 25))
    size, chunks = 16, []
    empty = len(batches.ids) - 1
    for number in tqdm(range(config.pairs // size), desc="trajectories"):
        layout = number % 3
        rows = rng.choice(np.flatnonzero(windows.layout == layout), size)
        batch = batches.window_batch(windows, rng, rows, layout, dropout=0.0)
        batch["latents"] = data.roll(rng, batch["latents"])
        batch["empty_ids"] = np.broadcast_to(batches.ids[empty], batch["ids"].shape)
        batch["empty_mask"] = np.broadcast_to(batches.mask[empty], batch["mask"].shape)
        noise = rng.standard_normal(batch["latents"].shape, dtype=np.float32)
        states = guided_trajectory(
            params["generator"], params["text"], batch, noise, config.guidance
        )
        kept = ("latents", "ids", "mask", "prompt", "weight")
        row = {name: batch[name] for name in kept}
        row["states"] = np.asarray(states, np.float16)
        row["layout"] = np.full(size, layout)
        chunks.append(row)
    pairs = {name: np.concatenate([c[name] for c in chunks]) for name in chunks[0]}
    layouts = (data.START, data.STEADY, data.JUNCTION)
    pairs["positions"] = np.asarray(layouts, np.int32)
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, **pairs)
    return pairs


STAGES = ("teacher", "causal", "student")


def check_config(config: TinyConfig, folder: pathlib.Path) -> None:
    """Raises unless the folder's run has this config, which a new one gets.

    Raises:
      UserError: The run in the folder has another config, or none that can be read.
    """
    path = folder / "config.json"
    given = json.loads(json.dumps(dataclasses.asdict(config)))
    if not path.exists():
        write_json(path, given)
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}), so the run in {folder} cannot go on;"
            " choose another --out"
        ) from error
    if stored == given:
        return
    stored = stored if isinstance(stored, dict) else {}
    changed = [name for name in given if stored.get(name) != given[name]]
    raise UserError(
        f"{folder} holds a run of another config: {', '.join(changed) or 'fields'}"
        " differ; choose another --out, or the seed and scale that it began with"
    )


def train(config: TinyConfig, tokenizer, folder: pathlib.Path, until: str = STAGES[-1]):
    """Runs the stages in order, resuming where `folder` left off.

    Returns the parameters of the last stage: `generator`, `text` and `codec`.

    Args:
      config: how much to train.
      tokenizer: of the world's words.
      folder: checkpoints and logs, a folder for each stage.
      until: the last stage to run.

    Raises:
      UserError: The folder holds a run of another config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_config(config, folder)
    codec = data.fit_codec(config.seed, CHANNELS)
    batches = Batches(config, tokenizer, codec)
    stages = STAGES[: STAGES.index(until) + 1]
    params = fit(
        teacher_loss,
        init_params(config.seed),
        batches.teacher(config.teacher),
        config.teacher,
        folder / "teacher",
    )
    text = {"text": params["text"]}
    params = {"generator": params["generator"]}
    windows = batches.windows() if "causal" in stages else None
    if "causal" in stages:
        batch = batches.causal(config.causal, windows)
        params = fit(causal_loss, params, batch, config.causal, folder / "causal", text)
    if "student" in stages:
        pairs = make_pairs(config, batches, params | text, windows, folder)
        batch = batches.student(config.student, pairs)
        params = fit(
            student_loss, params, batch, config.student, folder / "student", text
        )
    return params | text | {"codec": codec}
