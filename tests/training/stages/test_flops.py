"""What a mean step does, against the operations that a training counts."""

import dataclasses
import statistics

import bundles
import pytest
import tiny

from anchor_jax.perf import roofline
from anchor_jax.training.placement import Arrays
from anchor_jax.training.stages import build, distillation
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.training.stages.distillation import DistillationConfig
from anchor_jax.training.stages.distillation_flops import mean_uses, step_flops
from anchor_jax.training.stages.regression_flops import clip_uses
from anchor_jax.training.stages.regression_step import RegressionSpec

CONFIG = TrainConfig(
    batch=1,
    distillation=DistillationConfig(
        policy="longlive", steps=(1000, 500), frames=6, length=6, every=2
    ),
)


def spec_of(config):
    model = bundles.load()
    on = Arrays(build.make_mesh(dataclasses.replace(config, mesh=(1, 1, 1, -1))))
    return distillation.make_spec(config, model, model, model, on)


def test_a_mean_step_has_the_operations_that_steps_have_on_average():
    spec = spec_of(CONFIG)
    levels = (0, 1)
    critic = statistics.mean(step_flops(spec, {"critic_exit_level": n}) for n in levels)
    both = statistics.mean(
        step_flops(spec, {"critic_exit_level": n, "exit_level": n}) for n in levels
    )

    uses = mean_uses(spec, every=2)

    total = sum(one.each * one.flops for one in uses)
    assert total == pytest.approx((critic + both) / 2)
    assert {one.role: one.each for one in uses} == {"critic": 1.0, "generator": 0.5}
    trained = [one for one in uses if one.backward]
    assert [one.role for one in trained] == ["critic", "generator"]
    assert all(one.attention < one.flops + one.again for one in uses if one.model)


def test_recomputation_repeats_a_pass_of_each_gradient():
    spec = spec_of(CONFIG)
    again = spec_of(dataclasses.replace(CONFIG, remat="nothing_saveable"))
    clip = roofline.pass_flops(tiny.MODEL, tiny.GRID, 6, 6).total
    blocks = sum(
        roofline.pass_flops(tiny.MODEL, tiny.GRID, 3, keys).total for keys in (3, 6)
    )

    plain, repeated = (
        {one.name: one.again for one in mean_uses(each, every=2)}
        for each in (spec, again)
    )

    assert plain["critic's gradient"] == 0
    assert repeated["critic's gradient"] == pytest.approx(clip)
    # The generator's gradient runs each block forward again in any case.
    assert plain["generator's gradient"] == pytest.approx(blocks)
    assert repeated["generator's gradient"] == pytest.approx(2 * blocks)


def test_later_chunks_see_a_full_cache_and_the_junction():
    section = dataclasses.replace(
        CONFIG.distillation, policy="anchor_forcing", frames=21, length=93,
        switches=(21, 39),
    )  # fmt: skip
    spec = spec_of(dataclasses.replace(CONFIG, distillation=section))
    (rollout, *_) = mean_uses(spec, every=2)
    blocks = 93 // 3

    def block(keys):
        return roofline.pass_flops(tiny.MODEL, tiny.GRID, 3, keys).total

    # Blocks at 0, 3, 6 see their past; those up to the mean switch frame, 30, a window
    # of 12; later ones also 3 frames of the junction.
    keys = [3, 6, 9] + [12] * 8 + [15] * (blocks - 11)
    chunks = len(spec.plan.chunks(None))
    expected = 2.5 * sum(map(block, keys)) / chunks
    assert rollout.flops == pytest.approx(expected)
    assert rollout.passes == pytest.approx(2.5 * blocks / chunks)


def test_a_regression_is_one_gradient():
    model = dataclasses.replace(tiny.MODEL, remat="nothing_saveable")
    whole = roofline.pass_flops(model, tiny.GRID, 6, 6).total

    (use,) = clip_uses(RegressionSpec(model), tiny.GRID, 6)

    assert (use.flops, use.again) == (3 * whole, whole)
    rows, columns = tiny.GRID.tokens(model.patch)
    assert use.live == 6 * rows * columns


def test_blocks_of_a_regression_see_what_came_before():
    def seen(**fields):
        spec = RegressionSpec(tiny.MODEL, blocks=(3, 3), **fields)
        return clip_uses(spec, tiny.GRID, 6)

    first, second = (
        roofline.pass_flops(tiny.MODEL, tiny.GRID, 3, keys).total for keys in (3, 6)
    )

    assert seen(forcing="noise")[0].flops == pytest.approx(3 * (first + second))
    assert seen(forcing="noise", window=3)[0].flops == pytest.approx(6 * first)
    clean = seen(forcing="teacher")[0]
    assert clean.flops == pytest.approx(6 * (first + second))
    gradient, guide = seen(forcing="noise", teacher=tiny.MODEL, guidance=2.0)
    assert guide.flops == pytest.approx(2 * (first + second))
    assert not guide.backward and gradient.backward
