from collections import Counter

import numpy as np

from anchor_jax.training import world_clips
from anchor_jax.world import events


def test_streams_begin_with_one_object_or_two_and_never_with_nothing():
    rng = np.random.default_rng(0)
    drawn = [world_clips.stream_scenes(rng) for _ in range(1000)]

    kinds = Counter(events.event(*two) for two in drawn)

    assert set(kinds) == set(events.EVENTS) - {"return"}
    assert not any(before.hidden or not before.named for before, _ in drawn)
    assert 50 < sum(before.second is not None for before, _ in drawn) < 150
