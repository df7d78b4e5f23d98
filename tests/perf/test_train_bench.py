"""The benchmark of training steps."""

import dataclasses

import bundles
import pytest
import tiny

from anchor_jax.cache.policies import POLICIES
from anchor_jax.errors import UserError
from anchor_jax.perf import roofline
from anchor_jax.perf import train_bench as bench
from anchor_jax.training.data.kinds import DataConfig
from anchor_jax.training.placement import Arrays
from anchor_jax.training.stages import build, distillation
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.training.stages.distillation import DistillationConfig
from anchor_jax.training.stages.distillation_flops import step_flops

CONFIG = TrainConfig(
    batch=4,
    distillation=DistillationConfig(
        policy="longlive", steps=(1000, 500), frames=6, length=6, every=2
    ),
    data=DataConfig("world_prompts"),
)


def test_operations_are_those_of_the_passes_that_ran():
    model = bundles.load()
    on = Arrays(build.make_mesh(CONFIG))
    stage = distillation.make_spec(CONFIG, model, model, model, on)
    pass_flops = roofline.pass_flops
    block = sum(pass_flops(tiny.MODEL, tiny.GRID, 3, keys).total for keys in (3, 6))
    clip = pass_flops(tiny.MODEL, tiny.GRID, 6, 6).total

    critic = step_flops(stage, {"critic_exit_level": 1})
    both = step_flops(stage, {"critic_exit_level": 1, "exit_level": 0})

    assert critic == pytest.approx(4 * (3 * block + 3 * clip))
    assert both - critic == pytest.approx(4 * (2 * block + 3 * clip + 2 * block))
    long = dataclasses.replace(
        stage, plan=dataclasses.replace(stage.plan, frames=21, length=21)
    )
    seen = step_flops(long, {"critic_exit_level": 0})
    keys = [3, 6, 9, *[POLICIES["longlive"].window] * 4]
    blocks = sum(pass_flops(tiny.MODEL, tiny.GRID, 3, n).total for n in keys)
    clip = pass_flops(tiny.MODEL, tiny.GRID, 21, 21).total
    assert seen == pytest.approx(4 * (2 * blocks + 3 * clip))


@pytest.mark.slow
def test_a_short_run_is_measured(tmp_path):
    bundles.save(tmp_path / "weights")
    weights = str(tmp_path / "weights")
    config = dataclasses.replace(CONFIG, weights=weights, teacher=weights)

    found = bench.measure(config, progress=lambda line: None, repeats=1)

    assert set(found["seconds"]) == {"generator and critic", "critic"}
    both, critic, every = found["efficiency"].values()
    assert 0 < min(both, critic) <= every <= max(both, critic) < 1


def test_other_stages_and_longer_sequences_are_refused():
    section = dataclasses.replace(CONFIG.distillation, length=12)
    longer = dataclasses.replace(CONFIG, distillation=section)
    with pytest.raises(UserError, match="sequences are one chunk"):
        bench.measure(longer, progress=print)
    with pytest.raises(UserError, match="sequences are one chunk"):
        bench.measure(TrainConfig(stage="regression"), progress=print)
