"""What a training's steps move between chips, read from programs for a TPU slice.

A CPU's compiler turns reductions in bfloat16 into float32, and would hide them.
"""

import importlib.util
import json

import pytest
from apart import compile_apart

PROGRAM = """
from anchor_jax.cli import plan
plan._prepare_environment()
import dataclasses, json
import jax
from anchor_jax import sharding
from anchor_jax.perf import hlo, targets, train_plan
from anchor_jax.training.stages import build
from anchor_jax.training.stages.build import LoraConfig
from anchor_jax.training.stages.distillation import DistillationConfig
from anchor_jax.training.stages.regression import RegressionConfig
import test_train_plan as small

model = dataclasses.replace(small.SMALL, num_layers=3)
teacher = dataclasses.replace(model, dim=256)
networks = dataclasses.replace(small.NETWORKS, generator=model, teacher=teacher)
config = dataclasses.replace(
    small.DISTILL, batch=8, mesh=(2, 4, 1, 1), remat="nothing_saveable",
    distillation=DistillationConfig(frames=9, length=15),
)
lora = dataclasses.replace(config, lora=LoraConfig(rank=256))
regression = dataclasses.replace(
    config, stage="regression", distillation=DistillationConfig(),
    regression=RegressionConfig(forcing="teacher", blocks=3),
)
devices = targets.devices_of(targets.parse_topology("v5e:2x4"))

def moved(config, name):
    mesh = build.make_mesh(config, devices)
    prepared = train_plan.on_paper(config, networks, mesh)
    program = train_plan.programs(prepared, config, networks)[name]
    with jax.set_mesh(mesh):
        compiled = program.function.lower(*program.args).compile()
    moved = [
        [one.kind, one.nbytes, one.dtype, one.times]
        for one in hlo.read(compiled.as_text()).collectives
    ]
    return prepared, moved

def split(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size for path, leaf in leaves if path[-1].key == "kernel")

def adapters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

prepared, by_generator = moved(config, "generator, later chunk")
updated, by_lora = moved(lora, "generator, later chunk")
print(json.dumps({
    "generator": split(prepared.state.generator["params"]),
    "critic": split(prepared.state.fake_score["params"]),
    "teacher": split(prepared.compiled.frozen["real_score"]["params"]),
    "lora": adapters(updated.state.generator["lora"]),
    "layers": model.num_layers,
    "programs": {
        "generator, later chunk": by_generator,
        "critic, later chunk": moved(config, "critic, later chunk")[1],
    },
    "with LoRA": by_lora,
    "regression": moved(regression, "step")[1],
}))
"""


@pytest.fixture(scope="module")
def found():
    done = compile_apart(PROGRAM)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def total(collectives, *kinds):
    """Returns the bytes of some kinds, with the iterations of loops."""
    return sum(size * n for kind, size, _, n in collectives if kind in kinds)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu"),
]


def test_a_step_gathers_the_generator_three_times_and_the_teacher_once(found):
    generator, critic, teacher = (
        2 * found[name] for name in ("generator", "critic", "teacher")
    )
    by_generator, by_critic = found["programs"].values()

    # The rollout of each program, and the gradient of the first.
    first, second = 2 * generator + critic + teacher, generator
    # The critic is gathered to run, and again for its gradient.
    second += 2 * critic
    # Matrices of a few rows are not split.
    assert 0.9 * first < total(by_generator, "all-gather") < 1.02 * first
    assert 0.9 * second < total(by_critic, "all-gather") < 1.02 * second


def test_nothing_is_gathered_for_each_block_or_pass(found):
    for collectives in found["programs"].values():
        gathers = [one for one in collectives if one[0] == "all-gather"]
        assert max(times for _, _, _, times in gathers) <= found["layers"]


def test_gradients_are_reduced_once_in_float32(found):
    for name, collectives in found["programs"].items():
        reductions = [one for one in collectives if "reduce" in one[0]]
        assert {dtype for _, _, dtype, _ in reductions} == {"f32"}
        network = found[name.partition(",")[0]]
        scattered = total(collectives, "reduce-scatter")
        assert scattered == pytest.approx(4 * network, rel=0.02)
        # Then over the axis data, a part for each device; vectors are small.
        assert total(collectives, "all-reduce") < 1.3 * 4 * network / 4


def test_low_rank_updates_are_reduced_instead_of_the_matrices(found):
    collectives = found["with LoRA"]
    reductions = [one for one in collectives if "reduce" in one[0]]

    assert {dtype for _, _, dtype, _ in reductions} == {"f32"}
    # Each update is split over fsdp on one side, which is scattered.
    scattered = total(collectives, "reduce-scatter")
    assert 0 < scattered <= 1.02 * 4 * found["lora"]
    assert total(collectives, "all-reduce") < 1.3 * 4 * found["lora"]
    gathers = [one for one in collectives if one[0] == "all-gather"]
    assert max(times for _, _, _, times in gathers) <= found["layers"]


def test_a_regression_reduces_once_in_float32(found):
    collectives, generator = found["regression"], found["generator"]
    reductions = [one for one in collectives if "reduce" in one[0]]

    assert {dtype for _, _, dtype, _ in reductions} == {"f32"}
    assert total(collectives, "reduce-scatter") == pytest.approx(
        4 * generator, rel=0.02
    )
    # To run, and for some of the layers' matrices again for the gradient.
    assert 0.9 * 2 * generator < total(collectives, "all-gather") < 1.02 * 4 * generator
