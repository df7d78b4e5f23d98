import dataclasses
import json

import bundles
import divided
import numpy as np
import pytest
import tiny

from anchor_jax import flow
from anchor_jax.cache.policies import POLICIES
from anchor_jax.cli import main
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.tiny_world import evaluate as world
from anchor_jax.tiny_world import scene
from anchor_jax.tiny_world import trials as world_trials

SETUP = StreamSetup(
    tiny.MODEL, tiny.GRID, POLICIES["anchor_forcing"],
    flow.few_step_levels((1000, 500), 5.0),
)  # fmt: skip
TRIAL = world.MatchTrial(count=20, batch=10, segments=(2, 2))


def rendered(bundle, setup, prompts, blocks, seed, negative_prompt):
    """Stands in for a model that draws every prompt right."""
    rng = np.random.default_rng(seed)
    frames = scene.segment_pixel_frames([n * setup.policy.block for n in blocks])
    videos = []
    for texts in zip(*prompts, strict=True):
        parts = [scene.parse_caption(text) for text in texts]
        videos.append(
            scene.sample_track(rng, list(zip(parts, frames, strict=True))).render()
        )
    return np.stack(videos)


@pytest.mark.slow
def test_a_perfect_model_scores_one_and_the_old_prompt_scores_less(monkeypatch):
    monkeypatch.setattr(world, "generate", rendered)

    result = world.score_switches(None, SETUP, TRIAL)

    for name in ("color", "background", "shape", "motion"):
        assert result["before_switch"][name]["rate"] == 1
        assert result["after_switch"][name]["rate"] == 1
        assert result["after_switch_old_prompt"][name]["rate"] < 0.9
    assert result["after_switch"]["color"]["n"] == 20
    assert result["after_switch_of_color"]["color"]["n"] == 4


@pytest.mark.slow
def test_a_model_that_ignores_the_switch_scores_low(monkeypatch):
    def stuck(bundle, setup, prompts, blocks, seed, negative_prompt):
        return rendered(bundle, setup, [prompts[0]] * 2, blocks, seed, "")

    monkeypatch.setattr(world, "generate", stuck)

    result = world.score_switches(None, SETUP, TRIAL)

    assert result["after_switch_of_color"]["color"]["rate"] == 0
    assert result["after_switch_of_motion"]["motion"]["rate"] == 0


@pytest.mark.slow
def test_videos_switch_together_and_have_the_right_length():
    bundle = bundles.load()
    prompts = [[bundles.RED, bundles.BLUE], [bundles.GREEN, bundles.GREEN]]

    videos = world.generate(bundle, SETUP, prompts, (2, 1), seed=0)
    kept = world.generate(bundle, SETUP, [prompts[0]] * 2, (2, 1), seed=0)

    assert videos.shape[:2] == (2, scene.latent_to_pixel_frames(9))
    cut = scene.latent_to_pixel_frames(6)
    np.testing.assert_array_equal(videos[:, :cut], kept[:, :cut])
    assert not np.array_equal(videos[:, cut:], kept[:, cut:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["after_switch", "mismatched"])
def test_the_table_has_a_line_for_every_group(monkeypatch, name):
    monkeypatch.setattr(world, "generate", rendered)

    text = world.table(world.score_switches(None, SETUP, TRIAL))

    assert name in text and "1.000" in text


@pytest.mark.parametrize("count", [1, 7, 13])
def test_exactly_the_requested_number_of_videos_is_scored(monkeypatch, count):
    monkeypatch.setattr(world, "generate", rendered)
    trial = world.MatchTrial(count=count, batch=min(count, 5), segments=(2, 2))

    result = world.score_switches(None, SETUP, trial)

    for group in ("before_switch", "after_switch", "mismatched"):
        assert result[group]["color"]["n"] == count
    kinds = [rates for name, rates in result.items() if "after_switch_of" in name]
    assert sum(rates["color"]["n"] for rates in kinds) == count


def test_clips_are_cut_to_the_count(monkeypatch):
    monkeypatch.setattr(world, "generate", rendered)
    monkeypatch.setattr(world, "ceiling", lambda *_: {})

    result = world.score_clips(None, SETUP, world.MatchTrial(7, 5, (2,)))

    assert result["held_out"]["color"]["n"] == 7
    assert result["held_out"]["color"]["rate"] == 1


@pytest.mark.slow
def test_guidance_uses_the_negative_prompt():
    setup = dataclasses.replace(SETUP, guidance=2.0)
    prompts = [[bundles.RED]]

    def make(negative):
        return world.generate(bundles.load(), setup, prompts, (1,), 0, negative)

    assert not np.array_equal(make(""), make(bundles.BLUE))


@pytest.fixture
def score(tmp_path, monkeypatch, capsys):
    bundles.save(tmp_path)
    monkeypatch.setenv("ANCHOR_JAX_CACHE", "off")

    def run(policy, *argv):
        given = [f"--config=tiny:{policy}", f"--config.weights={tmp_path}", *argv]
        status = main.main(["score", *given])
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("policy", "argv", "parts"),
    [
        ("causvid", [], ["causvid restarts every 21", "anchor_forcing"]),
        ("self_forcing", [], ["limited to 21", "trial has 30", "--blocks=3"]),
        ("anchor_forcing", ["--blocks=0"], ["blocks"]),
        ("wan_teacher", ["--config.frames=0"], ["frames=0"]),
        ("wan_teacher", ["--config.frames=-3"], ["frames=-3"]),
    ],
)
def test_what_cannot_be_scored_is_refused(score, policy, argv, parts):
    status, err = score(policy, *argv)

    assert status == 2
    assert [part for part in parts if part not in err] == [], err


def test_the_command_takes_count_and_negative_prompt_to_the_trial(score, monkeypatch):
    trials = []
    switch = dataclasses.replace(
        world_trials.SWITCH,
        score=lambda *given: trials.append(given[2]),
        table=lambda result: "",
    )
    monkeypatch.setattr(world_trials, "SWITCH", switch)

    status, _ = score(
        "self_forcing", "--blocks=3", "--config.sampler.negative_prompt=ugly"
    )

    assert status == 0
    assert trials == [world.MatchTrial(240, 40, (3, 3), 1, "ugly")]


def test_named_metrics_measure_every_video_and_are_written(
    score, monkeypatch, tmp_path
):
    monkeypatch.setattr(world, "generate", rendered)
    out = tmp_path / "score.json"

    plain = score("self_forcing", "--blocks=2", "--count=3", f"--out={out}")
    without = json.loads(out.read_text())
    named = "--metrics=temporal_flickering,world_match"
    measured = score("self_forcing", "--blocks=2", "--count=3", f"--out={out}", named)
    found = json.loads(out.read_text())

    assert (plain[0], measured[0]) == (0, 0)
    metrics = found.pop("metrics")
    assert found == without
    cell = metrics["temporal_flickering"]["temporal_flickering"]
    assert cell["n"] == 3 and 0.5 < cell["mean"] < 1
    # A video that switches prompts has no single caption.
    assert metrics["world_match"] == {}


def test_an_unknown_metric_is_refused_before_anything_is_loaded(score):
    status, err = score("self_forcing", "--metrics=flickering")

    assert status == 2
    assert "unknown metric 'flickering'" in err and "temporal_flickering" in err


def test_observers_see_videos_with_their_prompts(monkeypatch):
    monkeypatch.setattr(world, "generate", rendered)
    seen = []
    trial = dataclasses.replace(
        TRIAL, count=13, observe=lambda *given: seen.append(given)
    )

    world.score_switches(None, SETUP, trial)

    assert [len(videos) for videos, _ in seen] == [10, 3]
    for videos, prompts in seen:
        assert len(prompts) == len(videos)
        for prompt in prompts:
            before, after = prompt.split(" | ")
            assert scene.parse_caption(before) != scene.parse_caption(after)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    ("score", "segments"), [(world.score_switches, (2, 2)), (world.score_clips, (2,))]
)
def test_processes_that_share_the_batches_get_the_numbers_of_one(
    monkeypatch, score, segments, count
):
    made = []

    def generate(bundle, setup, prompts, blocks, seed, negative_prompt):
        made.append(seed)
        prompts = prompts if seed % 2 else [list(reversed(texts)) for texts in prompts]
        return rendered(bundle, setup, prompts, blocks, seed, negative_prompt)

    monkeypatch.setattr(world, "generate", generate)
    monkeypatch.setattr(world, "ceiling", lambda *_: {})
    trial = world.MatchTrial(count=7, batch=3, segments=segments, seed=4)
    alone, seeds = score(None, SETUP, trial), sorted(made)
    made.clear()

    shared = divided.run(
        lambda division: score(
            None, SETUP, dataclasses.replace(trial, division=division)
        ),
        count,
    )

    assert shared == [alone] * count
    assert sorted(made) == seeds == [4, 7, 10]
    assert json.dumps(shared[0]) == json.dumps(alone)
