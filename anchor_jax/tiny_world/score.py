"""Scores videos of the tiny world against captions, with intervals and controls."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from anchor_jax.tiny_world import detect, scene


@dataclasses.dataclass(frozen=True)
class Rate:
    """A fraction of `n` clips, with its 95 % Wilson interval."""

    rate: float
    n: int
    low: float
    high: float


def wilson_interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Returns Wilson's score interval of a fraction, with both ends in [0, 1].

    Source: Wilson, Journal of the American Statistical Association 22 (1927).
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(
            f"got {successes} successes of n={n}; n must be above 0, and at least the"
            " successes"
        )
    share, spread = successes / n, z * z / n
    middle = share + spread / 2
    reach = z * np.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = (middle - reach) / (1 + spread), (middle + reach) / (1 + spread)
    return (
        float(low) if successes else 0.0,
        float(high) if successes < n else 1.0,
    )


def rate(flags: Sequence[bool]) -> Rate:
    """Returns the share of true flags."""
    low, high = wilson_interval(sum(flags), len(flags))
    return Rate(sum(flags) / len(flags), len(flags), low, high)


def measure_all(videos: Sequence[np.ndarray], phase: int = 0) -> list[detect.Measured]:
    """Returns the content of each clip; `phase` as in `detect.measure`."""
    return [detect.measure(video, phase) for video in videos]


def score_measured(
    measured: Sequence[detect.Measured], attributes: Sequence[scene.Attributes]
) -> dict[str, Rate]:
    """Returns the rate of each criterion of `detect.matches`."""
    if len(measured) != len(attributes):
        raise ValueError(
            f"{len(measured)} clips but {len(attributes)} attributes; pass one each"
        )
    results = [detect.matches(*pair) for pair in zip(measured, attributes, strict=True)]
    return {name: rate([one[name] for one in results]) for name in results[0]}


def score(
    videos: Sequence[np.ndarray],
    attributes: Sequence[scene.Attributes],
    phase: int = 0,
) -> dict[str, Rate]:
    """Returns the rate of each criterion of `detect.matches`.

    Args:
      videos: Clips, uint8 [F, 64, 64, 3] each.
      attributes: What each clip should show.
      phase: As in `detect.measure`.
    """
    return score_measured(measure_all(videos, phase), attributes)


def random_attributes(rng: np.random.Generator, count: int) -> list[scene.Attributes]:
    """Returns uniform draws from both splits: captions for a mismatch control.

    A detector without a leak then scores 1/4 for colour and background, 1/3 for
    shape and 1/5 for motion on videos that show their own captions.
    """
    every = scene.all_attributes(False) + scene.all_attributes(True)
    return [every[number] for number in rng.integers(len(every), size=count)]


def mismatch_control(
    rng: np.random.Generator, videos: Sequence[np.ndarray], draws: int = 1
) -> dict[str, Rate]:
    """Returns the rates of videos scored against `draws` random captions each.

    With several draws the intervals are too narrow, because draws share their videos.
    """
    measured = measure_all(videos) * draws
    return score_measured(measured, random_attributes(rng, len(measured)))


def ceiling(
    rng: np.random.Generator,
    roundtrip: Callable[[np.ndarray], np.ndarray],
    count: int,
    pixel_frames: int,
    held_out: bool,
) -> dict[str, Rate]:
    """Returns the rates of rendered clips after a codec, which no model can beat.

    Args:
      rng: Random generator of captions, places and sizes.
      roundtrip: Function that encodes and decodes one clip, uint8 [F, 64, 64, 3].
      count: Number of clips.
      pixel_frames: Length of a clip.
      held_out: Split of the captions.
    """
    attributes = [scene.sample_attributes(rng, held_out) for _ in range(count)]
    videos = [
        roundtrip(scene.sample_track(rng, [(one, pixel_frames)]).render())
        for one in attributes
    ]
    return score(videos, attributes)
