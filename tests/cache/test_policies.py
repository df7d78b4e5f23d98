"""Frames seen and RoPE positions of every pass, against two simulations.

`Buffer` follows the released code: rows written in place and rolled when full
(cache/README.md, "Junction", "Re-cache"). `Paper` follows the paper's sets of frames
(cache/README.md, "Junction"). Neither knows anything of slots, cursors or plans.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from anchor_jax.cache import policies
from anchor_jax.cache.policies import (
    POLICIES,
    Flush,
    Junction,
    Keep,
    PeriodicJunction,
    Policy,
    Recache,
    RecachePass,
    ReleaseJunction,
    Restart,
    single_prompt,
)
from anchor_jax.cache.positions import Absolute, Bounded, Ranked, Relative
from anchor_jax.cache.types import EMPTY

FIVE = (40, 80, 120, 160, 200)
SCHEDULES = [
    (), (0,), (1,), (9,), (12,), (15,), (21,), (39,), (40,), (42,), (40, 45),
    (40, 46), (40, 54), (40, 63), (9, 12, 15, 18), (40, 46, 52, 58, 64),
]  # fmt: skip
PAPER, RELEASE = POLICIES["anchor_forcing"], POLICIES["anchor_forcing_release"]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a pass sees: query positions, and (frame, position) of every key."""

    query: list
    sink: list
    local: list
    junction: list
    prior: bool = False

    @property
    def keys(self):
        return sorted([*self.sink, *self.local, *self.junction])


def consecutive(frames, first):
    return [(frame, first + i) for i, frame in enumerate(frames)]


class Buffer:
    """The released code: one buffer of rows, and a junction beside it."""

    def __init__(self, policy):
        self.block, self.sink, self.cap = policy.block, policy.sink, policy.window
        self.reach = 21
        self.keeps_sink = policy.on_switch != Recache(rewrite_sink=True)
        self.every = getattr(policy.junction, "every", None)
        self.rows = [None] * self.cap
        self.seen_end = self.row_end = 0
        self.junction = self.junction_prior = None
        self.switch_frame = 20 if self.every else 10**8
        self.prompt = 0

    def run(self, first, count, *, capture=False, overwrite=False) -> Seen:
        """One pass of the network."""
        end, span = first + count, self.cap - self.sink
        again = end <= self.seen_end and first > 0
        if end > self.seen_end and count + self.row_end > self.cap:
            out = count + self.row_end - self.cap
            keep = self.row_end - out - self.sink
            moved = self.rows[self.sink + out : self.sink + out + keep]
            self.rows[self.sink : self.sink + keep] = moved
            stop = self.row_end + end - self.seen_end - out
            begin = write = stop - count
        else:
            stop = self.row_end + end - self.seen_end
            begin = stop - count
            write = max(begin, self.sink) if again and not overwrite else begin
        self.rows[write:stop] = range(first + write - begin, end)
        if not again:
            self.seen_end, self.row_end = end, stop

        query = min(first, self.reach - count)
        local = self.rows[max(self.sink, stop - span) : stop]
        shown, prior = None, False
        if self.switch_frame + span < first:
            shown = self.junction
        elif self.prompt > 1:
            shown, prior = self.junction_prior, True
        seen = Seen(
            [*range(query, query + count)],
            consecutive(self.rows[: min(self.sink, stop)], 0),
            consecutive(local, max(query - span + count, self.sink)),
            consecutive(shown or [], self.reach - self.cap - self.block),
            prior,
        )
        if capture:
            self.junction_prior, self.junction = self.junction, [*range(first, end)]
        return seen

    def stream(self, frames, requests, passes=5) -> dict:
        """Every pass: {first frame of a block: first pass}, {("re-cache", c): pass}."""
        made, waiting, number = {}, list(requests), 0
        if waiting:
            self.switch_frame = waiting[0]
        for first in range(0, frames, self.block):
            capture = self.every is not None and first // self.block % self.every == 0
            if waiting and first >= waiting[0]:
                request, capture = waiting.pop(0), True
                if first:
                    count = min(self.cap, first)
                    seen = self.run(first - count, count, overwrite=not self.keeps_sink)
                    made["re-cache", first] = seen
                number += 1
                if number > 1:
                    self.switch_frame, self.prompt = request, self.prompt + 1
            of_block = [
                self.run(first, self.block, capture=capture) for _ in range(passes)
            ]
            made[first] = of_block[0]
        return made


class Paper:
    """The paper's sets: sink, the last frames, and the junction once it left them."""

    def __init__(self, policy):
        self.policy = policy
        self.span = policy.window - policy.sink

    def place(self, first, count, sink, rest, junction=(), cut=False) -> Seen:
        rule = self.policy.positions
        if isinstance(rule, Absolute):
            query = [*range(first, first + count)]
            return Seen(query, [(f, f) for f in sink], [(f, f) for f in rest], [])
        end = min(first + count, rule.range)
        query = [*range(end - count, end)]
        local, before = end - len(rest), 0
        if isinstance(rule, Ranked):
            local = len(sink)
        if isinstance(rule, Bounded):
            before = local - len(sink)
        keys = consecutive(rest, local)
        if cut:
            query[-3:] = [45, 46, 47]
            keys[-3:] = consecutive(rest[-3:], 45)
        placed = consecutive(junction, 21 - self.policy.window - 3)
        return Seen(query, consecutive(sink, before), keys, placed)

    def stream(self, frames, requests, cuts=()) -> dict:
        policy, span, size = self.policy, self.span, self.policy.block
        made, waiting = {}, list(requests)
        sink, past, junction, boundary = [], [], [], None

        def active(first):
            return junction if junction and boundary + span <= first else []

        for first in range(0, frames, size):
            switched, cut = bool(waiting) and first >= waiting[0], False
            if switched:
                cut = waiting.pop(0) in cuts
            if switched and isinstance(policy.on_switch, Flush):
                past = past[max(0, len(past) - policy.on_switch.last) :]
            if switched and isinstance(policy.on_switch, Recache) and first:
                whole = first <= policy.window or policy.on_switch.rewrite_sink
                count = min(first, policy.window) if whole else span
                again = [*range(first - count, first)]
                if whole:
                    sink, again = again[: policy.sink], again[policy.sink :]
                shown = active(first - size)
                made["re-cache", first] = self.place(
                    first - count, count, sink, again, shown
                )
                past = again
            if switched and policy.junction:
                junction, boundary = [*range(first, first + size)], first
            own = [*range(first, first + size)]
            if first == 0:
                sink, own = own[: policy.sink], own[policy.sink :]
            past = (past + own)[-span:]
            made[first] = self.place(first, size, sink, past, active(first), cut)
        return made


@functools.cache
def compiled(policy):
    @jax.jit
    def block(index):
        plan = policy.read(index)
        _, done = policy.write(index)
        return plan, done

    @functools.partial(jax.jit, static_argnames="recache")
    def switch(index, requested, cut, recache):
        plan = None
        if isinstance(policy.on_switch, Flush):
            _, index = policy.flush(index)
        if recache:
            plan = policy.read_recache(index, recache)
            _, index = policy.write_recache(index, recache)
        return plan, policy.switched(index, requested, cut)

    return block, switch


def stream(policy, frames, requests=(), cuts=()) -> dict:
    """What the policy's plans say, in the form of the simulations."""
    block, switch = compiled(policy)
    index, made, waiting = policy.init_index(), {}, list(requests)
    for first in range(0, frames, policy.block):
        if waiting and first >= waiting[0]:
            request, recache = waiting.pop(0), policy.recache(first)
            plan, index = switch(
                index, jnp.int32(request), jnp.array(request in cuts), recache=recache
            )
            if plan is not None:
                made["re-cache", first] = read(policy, plan, recache)
        plan, index = block(index)
        made[first] = read(policy, plan)
    return made


def read(policy, plan, recache=None) -> Seen:
    """Returns the visible keys: the first ones in the order own, sink, local, junction.

    A re-cache reads nothing local, and no sink where it makes the sink.
    """
    plan = jax.device_get(plan)
    seen = int(plan.frames)
    assert seen <= len(plan.frame)
    keys = list(zip(plan.frame.tolist(), plan.position.tolist(), strict=True))[:seen]
    makes_sink = recache.sink if recache else plan.start == 0
    own = len(plan.own)
    first = own if makes_sink else own + policy.sink
    last = seen - (policy.junction_frames if plan.junction else 0)
    assert first <= last
    visible = keys[:own], keys[own:first], keys[first:last], keys[last:]
    own, sink, local, junction = visible
    if makes_sink:
        assert not sink
        sink, own = own[: policy.sink], own[policy.sink :]
    assert len(junction) == policy.junction_frames * int(plan.junction)
    return Seen(
        plan.query.tolist(), sink, sorted(local + own), junction, bool(plan.prior)
    )


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for pass_, seen in expected.items():
        mine = ours[pass_]
        # A short re-cache leaves out queries that write nothing.
        again = isinstance(pass_, tuple)
        query = seen.query[-len(mine.query) :] if again else seen.query
        assert mine.query == query, pass_
        assert mine.keys == seen.keys, pass_
        assert mine.junction == seen.junction, pass_
        assert mine.prior == seen.prior, pass_


@pytest.mark.parametrize("requests", SCHEDULES, ids=str)
def test_paper_rules_see_what_the_equations_say(requests):
    ours = stream(PAPER, 99, requests)

    assert_same(ours, Paper(PAPER).stream(99, requests))


@pytest.mark.parametrize("requests", SCHEDULES, ids=str)
def test_release_rules_see_what_the_official_buffer_holds(requests):
    ours = stream(RELEASE, 99, requests)

    assert_same(ours, Buffer(RELEASE).stream(99, requests))


def test_both_rules_hold_over_240_frames_with_five_switches():
    assert_same(stream(PAPER, 240, FIVE), Paper(PAPER).stream(240, FIVE))
    assert_same(stream(RELEASE, 240, FIVE), Buffer(RELEASE).stream(240, FIVE))


def test_periodic_junction_is_the_single_prompt_pipeline():
    policy = single_prompt(RELEASE)

    ours = stream(policy, 120)

    assert isinstance(policy.junction, PeriodicJunction)
    assert_same(ours, Buffer(policy).stream(120, ()))
    shown = {first: [f for f, _ in ours[first].junction] for first in ours}
    assert all(not shown[first] for first in range(0, 30, 3))
    assert shown[30] == shown[33] == shown[36] == [18, 19, 20]
    for first in (39, 42, 45, 48, 51, 54):
        assert shown[first] == [36, 37, 38]


def test_single_prompt_changes_release_rules_only():
    assert single_prompt(PAPER) is PAPER
    assert single_prompt(POLICIES["longlive"]) is POLICIES["longlive"]


@pytest.mark.parametrize(
    "name", [name for name in POLICIES if name != "anchor_forcing_release"]
)
@pytest.mark.parametrize("requests", [(), (9,), (40,), (21, 42, 70)], ids=str)
def test_named_policy_sees_what_its_method_says(name, requests):
    policy = POLICIES[name]

    assert_same(stream(policy, 90, requests), Paper(policy).stream(90, requests))


@pytest.mark.parametrize("kind", [Ranked, Relative])
@pytest.mark.parametrize("window", [6, 12])
def test_infinity_rope_flushes_and_cuts(kind, window):
    policy = Policy(
        sink=1, window=window, positions=kind(range=window, cut=45), on_switch=Flush()
    )

    ours = stream(policy, 60, (1, 21, 33, 36), cuts=(21, 36))

    assert_same(ours, Paper(policy).stream(60, (1, 21, 33, 36), cuts=(21, 36)))
    assert ours[21].query == [45, 46, 47]
    assert ours[24].query == [window - 3, window - 2, window - 1]
    assert [frame for frame, _ in ours[33].keys] == [0, 31, 32, 33, 34, 35]


SHAPES = [
    (1, 0, 6), (1, 1, 2), (2, 0, 7), (2, 1, 6), (2, 2, 4), (3, 0, 9), (3, 1, 6),
    (3, 2, 8), (3, 3, 6), (3, 3, 18), (4, 0, 4), (4, 3, 13), (5, 1, 16), (5, 5, 21),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("block, sink, window", SHAPES)
def test_other_shapes_see_the_newest_frames(block, sink, window):
    policy = Policy(block=block, sink=sink, window=window)
    requests = (0, 22, 23, 50)

    assert_same(stream(policy, 70, requests), Paper(policy).stream(70, requests))


@pytest.mark.slow
@pytest.mark.parametrize(
    "block, sink, window",
    [(1, 1, 8), (2, 1, 6), (3, 2, 8), (3, 3, 18), (4, 3, 13), (5, 1, 16)],
)
def test_other_shapes_roll_as_the_official_buffer(block, sink, window):
    junction = ReleaseJunction(frames=block)
    policy = Policy(block=block, sink=sink, window=window, junction=junction)
    requests = (5, 22, 50, 53, 57)

    assert_same(stream(policy, 80, requests), Buffer(policy).stream(80, requests))


@pytest.mark.parametrize("requests", [(9,), (40,), (40, 46, 52, 58)], ids=str)
def test_rewritten_sink_is_as_in_the_official_buffer(requests):
    policy = dataclasses.replace(RELEASE, on_switch=Recache(rewrite_sink=True))

    ours = stream(policy, 99, requests)

    assert_same(ours, Buffer(policy).stream(99, requests))


def spans(*parts):
    """Frames and positions of a row of the worked table: (first, last, position)."""
    return sorted(
        (frame, position + frame - first)
        for first, last, position in parts
        for frame in range(first, last + 1)
    )


SINK = (0, 2, 0)
TABLE = {
    0: (0, [SINK]),
    3: (3, [SINK, (3, 5, 3)]),
    6: (6, [SINK, (3, 8, 3)]),
    9: (9, [SINK, (3, 11, 3)]),
    12: (12, [SINK, (6, 14, 6)]),
    15: (15, [SINK, (9, 17, 9)]),
    18: (18, [SINK, (12, 20, 12)]),
    21: (18, [SINK, (15, 23, 12)]),
    24: (18, [SINK, (18, 26, 12)]),
    27: (18, [SINK, (21, 29, 12)]),
    30: (18, [SINK, (24, 32, 12)]),
    33: (18, [SINK, (27, 35, 12)]),
    36: (18, [SINK, (30, 38, 12)]),
    39: (18, [SINK, (33, 41, 12)]),
    ("re-cache", 42): (12, [SINK, (33, 41, 12)]),
    42: (18, [SINK, (36, 44, 12)]),
    45: (18, [SINK, (39, 47, 12)]),
    48: (18, [SINK, (42, 50, 12)]),
    51: (18, [SINK, (42, 44, 6), (45, 53, 12)]),
    54: (18, [SINK, (42, 44, 6), (48, 56, 12)]),
    57: (18, [SINK, (42, 44, 6), (51, 59, 12)]),
    60: (18, [SINK, (42, 44, 6), (54, 62, 12)]),
}


@pytest.mark.parametrize("policy", [PAPER, RELEASE], ids=["paper", "release"])
def test_switch_at_40_gives_the_worked_table(policy):
    ours = stream(policy, 63, (40,))

    assert ours.keys() == TABLE.keys()
    for pass_, (query, parts) in TABLE.items():
        assert ours[pass_].query[0] == query, pass_
        assert ours[pass_].keys == spans(*parts), pass_


def test_release_leaves_one_block_without_junction_after_an_aligned_switch():
    paper, release = stream(PAPER, 63, (42,)), stream(RELEASE, 63, (42,))

    assert paper[51].keys == release[54].keys[:3] + paper[51].keys[3:]
    assert paper[51].keys == spans(*TABLE[51][1])
    assert release[51].keys == spans(SINK, (45, 53, 12))
    assert release[54].keys == paper[54].keys == spans(*TABLE[54][1])


@pytest.mark.parametrize(
    "requested, start, queries, parts",
    [
        (8, 9, [*range(9)], [SINK, (3, 8, 3)]),
        (12, 12, [*range(12)], [SINK, (3, 11, 3)]),
        # Only the newest 9 of frames 3 to 14 are stored, so only they are run.
        (15, 15, [*range(6, 15)], [SINK, (6, 14, 6)]),
    ],
)
def test_early_switch_runs_the_whole_clip_again(requested, start, queries, parts):
    for policy in (PAPER, RELEASE):
        seen = stream(policy, 18, (requested,))["re-cache", start]

        assert seen.query == queries
        assert seen.keys == spans(*parts)


def test_release_shows_an_early_junction_inside_the_local_band():
    seen = stream(RELEASE, 18, (1,))

    assert not seen[9].junction
    assert seen[12].keys == spans(SINK, (3, 5, 6), (6, 14, 6))


@pytest.mark.parametrize(
    "number, start, again, shown_again, active, prior",
    [
        (1, 42, (33, 41), None, 51, False),
        (2, 81, (72, 80), 42, 90, False),
        (3, 120, (111, 119), 81, 132, True),
        (4, 162, (153, 161), 120, 171, True),
        (5, 201, (192, 200), 162, 210, True),
    ],
)
def test_release_events_of_five_switches(
    number, start, again, shown_again, active, prior
):
    ours = stream(RELEASE, 240, FIVE)
    recache = ours["re-cache", start]

    assert [f for f, _ in recache.local] == [*range(again[0], again[1] + 1)]
    expected = spans((shown_again, shown_again + 2, 6)) if shown_again else []
    assert recache.junction == expected
    assert not recache.prior
    for first in range(start, active, 3):
        assert ours[first].prior == prior, first
        assert bool(ours[first].junction) == prior, first
    assert not ours[active].prior
    assert ours[active].junction == spans((start, start + 2, 6))


def test_second_switch_within_the_window_drops_the_first_junction():
    ours = stream(RELEASE, 63, (40, 45))

    assert [f for f, _ in ours["re-cache", 45].keys] == [0, 1, 2, *range(36, 45)]
    assert not ours["re-cache", 45].junction
    assert not ours[51].junction and not ours[54].junction
    assert ours[57].junction == spans((45, 47, 6))


@pytest.mark.parametrize(
    "policy, again",
    [
        (PAPER, {51: [], 54: (42, 44), 60: (42, 44), 63: (42, 44)}),
        (RELEASE, {51: [], 54: [], 60: [], 63: (42, 44)}),
    ],
    ids=["paper", "release"],
)
def test_recache_sees_the_old_junction_only_if_active_by_its_rule(policy, again):
    for start, shown in again.items():
        ours = stream(policy, start + 3, (40, start - 1))

        expected = spans((*shown, 6)) if shown else []
        assert ours["re-cache", start].junction == expected, start


def test_junction_stays_out_while_its_frames_are_local():
    for requests in SCHEDULES:
        for seen in stream(PAPER, 99, requests).values():
            local = {frame for frame, _ in seen.local}
            assert not local & {frame for frame, _ in seen.junction}


def test_first_21_frames_are_those_of_absolute_rope():
    ours = stream(PAPER, 21, (15,))
    absolute = stream(POLICIES["longlive"], 21, (15,))

    assert {k: v.keys for k, v in ours.items()} == {
        k: v.keys for k, v in absolute.items()
    }
    assert all(v.query == absolute[k].query for k, v in ours.items())


def test_no_position_leaves_the_range_in_10000_frames():
    @jax.jit
    def farthest(index):
        def block(carry, number):
            index, most = carry
            change = number % 40 == 14
            again = RecachePass(9, sink=False)
            plan = RELEASE.read_recache(index, again)
            most = jnp.maximum(most, jnp.where(change, jnp.max(plan.own), 0))
            _, other = RELEASE.write_recache(index, again)
            other = RELEASE.switched(other, index.start, jnp.array(False))
            index = jax.tree.map(lambda a, b: jnp.where(change, a, b), other, index)
            plan = RELEASE.read(index)
            _, index = RELEASE.write(index)
            order = jnp.arange(plan.frame.shape[0]) < plan.frames
            positions = jnp.concatenate([plan.own, plan.past])
            low = jnp.min(jnp.where(order, positions, 0))
            most = jnp.maximum(most, jnp.max(jnp.where(order, positions, 0)))
            most = jnp.maximum(most, jnp.max(plan.query))
            return (index, most), (low, plan.frames)

        return jax.lax.scan(block, (index, jnp.int32(0)), jnp.arange(3334))

    (index, most), (low, frames) = farthest(RELEASE.init_index())

    assert int(index.start) == 10_002 and int(index.switches) > 80
    assert int(most) == 20
    assert int(low.min()) == 0
    assert int(frames.max()) == 15


def test_flush_keeps_the_sink_and_the_newest_two():
    policy = POLICIES["infinity_rope"]
    wide = dataclasses.replace(policy, window=12, positions=Relative(range=12))

    for one in (policy, wide):
        ours = stream(one, 60, (30,))

        assert [f for f, _ in ours[30].keys] == [0, 28, 29, 30, 31, 32]
    assert [f for f, _ in ours[33].keys] == [0, *range(28, 36)]


def test_bounded_rope_puts_the_sink_before_the_local_window():
    ours = stream(POLICIES["bounded_rope"], 60)

    assert ours[12].keys == spans((0, 2, 3), (6, 14, 6))
    assert ours[39].keys == spans((0, 2, 9), (33, 41, 12))


def test_absolute_rope_has_no_end():
    policy = POLICIES["longlive"]
    index = policy.init_index()
    far = 90_000
    frame = jnp.concatenate([jnp.arange(3), far - 6 + jnp.arange(6)]).astype(jnp.int32)
    index = index.replace(frame=frame, start=jnp.int32(far), filled=jnp.int32(6))

    plan = policy.read(index)

    assert plan.past.tolist() == frame.tolist()
    assert plan.query.tolist() == [far, far + 1, far + 2]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_only_held_frames_are_visible(name):
    for requests in ((), (9, 12), (40,)):
        for seen in stream(POLICIES[name], 60, requests).values():
            assert EMPTY not in [frame for frame, _ in seen.keys]


@pytest.mark.parametrize(
    "policy, recache",
    [
        (PAPER, RecachePass(9, False)),
        (PAPER, RecachePass(12, True)),
        (Policy(sink=0, window=9), RecachePass(9, False)),
        (Policy(block=4, sink=1, window=6), None),
        (Policy(sink=2, window=6), RecachePass(6, True)),
        (Policy(sink=0, window=3), None),
    ],
)
def test_no_slot_is_written_twice_in_a_pass(policy, recache):
    # A scatter that names a slot twice keeps either value.
    index = policy.init_index().replace(start=jnp.int32(60))
    plan, done = (
        policy.write_recache(index, recache) if recache else policy.write(index)
    )

    slots = [slot for slot in plan.slot.tolist() if slot < policy.slots]
    assert len(slots) == len(set(slots))
    kept = policy.sink * (recache is not None and recache.sink) + policy.local
    assert len(slots) == min(kept, len(plan.slot))
    assert int(done.filled) == min(policy.local, len(plan.slot))


@pytest.mark.parametrize(
    "policy, start, recache",
    [
        (PAPER, 0, None),
        (PAPER, 3, RecachePass(3, True)),
        (PAPER, 12, RecachePass(12, True)),
        (PAPER, 15, RecachePass(9, False)),
        (PAPER, 9000, RecachePass(9, False)),
        (POLICIES["no_global_sink"], 15, RecachePass(12, True)),
        (POLICIES["no_recache"], 15, None),
        (POLICIES["infinity_rope"], 15, None),
        (POLICIES["self_forcing"], 15, None),
    ],
)
def test_a_recache_covers_the_frames_that_stay(policy, start, recache):
    assert policy.recache(start) == recache


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"block": 0}, "block=0 must be at least 1"),
        ({"sink": 4}, "sink=4 must lie between 0 and block=3"),
        ({"sink": -1}, "sink=-1 must lie between"),
        ({"window": 5}, "choose at least 6"),
        ({"junction": Junction(4)}, "junction of 4 frames must fit into the block"),
        (
            {"junction": Junction(), "positions": Absolute()},
            "absolute RoPE cannot be used with a junction",
        ),
        ({"window": 22}, "window=22 must fit into the RoPE range of 21"),
        ({"window": 21, "junction": Junction()}, "choose a window of 15 or less"),
        ({"window": 12, "positions": Relative(range=9)}, "RoPE range of 9"),
        ({"on_switch": Flush(last=-1)}, "flush must keep at least 0"),
        ({"restart": Restart(every=3, overlap=3)}, "must be shorter than"),
    ],
)
def test_impossible_policy_is_refused_with_a_reason(changes, reason):
    with pytest.raises(ValueError, match=reason):
        Policy(**changes)


def test_policies_are_equal_by_value_so_that_programs_are_shared():
    assert Policy(junction=Junction()) == PAPER
    assert hash(Policy(junction=Junction())) == hash(PAPER)
    assert Policy(junction=ReleaseJunction()) != PAPER
    assert Policy(on_switch=Keep()) != Policy()


def test_a_recache_lists_the_junction_that_it_sees():
    block, switch = compiled(PAPER)
    index = PAPER.init_index()
    for start in range(0, 63, 3):
        if start == 42:
            args = (jnp.int32(40), jnp.array(False))
            _, index = switch(index, *args, recache=RecachePass(9, False))
        _, index = block(index)

    plan = PAPER.read_recache(index, PAPER.recache(63))

    seen = plan.frame[: int(plan.frames)].tolist()
    assert seen == [*range(54, 63), 0, 1, 2, 42, 43, 44]


def test_a_prior_junction_beside_a_half_full_ring_is_listed():
    assert_same(stream(RELEASE, 30, (0, 3, 6)), Buffer(RELEASE).stream(30, (0, 3, 6)))


@pytest.mark.parametrize("rule", [Bounded(21), Ranked(12)])
def test_positions_that_move_the_sink_refuse_a_recache_that_replaces_it(rule):
    with pytest.raises(ValueError, match="replaces the sink"):
        Policy(positions=rule, on_switch=Recache(rewrite_sink=True))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"junction": Junction(frames=-3)}, "junction.frames=-3"),
        ({"junction": PeriodicJunction(every=0)}, "junction.every=0"),
        ({"restart": Restart(every=0)}, "restart.every=0"),
        ({"restart": Restart(overlap=0)}, "restart.overlap=0"),
        ({"positions": Relative(range=0)}, "positions.range=0"),
        ({"positions": Relative(junction_start=-1)}, "positions.junction_start=-1"),
        ({"positions": Relative(cut=-1)}, "positions.cut=-1"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_a_part_of_no_size_is_refused(changes, part):
    with pytest.raises(ValueError, match=f"policy: {part} must be at least"):
        Policy(**changes)


def test_older_names_of_a_re_cache_work():
    assert policies.Rerun is policies.RecachePass
    with pytest.warns(FutureWarning, match="now called Policy.recache"):
        assert PAPER.rerun(63) == PAPER.recache(63)
