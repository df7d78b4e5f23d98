import dataclasses

import divided
import numpy as np
import pytest
import tiny

from anchor_jax import flow
from anchor_jax.cache.policies import POLICIES
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.tiny_world import evaluate as world
from anchor_jax.tiny_world import event_streams as trials
from anchor_jax.tiny_world import events, scene
from anchor_jax.tiny_world.events import Scene
from anchor_jax.tiny_world.scene import Attributes

SETUP = StreamSetup(
    tiny.MODEL, tiny.GRID, POLICIES["anchor_forcing"],
    flow.few_step_levels((1000, 500), 5.0),
)  # fmt: skip
TRIAL = world.MatchTrial(count=12, batch=4, segments=(3, 3, 3))


@pytest.fixture(autouse=True)
def codec(monkeypatch):
    """The ceiling is of the videos themselves."""
    monkeypatch.setattr(world, "roundtrip", lambda bundle, video: video)


def scenes_of(texts):
    """Returns what captions say, one after the other; `it` is the first object."""
    first, found = None, []
    for text in texts:
        meaning = events.parse(text)
        if meaning.color is not None:
            first = Attributes(
                meaning.color, meaning.shape, meaning.motion, meaning.background
            )
        motion = meaning.motion or first.motion
        now = Attributes(first.color, first.shape, motion, meaning.background)
        named = meaning.color is not None or meaning.motion is None
        found.append(Scene(now, meaning.second, meaning.motion is None, named))
    return found


def rendered(bundle, setup, prompts, blocks, seed, negative_prompt):
    """Stands in for a model that draws, and remembers, everything right."""
    frames = scene.segment_pixel_frames([n * setup.policy.block for n in blocks])
    videos = [
        events.render(list(zip(scenes_of(texts), frames, strict=True)), (16.0, 32.0))
        for texts in zip(*prompts, strict=True)
    ]
    return np.stack(videos)


def forgetful(bundle, setup, prompts, blocks, seed, negative_prompt):
    """Draws a still red ring for what no prompt names."""
    named = events.caption(Scene(Attributes("red", "ring", "still", "black")))
    forgotten = [
        [named if events.parse(t).color is None and events.parse(t).motion else t
         for t in texts]
        for texts in prompts
    ]  # fmt: skip
    return rendered(bundle, setup, forgotten, blocks, seed, negative_prompt)


@pytest.mark.slow
def test_a_perfect_model_scores_one_on_every_event(monkeypatch):
    monkeypatch.setattr(world, "generate", rendered)

    result = trials.score_events(None, SETUP, TRIAL)

    by_event = result["generated"]["by_event"]
    assert set(by_event) == {"start", *trials.KINDS, "hide"}
    for cells in by_event.values():
        assert cells["all"]["rate"] == 1
    for kind in trials.KINDS:
        assert by_event[kind]["adopted_soon"] == pytest.approx(
            {"rate": 1, "n": 2, "low": 0.342, "high": 1}, abs=1e-3
        )
    assert by_event["return"]["recalled"]["rate"] == 1
    assert by_event["enter"]["persists"]["rate"] == 1
    assert result["mismatched"]["by_event"]["start"]["color"]["rate"] < 0.8
    assert "return" in trials.table(result)


@pytest.mark.slow
def test_a_model_without_memory_recalls_nothing(monkeypatch):
    monkeypatch.setattr(world, "generate", forgetful)

    by_event = trials.score_events(None, SETUP, TRIAL)["generated"]["by_event"]

    assert by_event["return"]["recalled"]["rate"] < 1
    assert by_event["color"]["all"]["rate"] == 1


@pytest.mark.slow
def test_a_long_stream_has_a_row_for_every_segment(monkeypatch):
    monkeypatch.setattr(world, "generate", rendered)

    result = trials.score_long(None, SETUP, TRIAL)

    segments = result["generated"]["by_segment"]
    assert [cells["background"]["n"] for cells in segments.values()] == [12] * 3
    assert result["generated"]["drift"]["background"]["difference"] == 0


@pytest.mark.slow
def test_the_ceiling_has_every_event(monkeypatch):
    monkeypatch.setattr(world, "generate", rendered)
    trial = world.MatchTrial(count=126, batch=30, segments=(1, 1, 1))

    result = trials.score_events(None, SETUP, trial)

    assert set(result["ceiling"]["by_event"]) == {"start", *trials.KINDS, "hide"}


def test_processes_that_share_the_batches_get_the_numbers_of_one(monkeypatch):
    made = []

    def generate(bundle, setup, prompts, blocks, seed, negative_prompt):
        made.append(seed)
        draw = forgetful if seed % 2 else rendered
        return draw(bundle, setup, prompts, blocks, seed, negative_prompt)

    monkeypatch.setattr(world, "generate", generate)
    trial = world.MatchTrial(count=9, batch=2, segments=(1, 1, 1), seed=4)
    alone, seeds = trials.score_events(None, SETUP, trial), sorted(made)
    made.clear()

    shared = divided.run(
        lambda division: trials.score_events(
            None, SETUP, dataclasses.replace(trial, division=division)
        ),
        3,
    )

    assert shared == [alone] * 3
    assert sorted(made) == seeds and len(seeds) > 3
