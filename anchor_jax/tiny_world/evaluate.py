"""Match rates of generated tiny-world videos, for whole clips and after a switch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from anchor_jax import interrupts
from anchor_jax.evaluation.protocol import Observe
from anchor_jax.streaming import stream
from anchor_jax.streaming.types import PromptChange, StreamSetup
from anchor_jax.tiny_world import codec as codecs
from anchor_jax.tiny_world import scene, score

CLIP_FRAMES = 6
"""Latent frames of a single-prompt clip, as in the training of the shipped teacher."""

SWITCH_KINDS = (*scene.KINDS, "any")
CRITERIA = ("color", "background", "shape", "shape_iou", "motion", "steady", "smooth")


@dataclasses.dataclass(frozen=True)
class MatchTrial:
    """The number of videos to score, and the length of their segments in blocks.

    `negative_prompt` is the negative prompt of the guidance, if the setup has guidance.
    `observe` is called with every generated video and its prompts.
    """

    count: int = 240
    batch: int = 40
    segments: tuple[int, ...] = (5, 5)
    seed: int = 1
    negative_prompt: str = ""
    observe: Observe = dataclasses.field(
        default=lambda pixels, prompts: None, compare=False
    )


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
    wanted, videos = [], []
    for number in tqdm(range(0, trial.count, trial.batch), desc="clips"):
        batch = [scene.sample_attributes(rng, True) for _ in range(trial.batch)]
        texts = [[scene.caption(one) for one in batch]]
        videos += list(_generate(bundle, setup, trial, texts, number))
        wanted += batch
    wanted = wanted[: trial.count]
    frames = videos[0].shape[0]
    return {
        "held_out": _rows(score.score(videos, wanted)),
        "mismatched": _rows(score.mismatch_control(rng, videos)),
        "ceiling": _rows(ceiling(bundle, trial, frames)),
        "pixel_frames": frames,
    }


def score_switches(bundle, setup: StreamSetup, trial: MatchTrial) -> dict:
    """Returns match rates before and after one switch to a held-out caption.

    Switches of one attribute and of several alternate.
    """
    rng = np.random.default_rng(trial.seed)
    cut = scene.latent_to_pixel_frames(trial.segments[0] * setup.policy.block)
    before, after, first, second, kinds = [], [], [], [], []
    for number in tqdm(range(0, trial.count, trial.batch), desc="switches"):
        new = [scene.sample_attributes(rng, True) for _ in range(trial.batch)]
        kind = [SWITCH_KINDS[i % len(SWITCH_KINDS)] for i in range(trial.batch)]
        old = [
            scene.switch_attributes(rng, one, k)
            for one, k in zip(new, kind, strict=True)
        ]
        texts = [[scene.caption(one) for one in group] for group in (old, new)]
        videos = _generate(bundle, setup, trial, texts, number)
        before, after, kinds = before + old, after + new, kinds + kind
        first += list(videos[:, :cut])
        second += list(videos[:, cut:])
    before, after, kinds = (rows[: trial.count] for rows in (before, after, kinds))
    measured = score.measure_all(second, phase=cut)
    result = {
        "before_switch": _rows(score.score(first, before)),
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
