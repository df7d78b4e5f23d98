"""The interfaces of metrics, trials and ablations."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from anchor_jax.streaming.types import StreamSetup
from anchor_jax.weights.bundle import Bundle

Row = dict[str, float]
"""The numbers of one video, by name; a number that does not apply is left out."""
Observe = Callable[[np.ndarray, Sequence[str]], None]
"""A function of generated videos and their prompts, called like a `Metric`."""


class Metric(Protocol):
    """Measures videos without the model that made them."""

    def __call__(self, pixels: np.ndarray, prompts: Sequence[str]) -> list[Row]:
        """Returns a row of numbers for each video.

        Args:
          pixels: uint8 [video, frame, height, width, 3].
          prompts: the prompt of each video; successive prompts of a video
            are joined by " | ".

        Raises:
          UserError: The videos cannot be measured.
        """


class Division:
    """How the batches of a trial are divided among the processes of a job.

    Process i of n generates the batches i, i + n, i + 2n, ... All processes draw the
    same prompts for all batches, so a batch does not depend on n. A trial that does not
    use the division generates everything in every process.

    Attributes:
      is_used: whether the trial uses the division.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
    ):
        """Initializes.

        Args:
          index: number of this process.
          count: number of processes.
          gather: returns the JSON value that each process calls it with, by number.
        """
        self._index, self._count, self._gather = index, count, gather
        self.is_used = False

    def has(self, batch: int) -> bool:
        """Returns whether this process generates a batch, by its number from 0."""
        self.is_used = True
        return batch % self._count == self._index

    def join(self, batches: Sequence[Any]) -> list[Any]:
        """Returns the values of all batches, in order.

        Args:
          batches: a JSON value for each batch of this process.
        """
        found = self._gather(list(batches))
        total = sum(map(len, found))
        return [found[n % self._count][n // self._count] for n in range(total)]


@dataclasses.dataclass(frozen=True)
class TrialSizes:
    """The number of videos that a trial generates.

    Attributes:
      count: number of videos.
      batch: number of videos that are generated together.
      blocks: blocks per segment.
      seed: random seed of prompts and noise.
      negative_prompt: negative prompt of the guidance.
      division: the division of the batches among processes.
    """

    count: int
    batch: int
    blocks: int
    seed: int
    negative_prompt: str = ""
    division: Division = dataclasses.field(default_factory=Division, compare=False)


class Trial(Protocol):
    """Generates videos of its own prompts, and scores them.

    Attributes:
      takes_clips: whether a policy that denoises whole clips can make its videos.
      clip_frames: latent frames of such a clip.
    """

    takes_clips: bool
    clip_frames: int

    def segments(self, blocks: int, is_clip: bool) -> tuple[int, ...]:
        """Returns the length of each segment of the longest video, in blocks."""

    def run(
        self,
        bundle: Bundle,
        setup: StreamSetup,
        sizes: TrialSizes,
        is_clip: bool,
        observe: Observe,
    ) -> Mapping[str, Any]:
        """Returns the scores as JSON values.

        Args:
          bundle: the weights.
          setup: the static setup of the streams.
          sizes: number of videos.
          is_clip: whether the policy denoises whole clips.
          observe: called with every generated video.
        """

    def table(self, result: Mapping[str, Any]) -> str:
        """Returns the scores as text."""


class Comparison(Protocol):
    """An ablation that is ready to run."""

    def identity(self) -> Mapping[str, Any]:
        """Returns the sizes that an arm's numbers depend on."""

    def arms(self, names: Sequence[str]) -> list[str]:
        """Returns the named arms, or all. Raises UserError if a name is unknown."""

    def run(self, names: Sequence[str]) -> None:
        """Measures arms, and writes their table."""


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Arms that differ in one part of a method.

    Attributes:
      make_trial: function that makes the sizes of a comparison.
      make_comparison: function that makes a comparison.
    """

    make_trial: Callable[..., Any]
    make_comparison: Callable[..., Comparison]
