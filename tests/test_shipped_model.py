import pytest

from anchor_jax import flow
from anchor_jax.cache.policies import POLICIES
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.tiny_world import evaluate as world
from anchor_jax.weights.load import load_bundle

pytestmark = pytest.mark.usefixtures("optimized_compilation")


@pytest.mark.slow
def test_the_shipped_model_follows_a_switch_in_four_steps_without_guidance():
    model = load_bundle("tiny")
    levels = flow.few_step_levels((1000, 750, 500, 250), 5.0)
    policy = POLICIES["anchor_forcing"]
    setup = StreamSetup(model.model, model.grid, policy, levels)

    result = world.score_switches(
        model, setup, world.MatchTrial(30, 30, (3, 3), seed=5)
    )

    after = {name: row["rate"] for name, row in result["after_switch"].items()}
    assert after["color"] >= 0.8 and after["background"] >= 0.9
    assert after["motion"] >= 0.8 and after["shape"] >= 0.7
    old = result["after_switch_old_prompt"]["color"]["rate"]
    assert old < after["color"]
