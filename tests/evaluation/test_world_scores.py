import bundles
import numpy as np
import pytest
import tiny

from anchor_jax import flow
from anchor_jax.cache.policies import POLICIES
from anchor_jax.evaluation import world
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.world import scene

SETUP = StreamSetup(
    tiny.MODEL, tiny.GRID, POLICIES["anchor_forcing"],
    flow.few_step_levels((1000, 500), 5.0),
)  # fmt: skip
TRIAL = world.Trial(count=20, batch=10, segments=(2, 2))


def rendered(bundle, setup, prompts, blocks, seed):
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


def test_a_perfect_model_scores_one_and_the_old_prompt_scores_less(monkeypatch):
    monkeypatch.setattr(world, "generate", rendered)

    result = world.score_switches(None, SETUP, TRIAL)

    for name in ("color", "background", "shape", "motion"):
        assert result["before_switch"][name]["rate"] == 1
        assert result["after_switch"][name]["rate"] == 1
        assert result["after_switch_old_prompt"][name]["rate"] < 0.9
    assert result["after_switch"]["color"]["n"] == 20
    assert result["after_switch_of_color"]["color"]["n"] == 4


def test_a_model_that_ignores_the_switch_scores_low(monkeypatch):
    def stuck(bundle, setup, prompts, blocks, seed):
        return rendered(bundle, setup, [prompts[0]] * 2, blocks, seed)

    monkeypatch.setattr(world, "generate", stuck)

    result = world.score_switches(None, SETUP, TRIAL)

    assert result["after_switch_of_color"]["color"]["rate"] == 0
    assert result["after_switch_of_motion"]["motion"]["rate"] == 0


def test_videos_switch_together_and_have_the_right_length():
    bundle = bundles.load()
    prompts = [[bundles.RED, bundles.BLUE], [bundles.GREEN, bundles.GREEN]]

    videos = world.generate(bundle, SETUP, prompts, (2, 1), seed=0)
    kept = world.generate(bundle, SETUP, [prompts[0]] * 2, (2, 1), seed=0)

    assert videos.shape[:2] == (2, scene.latent_to_pixel_frames(9))
    cut = scene.latent_to_pixel_frames(6)
    np.testing.assert_array_equal(videos[:, :cut], kept[:, :cut])
    assert not np.array_equal(videos[:, cut:], kept[:, cut:])


@pytest.mark.parametrize("name", ["after_switch", "mismatched"])
def test_the_table_has_a_line_for_every_group(monkeypatch, name):
    monkeypatch.setattr(world, "generate", rendered)

    text = world.table(world.score_switches(None, SETUP, TRIAL))

    assert name in text and "1.000" in text
