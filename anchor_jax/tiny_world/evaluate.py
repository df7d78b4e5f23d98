"""Match rates of generated tiny-world videos, for whole clips and after a switch."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from anchor_jax import interrupts, processes
from anchor_jax.evaluation.protocol import Division, Observe
from anchor_jax.streaming import stream
from anchor_jax.streaming.types import PromptChange, StreamSetup
from anchor_jax.tiny_world import codec as codecs
from anchor_jax.tiny_world import detect, scene, score

CLIP_FRAMES = 6
"""Latent frames of a single-prompt clip, as in the training of the shipped teacher."""

SWITCH_KINDS = (*scene.KINDS, "any")
CRITERIA = ("color", "background", "shape", "shape_iou", "motion", "steady", "smooth")


@dataclasses.dataclass(frozen=True)
class MatchTrial:
    """The number of videos to score, and the length of their segments in blocks.

    `negative_prompt` is the negative prompt of the guidance, if the setup has guidance.
    `observe` is called with every generated video and its prompts. `division` divides
    the batches among processes.
    """

    count: int = 240
    batch: int = 40
    segments: tuple[int, ...] = (5, 5)
    seed: int = 1
    negative_prompt: str = ""
    observe: Observe = dataclasses.field(
        default=lambda pixels, prompts: None, compare=False
    )
    division: Division = dataclasses.field(default_factory=Division, compare=False)


def generate(
    bundle, setup: StreamSetup, prompts, blocks, seed: int, negative_prompt: str = ""
) -> np.ndarray:
    """Returns videos with common switch frames, uint8 [batch, frame, 64, 64, 3].

    Args:
      bundle: the model with its text encoder and codec.
      setup: static setup of the stream.
      prompts: a list of `batch` prompts for each segment.
      blocks: length of each segment.
      seed: seed of the noise.
      negative_prompt: negative prompt of the guidance.
    """
    contexts = [_project(bundle, setup, texts, negative_prompt) for texts in prompts]
    starts = [
        setup.policy.block * sum(blocks[:number]) for number in range(len(blocks))
    ]
    changes = dict(zip(starts[1:], map(PromptChange, contexts[1:]), strict=True))
    latents = []
    for _, made, _ in stream.run(
        bundle.variables,
        stream.start(contexts[0], setup=setup),
        jax.random.key(seed),
        range(0, setup.policy.block * sum(blocks), setup.policy.block),
        changes,
        setup=setup,
    ):
        interrupts.check()
        latents.append(np.asarray(made))
    pixels = codecs.decode(bundle.codec_params, np.concatenate(latents, 1), first=True)
    return codecs.to_bytes(np.asarray(pixels))


def _project(bundle, setup: StreamSetup, texts, negative_prompt: str):
    texts = list(texts) + [negative_prompt] * (len(texts) * (setup.copies - 1))
    return stream.project(bundle.variables, bundle.encode_prompts(texts), setup=setup)


def _generate(bundle, setup: StreamSetup, trial: MatchTrial, texts, number: int):
    """Returns a batch of videos that starts at `number`, up to the trial's count.

    The last batch is full too, so that one program serves all, and is then cut.
    """
    seed, negative = trial.seed + number, trial.negative_prompt
    videos = generate(bundle, setup, texts, trial.segments, seed, negative)
    videos = videos[: trial.count - number]
    trial.observe(videos, joined(texts)[: len(videos)])
    return videos


def joined(texts) -> list[str]:
    """Returns the prompts of each video, from a list of prompts for each segment."""
    return [" | ".join(prompts) for prompts in zip(*texts, strict=True)]


def score_clips(bundle, setup: StreamSetup, trial: MatchTrial) -> dict:
    """Returns match rates of single-prompt clips on held-out captions.

    They come with a ceiling, from real clips through the codec, and with a control,
    from the same videos scored against other captions.
    """
    rng = np.random.default_rng(trial.seed)
    wanted, batches = [], []
    for place, number in _numbered(trial, "clips"):
        batch = [scene.sample_attributes(rng, True) for _ in range(trial.batch)]
        texts = [[scene.caption(one) for one in batch]]
        wanted += batch
        if trial.division.has(place):
            videos = _generate(bundle, setup, trial, texts, number)
            batches.append([videos.shape[1], _measured(videos)])
    wanted = wanted[: trial.count]
    joined = trial.division.join(batches)
    measured = _read(one for _, rows in joined for one in rows)
    others = score.random_attributes(rng, len(measured))
    frames = joined[0][0]
    return {
        "held_out": _rows(score.score_measured(measured, wanted)),
        "mismatched": _rows(score.score_measured(measured, others)),
        "ceiling": _rows(ceiling(bundle, trial, frames)),
        "pixel_frames": frames,
    }


def score_switches(bundle, setup: StreamSetup, trial: MatchTrial) -> dict:
    """Returns match rates before and after one switch to a held-out caption.

    Switches of one attribute and of several alternate.
    """
    rng = np.random.default_rng(trial.seed)
    cut = scene.latent_to_pixel_frames(trial.segments[0] * setup.policy.block)
    before, after, batches, kinds = [], [], [], []
    for place, number in _numbered(trial, "switches"):
        new = [scene.sample_attributes(rng, True) for _ in range(trial.batch)]
        kind = [SWITCH_KINDS[i % len(SWITCH_KINDS)] for i in range(trial.batch)]
        old = [
            scene.switch_attributes(rng, one, k)
            for one, k in zip(new, kind, strict=True)
        ]
        texts = [[scene.caption(one) for one in group] for group in (old, new)]
        before, after, kinds = before + old, after + new, kinds + kind
        if trial.division.has(place):
            videos = _generate(bundle, setup, trial, texts, number)
            both = _measured(videos[:, :cut]), _measured(videos[:, cut:], cut)
            batches.append(both)
    before, after, kinds = (rows[: trial.count] for rows in (before, after, kinds))
    joined = trial.division.join(batches)
    first = _read(one for rows, _ in joined for one in rows)
    measured = _read(one for _, rows in joined for one in rows)
    result = {
        "before_switch": _rows(score.score_measured(first, before)),
        "after_switch": _rows(score.score_measured(measured, after)),
        "after_switch_old_prompt": _rows(score.score_measured(measured, before)),
        "mismatched": _rows(
            score.score_measured(measured, score.random_attributes(rng, len(measured)))
        ),
    }
    for kind in SWITCH_KINDS:
        rows = [i for i, k in enumerate(kinds) if k == kind]
        if not rows:
            continue
        picked = score.score_measured(
            [measured[i] for i in rows], [after[i] for i in rows]
        )
        result[f"after_switch_of_{kind}"] = _rows(picked)
    return result


def _numbered(trial: MatchTrial, what: str):
    """Yields the number of each batch and of its first video, with a progress bar."""
    hidden = not processes.is_printing()
    firsts = range(0, trial.count, trial.batch)
    yield from enumerate(tqdm(firsts, desc=what, disable=hidden))


def _measured(videos, phase: int = 0) -> list[dict]:
    """Returns the contents of clips as JSON values; `phase` as in `detect.measure`."""
    return [dataclasses.asdict(one) for one in score.measure_all(videos, phase)]


def _read(found: Iterable[dict]) -> list[detect.Measured]:
    """Returns the contents of clips from JSON values."""
    return [
        detect.Measured(**{**one, "displacement": tuple(one["displacement"])})
        for one in found
    ]


def ceiling(bundle, trial: MatchTrial, pixel_frames: int) -> dict:
    """Returns the rates of real clips after the codec."""
    rng = np.random.default_rng(trial.seed + 1)
    coded = functools.partial(roundtrip, bundle)
    return score.ceiling(rng, coded, min(trial.count, 200), pixel_frames, True)


def roundtrip(bundle, video: np.ndarray) -> np.ndarray:
    """Returns a video, uint8 [F, 64, 64, 3], after the codec."""
    pixels = jnp.asarray(codecs.to_unit(video)[None])
    latents = codecs.encode(bundle.codec_params, pixels)
    decoded = codecs.decode(bundle.codec_params, latents, first=True)
    return codecs.to_bytes(np.asarray(decoded))[0]


def _rows(rates: dict) -> dict:
    return {
        name: {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in dataclasses.asdict(rate).items()
        }
        for name, rate in rates.items()
    }


def table(result: dict) -> str:
    """Returns the rates as text, one line per group of clips."""
    lines = [f"{'':26}" + "".join(f"{name:>12}" for name in CRITERIA) + "     n"]
    for group, rates in result.items():
        if not isinstance(rates, dict):
            continue
        cells = "".join(f"{rates[name]['rate']:12.3f}" for name in CRITERIA)
        lines.append(f"{group:26}{cells}{rates['color']['n']:6d}")
    return "\n".join(lines)
