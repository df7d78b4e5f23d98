"""RoPE rules alone: one pass of 3 frames with a sink of 3 and a ring of 6."""

import dataclasses

import jax.numpy as jnp
import pytest

from anchor_jax.cache.policies import POLICIES, Junction, Policy
from anchor_jax.cache.positions import Absolute, Bounded, Ranked, Relative
from anchor_jax.cache.types import empty_index


def positions(rule, start, ring, cursor=0):
    """Query, own, sink and local positions; `ring` holds the frames by slot."""
    filled = len(ring)
    index = empty_index(9).replace(filled=jnp.int32(filled), cursor=jnp.int32(cursor))
    ring = jnp.asarray(ring + [-1] * (6 - filled), jnp.int32)
    start, sink = jnp.int32(start), jnp.arange(3, dtype=jnp.int32)
    return (
        rule.query(start, 3).tolist(),
        rule.own(index, start, 3, 3).tolist(),
        rule.sink(index, sink, start, 3).tolist(),
        rule.local(index, ring, start, 3, 3)[:filled].tolist(),
    )


TOP = [18, 19, 20]
ABSOLUTE_42 = [*range(42, 45)]


@pytest.mark.parametrize(
    "rule, start, ring, cursor, expected",
    [
        (Absolute(), 6, [3, 4, 5], 3, ([6, 7, 8], [6, 7, 8], [0, 1, 2], [3, 4, 5])),
        (
            Absolute(),
            42,
            [39, 40, 41, 36, 37, 38],
            3,
            (ABSOLUTE_42, ABSOLUTE_42, [0, 1, 2], [39, 40, 41, 36, 37, 38]),
        ),
        # Tri-region: frame numbers below 21, then the window stands at the end.
        (
            Relative(21),
            18,
            [12, 13, 14, 15, 16, 17],
            0,
            (TOP, TOP, [0, 1, 2], [*range(12, 18)]),
        ),
        (
            Relative(21),
            21,
            [18, 19, 20, 15, 16, 17],
            3,
            (TOP, TOP, [0, 1, 2], [15, 16, 17, 12, 13, 14]),
        ),
        (
            Relative(12),
            42,
            [36, 37, 38, 39, 40, 41],
            0,
            ([9, 10, 11], [9, 10, 11], [0, 1, 2], [*range(3, 9)]),
        ),
        # Bounded: the sink moves along, directly before the local window.
        (
            Bounded(21),
            12,
            [9, 10, 11, 6, 7, 8],
            3,
            ([12, 13, 14], [12, 13, 14], [3, 4, 5], [9, 10, 11, 6, 7, 8]),
        ),
        (
            Bounded(21),
            42,
            [36, 37, 38, 39, 40, 41],
            0,
            (TOP, TOP, [9, 10, 11], [*range(12, 18)]),
        ),
        # Ranked: after a flush keys close up while queries keep the window's end.
        (
            Ranked(12),
            42,
            [40, 41],
            2,
            ([9, 10, 11], [5, 6, 7], [0, 1, 2], [3, 4]),
        ),
        (
            Relative(12),
            42,
            [40, 41],
            2,
            ([9, 10, 11], [9, 10, 11], [0, 1, 2], [7, 8]),
        ),
        (
            Ranked(12),
            42,
            [39, 40, 41, 36, 37, 38],
            3,
            ([9, 10, 11], [9, 10, 11], [0, 1, 2], [6, 7, 8, 3, 4, 5]),
        ),
    ],
)
def test_rule_places_query_own_sink_and_local(rule, start, ring, cursor, expected):
    assert positions(rule, start, ring, cursor) == expected


@pytest.mark.parametrize("rule", [Relative(21), Bounded(21), Ranked(12)])
def test_bounded_rules_never_pass_their_range(rule):
    start = 1_000_000
    ring = [start - 6 + i for i in range(6)]

    placed = positions(rule, start, ring)

    assert max(max(part) for part in placed) == rule.range - 1
    assert min(min(part) for part in placed) >= 0


@pytest.mark.parametrize("start", [0, 3, 9, 18])
def test_relative_is_absolute_until_the_range_is_full(start):
    ring = [frame for frame in range(start - 6, start) if frame > 2]

    assert positions(Relative(21), start, ring) == positions(Absolute(), start, ring)


@pytest.mark.parametrize(
    "window, frames, first", [(12, 3, 6), (9, 3, 9), (15, 3, 3), (12, 1, 8)]
)
def test_junction_lies_before_a_full_window_and_itself(window, frames, first):
    policy = Policy(window=window, junction=Junction(frames))

    assert policy.junction_start == first
    assert policy.read(policy.init_index()).past[-frames:].tolist() == [
        *range(first, first + frames)
    ]


def test_junction_can_be_put_directly_before_the_local_window():
    policy = dataclasses.replace(
        POLICIES["anchor_forcing"], positions=Relative(21, junction_start=9)
    )

    assert policy.read(policy.init_index()).past[-3:].tolist() == [9, 10, 11]
