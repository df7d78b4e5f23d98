"""The trials of the tiny world for `anchor-jax score`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from anchor_jax.evaluation.protocol import Observe, TrialSizes
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.tiny_world import evaluate, event_streams
from anchor_jax.weights.bundle import Bundle

_Score = Callable[[Bundle, StreamSetup, evaluate.MatchTrial], dict]


@dataclasses.dataclass(frozen=True)
class WorldTrial:
    """A trial as `anchor_jax.evaluation.protocol.Trial`.

    Attributes:
      score: function that scores streams.
      table: function that formats the scores.
      lengths: length of each segment in blocks. None takes `count` segments of the
        requested length.
      count: number of segments, where `lengths` is None.
      score_clips: function that scores whole clips, or None.
    """

    score: _Score
    table: Callable[[Mapping[str, Any]], str]
    lengths: tuple[int, ...] | None = None
    count: int = 2
    score_clips: _Score | None = None
    clip_frames = evaluate.CLIP_FRAMES

    @property
    def takes_clips(self) -> bool:
        """Whether whole clips can be scored."""
        return self.score_clips is not None

    def segments(self, blocks: int, is_clip: bool) -> tuple[int, ...]:
        """Returns the length of each segment, in blocks."""
        if is_clip:
            return (1,)
        return self.lengths or (blocks,) * self.count

    def run(
        self,
        bundle: Bundle,
        setup: StreamSetup,
        sizes: TrialSizes,
        is_clip: bool,
        observe: Observe,
    ) -> dict[str, Any]:
        """Returns the scores."""
        segments = self.segments(sizes.blocks, is_clip)
        trial = evaluate.MatchTrial(
            sizes.count,
            sizes.batch,
            segments,
            sizes.seed,
            sizes.negative_prompt,
            observe,
            sizes.division,
        )
        score = self.score_clips if is_clip else self.score
        return score(bundle, setup, trial)


SWITCH = WorldTrial(
    evaluate.score_switches, evaluate.table, score_clips=evaluate.score_clips
)
EVENTS = WorldTrial(event_streams.score_events, event_streams.table, count=3)
MINUTE = WorldTrial(
    event_streams.score_long, event_streams.table, lengths=event_streams.MINUTE
)
