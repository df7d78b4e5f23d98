"""Steps of a training compiled for a mesh, from shapes alone."""

import dataclasses
import json

import jax
import pytest

from anchor_jax import trees
from anchor_jax.cli import main, plan_tables
from anchor_jax.cli import plan as command
from anchor_jax.errors import UserError
from anchor_jax.perf import compiling, targets
from anchor_jax.perf import train_plan as plan
from anchor_jax.training.stages import build
from anchor_jax.training.stages.build import LoraConfig, TrainConfig
from anchor_jax.training.stages.distillation import DistillationConfig
from anchor_jax.training.stages.regression import RegressionConfig
from anchor_jax.wan.spec import ModelConfig
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.vae import VaeConfig

GB = 10**9
SMALL = ModelConfig(
    dim=64, ffn_dim=256, num_heads=2, num_layers=8, freq_dim=32, text_dim=32,
    text_len=16, param_dtype="bfloat16",
)  # fmt: skip
NETWORKS = plan.NetworkSizes(
    SMALL,
    dataclasses.replace(SMALL, dim=128),
    VaeConfig(base_dim=8),
    TextConfig(
        vocab=64,
        dim=32,
        attention_dim=32,
        ffn_dim=64,
        num_heads=2,
        num_layers=1,
        text_len=16,
    ),
)
DISTILL = TrainConfig(
    batch=4,
    mesh=(1, 4, 1, 1),
    size="64x64",
    distillation=DistillationConfig(frames=6, length=9, switches=(6,)),
)


def on_paper(config):
    return plan.on_paper(config, NETWORKS, build.make_mesh(config))


def compiled(config, name):
    prepared = on_paper(config)
    program = plan.programs(prepared, config, NETWORKS)[name]
    with jax.set_mesh(prepared.compiled.mesh):
        return compiling.compile_program(program)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, names",
    [
        (
            {},
            {
                "generator, first chunk",
                "critic, first chunk",
                "generator, switch",
                "critic, switch",
                "generator update",
                "critic update",
            },
        ),
        (
            {
                "stage": "regression",
                "regression": RegressionConfig(forcing="noise", endpoints=True),
            },
            {"step"},
        ),
        (
            {
                "stage": "regression",
                "regression": RegressionConfig(forcing="teacher", guidance=5.0),
            },
            {"step"},
        ),
    ],
    ids=["distill", "regress", "guided"],
)
def test_a_step_has_these_programs_and_no_arrays(change, names):
    config = dataclasses.replace(DISTILL, **change)
    prepared = on_paper(config)

    found = plan.programs(prepared, config, NETWORKS)

    assert set(found) == names
    for leaf in jax.tree.leaves((prepared.state, [p.args for p in found.values()])):
        assert isinstance(leaf, jax.ShapeDtypeStruct)


def test_weights_are_split_and_low_rank_updates_are_few():
    whole = on_paper(dataclasses.replace(DISTILL, mesh=(4, 1, 1, 1)))
    split = on_paper(DISTILL)
    low = on_paper(dataclasses.replace(DISTILL, lora=LoraConfig(rank=2)))

    by_four = trees.shard_nbytes(whole.state.generator) / 4
    assert trees.shard_nbytes(split.state.generator) == pytest.approx(by_four, rel=0.05)
    assert trees.shard_nbytes(low.state.generator) < by_four / 4
    frozen = (low.compiled.frozen, split.compiled.frozen)
    assert trees.shard_nbytes(frozen[0]) > trees.shard_nbytes(frozen[1])


@pytest.mark.slow
def test_recomputing_activations_takes_less_memory():
    kept = compiled(DISTILL, "critic, first chunk")
    again = dataclasses.replace(DISTILL, remat="nothing_saveable")
    recomputed = compiled(again, "critic, first chunk")

    assert recomputed.temporaries < 0.7 * kept.temporaries
    assert recomputed.arguments == kept.arguments


@pytest.mark.slow
def test_a_plan_counts_what_stays_and_names_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(
        targets, "devices_of", lambda topology: jax.devices()[: topology.chips]
    )
    section = RegressionConfig(block=3, blocks=2)
    config = dataclasses.replace(DISTILL, stage="regression", regression=section)

    one = plan.plan(targets.topology("h100", 4), config, NETWORKS, keep=tmp_path)

    held = on_paper(config).state
    assert one.resident["generator"] == trees.shard_nbytes(held.generator) > 0
    assert one.resident["critic"] == one.resident["rollout"] == 0
    assert one.resident["text encoder"] > 64 * 32
    assert one.programs["text encoder"].outputs > 0
    assert one.needed > sum(one.resident.values()) + one.gradient
    assert one.problems()[0] == "step: no fused attention kernel"
    sent = {row.kind: row for row in one.programs["step"].traffic}
    assert sent["all-gather"].inside > 0 and sent["all-gather"].between == 0
    assert [file.name for file in tmp_path.iterdir()] == ["h100-1x4-step.txt"]


def test_a_trained_text_encoder_is_refused():
    section = RegressionConfig(text=True)
    config = dataclasses.replace(DISTILL, stage="regression", regression=section)

    with pytest.raises(UserError, match="add --config.regression.text=False"):
        on_paper(config)


def made(temporaries, **changes):
    values = dict(outputs=GB, temporaries=temporaries, fused=2)
    return compiling.Compiled(**{
        **dict(seconds=1.0, arguments=0, code=0, scores=(), reads=frozenset()),
        **values,
        **changes,
    })  # fmt: skip


def report(**programs):
    resident = {"generator": 10 * GB, "optimizers": 20 * GB}
    programs = {name.replace("_", " "): one for name, one in programs.items()}
    return plan.TrainingReport(
        targets.TARGETS["h100"], {"fsdp": 8}, programs, resident, 5 * GB
    )


def test_memory_is_what_stays_and_the_largest_program():
    one = report(generator=made(40 * GB), critic_update=made(GB, fused=0))

    assert one.needed == (10 + 20 + 5 + 1 + 40) * GB
    assert one.problems() == ()


def test_a_program_that_does_not_fit_is_reported_with_a_remedy():
    refused = compiling.Refused("does not fit: Used 99G", 0, frozenset())

    for one in (report(critic=made(60 * GB)), report(critic=refused)):
        assert "--remat=nothing_saveable" in one.problems()[-1]
    found = report(generator=made(GB), critic=refused)
    assert "critic: does not fit: Used 99G" in found.problems()
    shown = "\n".join(plan_tables.training_table("h100", found.summary()))
    assert "37.0 GB (only programs that fit are counted)" in shown


def test_a_kernel_that_is_too_large_asks_for_no_memory():
    refused = compiling.Refused("a kernel takes 17M of vector memory", 0, frozenset())

    (problem,) = report(generator=made(GB), critic=refused).problems()

    assert problem == "critic: a kernel takes 17M of vector memory"


def test_score_matrices_and_a_missing_kernel_are_problems():
    one = report(critic=made(GB, fused=0, scores=("f32[9,9]",)))

    assert one.problems() == (
        "critic: no fused attention kernel",
        "critic: score matrices f32[9,9]",
    )


def test_a_report_is_shown_and_can_be_written():
    one = report(generator=made(40 * GB), critic_update=made(GB, fused=None))
    summary = json.loads(json.dumps(one.summary()))

    shown = "\n".join(plan_tables.training_table("h100, remat none", summary))

    assert "h100, remat none: H100 SXM, 80 GB" in shown
    assert "fsdp 8" in shown
    assert "needed per chip: 76.0 GB" in shown
    assert any(line.split()[-1:] == ["-"] for line in shown.splitlines())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--remat=some"], "--remat='some'"),
        (["--teacher=7B"], "--teacher='7B'"),
        (["--config.batch=0"], "config.batch=0: must be at least 1"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(
    monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(command, "_prepare_environment", lambda: None)

    given = ["plan", "--config=configs/train_dmd.py", "--target=v5p", *arguments]
    assert main.main(given) == 2
    assert message in capsys.readouterr().err


def test_a_field_of_a_config_needs_the_config(capsys):
    assert main.main(["plan", "--config.batch=3"]) == 2
    assert "--config is missing" in capsys.readouterr().err
