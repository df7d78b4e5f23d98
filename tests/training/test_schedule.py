"""Sequences as integers: training/README.md, "Sequences and chunks"."""

import pytest

from anchor_jax.training.schedule import SequencePlan


def test_chunks_are_those_of_the_release():
    spans = SequencePlan().chunks(None)

    assert [span.start for span in spans] == [0, *range(21, 220, 18)]
    assert len(spans) == 13 and spans[-1].end == 237
    assert [span.new for span in spans] == [21, *[18] * 12]
    assert all(span.switch_at is None and span.last_prompt == 0 for span in spans)


def test_a_switch_belongs_to_one_chunk():
    spans = SequencePlan().chunks(39)

    assert [span.switch_at for span in spans[:4]] == [None, None, 39, None]
    assert [span.prompt for span in spans[:4]] == [0, 0, 0, 1]
    assert [span.last_prompt for span in spans[:4]] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("requested", "start", "frame"),
    [(40, 39, 42), (20, 21, 21), (1, 0, 3), (56, 57, 57)],
)
def test_a_switch_takes_effect_at_the_next_block(requested, start, frame):
    spans = SequencePlan().chunks(requested)

    switches = {span.start: span.switch_at for span in spans if span.switch_at}
    assert switches == {start: frame}


def test_switches_are_drawn_from_the_choices_and_from_the_seed_alone():
    plan = SequencePlan()

    drawn = [plan.switch(seed=0, number=number) for number in range(200)]

    assert set(drawn) == set(range(21, 202, 18))
    assert drawn == [plan.switch(0, number) for number in range(200)]
    assert drawn != [plan.switch(1, number) for number in range(200)]
    assert SequencePlan(switches=()).switch(0, 0) is None


def test_a_short_plan_is_one_chunk_a_sequence():
    (span,) = SequencePlan(length=21, switches=()).chunks(None)

    assert (span.start, span.new) == (0, 21)


@pytest.mark.parametrize(
    ("length", "visited"),
    [
        (237, (0, *range(21, 220, 18))),
        (93, (0, 21, 39, 57, 75)),
        (75, (0, 39)),
        (57, (0,)),
        (21, (0,)),
    ],
)
def test_generator_updates_visit_chunks_whose_number_fits_theirs(length, visited):
    assert SequencePlan(length=length, switches=()).visited(every=5) == visited


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": 20},
        {"frames": 3},
        {"length": 20},
        {"block": 0, "frames": 0},
        {"switches": (0,)},
        {"switches": (240,)},
    ],
)
def test_invalid_plans_are_refused(wrong):
    with pytest.raises(ValueError, match="plan"):
        SequencePlan(**wrong)
