from collections import Counter

import numpy as np

from anchor_jax.tiny_world import clips as world_clips
from anchor_jax.tiny_world import data as world_data
from anchor_jax.tiny_world import events, scene


def _kind(before, after):
    several = len(scene.changed(before.first, after.first)) > 1
    return "any" if several else events.event(before, after)


def test_streams_begin_with_one_object_or_two_and_never_with_nothing():
    rng = np.random.default_rng(0)
    drawn = [world_clips.stream_scenes(rng) for _ in range(1000)]

    kinds = Counter(_kind(*two) for two in drawn)

    assert set(kinds) == {*events.EVENTS, "any"} - {"return"}
    assert 250 < kinds["any"] < 350
    assert not any(before.hidden or not before.named for before, _ in drawn)
    assert 50 < sum(before.second is not None for before, _ in drawn) < 150


def test_motions_turn_around_more_often_than_by_chance():
    rng = np.random.default_rng(1)
    before = events.Scene(scene.Attributes("red", "square", "left", "white"))
    drawn = [world_data.follow(rng, before, "motion") for _ in range(400)]

    assert {events.event(before, after) for after in drawn} == {"motion"}
    assert not any(scene.is_held_out(after.first) for after in drawn)
    turned = [after.first.motion == "right" for after in drawn]
    assert 0.5 < np.mean(turned) < 0.75


def test_a_held_out_reversal_is_not_drawn():
    rng = np.random.default_rng(2)
    every = [events.Scene(one) for one in scene.all_attributes(False)]
    turns = [world_data.follow(rng, before, "motion") for before in every * 5]

    assert not any(scene.is_held_out(after.first) for after in turns)
