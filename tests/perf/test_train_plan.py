"""Steps of a training compiled for a mesh, from shapes alone."""

import dataclasses
import json
import pathlib
import shlex

import jax
import pytest

from anchor_jax import trees
from anchor_jax.cli import main, plan_tables
from anchor_jax.cli import plan as command
from anchor_jax.config import find_config, load_config
from anchor_jax.errors import UserError
from anchor_jax.perf import compiling, targets
from anchor_jax.perf import train_plan as plan
from anchor_jax.perf.links import Traffic
from anchor_jax.perf.work import Cost
from anchor_jax.training.run import read_config
from anchor_jax.training.stages import build
from anchor_jax.training.stages.build import LoraConfig, TrainConfig
from anchor_jax.training.stages.distillation import DistillationConfig
from anchor_jax.training.stages.regression import RegressionConfig
from anchor_jax.wan.spec import WAN_1_3B, WAN_14B, ModelConfig
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.vae import VaeConfig

ROOT = pathlib.Path(__file__).parents[2]
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

    sizes = {"matrices": 0, "vectors": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole.state.generator):
        is_matrix = path[-1].key == "kernel"
        sizes["matrices" if is_matrix else "vectors"] += trees.nbytes(leaf)
    expected = sizes["matrices"] / 4 + sizes["vectors"]
    assert trees.shard_nbytes(split.state.generator) == expected
    assert trees.shard_nbytes(low.state.generator) < sizes["matrices"] / 16
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
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "h100-1x4-mesh-1x4x1x1-none-step.txt",
        "h100-1x4-mesh-1x4x1x1-none-text-encoder.txt",
    ]


def test_programs_of_each_mesh_and_policy_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(
        targets, "devices_of", lambda topology: jax.devices()[: topology.chips]
    )

    def compile_program(program, layout=None, keep=None):
        keep.write_text("HloModule")
        return made(GB)

    monkeypatch.setattr(compiling, "compile_program", compile_program)
    four = targets.topology("h100", 4)
    section = RegressionConfig(block=3, blocks=2)
    config = dataclasses.replace(DISTILL, stage="regression", regression=section)

    for mesh, remat in (((1, 4, 1, 1), "none"), ((2, 2, 1, 1), "nothing_saveable")):
        one = dataclasses.replace(config, mesh=mesh, remat=remat)
        plan.plan(four, one, NETWORKS, keep=tmp_path)

    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"h100-1x4-mesh-{name}.txt"
        for name in (
            "1x4x1x1-none-step",
            "1x4x1x1-none-text-encoder",
            "2x2x1x1-nothing_saveable-step",
            "2x2x1x1-nothing_saveable-text-encoder",
        )
    ]


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

    one = report(generator=made(GB), critic=refused)
    (problem,) = one.problems()

    assert problem == "critic: a kernel takes 17M of vector memory"
    assert not one.fits and not one.lacks_memory
    shown = "\n".join(plan_tables.training_table("h100", one.summary()))
    assert "a program is refused" in shown


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


PAPER = plan.NetworkSizes(
    dataclasses.replace(WAN_1_3B, param_dtype="bfloat16"),
    dataclasses.replace(WAN_14B, param_dtype="bfloat16"),
    VaeConfig(param_dtype="bfloat16"),
    TextConfig(param_dtype="bfloat16"),
)


def long_tuning(**changes):
    config = read_config(load_config(str(find_config("train_streaming.py"))))
    return dataclasses.replace(config, **changes)


def test_the_papers_training_is_estimated_without_a_compiler():
    config = long_tuning(batch=56, mesh=(7, 8, 1, 1))
    seven = targets.parse_topology("a100:7x8")

    made = plan.plan(seven, config, PAPER, compiles=False)

    assert made.programs == {} and made.fits and not made.is_close
    # Compiled for 64 H100 as 4 x 16: launch/results/chips.md.
    assert made.estimate.working / GB == pytest.approx(15.8, rel=0.1)
    assert made.needed > sum(made.resident.values()) + made.estimate.working
    step = made.estimate.step
    assert step.flops / 56 == pytest.approx(2700e12, rel=0.02)
    hours = Cost(3000, 56, step.seconds).chip_hours
    assert 1100 < hours < 1200
    sent = {row.kind: row for row in step.traffic}
    # Weights are gathered inside a node; only gradients cross.
    assert sent["all-gather"].between == 0 < sent["all-reduce"].between
    parts = made.summary()["formula"]["parts"]
    assert sum(parts.values()) == pytest.approx(step.flops + step.again)
    assert {name.split(":")[0] for name in parts} == {"critic", "generator"}


def test_a_training_that_does_not_fit_is_given_a_setting_that_does():
    config = long_tuning(mesh=(8, 8, 1, 1), remat="none")
    small = targets.parse_topology("v6e:8x8")

    made = plan.plan(small, config, PAPER, compiles=False)
    found = plan.find_smaller(small, config, PAPER)

    assert not made.fits
    flags, _, gigabytes = found.rpartition(": ")
    assert flags.startswith('--remat=nothing_saveable --config.mesh="(1,-1,1,1)"')
    assert float(gigabytes.removesuffix(" GB")) * GB < small.target.chip.memory
    problems = dataclasses.replace(made, smaller=found).problems()
    assert problems[-1] == f"by formula it fits with {found}"


def smaller(topology, config, networks=PAPER):
    found = plan.smaller_settings(targets.parse_topology(topology), config, networks)
    return list(found)


def test_smaller_settings_add_up():
    config = dataclasses.replace(
        DISTILL, batch=16, size="480x832", mesh=(2, 2, 1, 1), remat="none"
    )

    found = smaller("h100:4", config)

    split = '--remat=nothing_saveable --config.mesh="(1,-1,1,1)"'
    assert [text for text, _ in found] == [
        "--remat=nothing_saveable",
        split,
        f"{split} --config.microbatches=2",
        f"{split} --config.microbatches=4",
        f"{split} --config.microbatches=4 --config.size=320x576",
    ]
    needed = [report.needed for _, report in found]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == 5
    setting = found[-1][1].estimate.setting
    assert (setting.remat, setting.microbatches) == ("nothing_saveable", 4)
    assert found[-1][1].mesh["fsdp"] == 4


def test_a_mesh_that_the_weights_refuse_is_left_out():
    """Weights of 1,536 rows cannot be split over 56 chips, but over 8."""
    config = long_tuning(batch=112, mesh=(56, 1, 1, 1))

    texts = [text for text, _ in smaller("h100:7x8", config)]

    split = '--config.mesh="(7,-1,1,1)"'
    size = f"{split} --config.microbatches=2 --config.size=320x576"
    assert texts == [split, f"{split} --config.microbatches=2", size]


def test_a_mesh_may_split_the_sides_of_a_slice():
    config = dataclasses.replace(DISTILL, batch=64, mesh=(4, 16, 1, 1))
    pod = targets.parse_topology("v6e:8x8")

    made = plan.plan(pod, config, NETWORKS, compiles=False)

    assert (made.mesh["data"], made.mesh["fsdp"]) == (4, 16)


def with_estimate(**programs):
    config = dataclasses.replace(DISTILL, mesh=(1, -1, 1, 1))
    one = plan.plan(targets.topology("v5e", 4), config, NETWORKS, compiles=False)
    return dataclasses.replace(one, programs=programs)


def test_the_compilers_seconds_weigh_the_slowest_program_of_each_role():
    sent = Traffic("all-gather", 1, 1.0, 1.0, 0.0, seconds=0.25)
    one = with_estimate(
        **{
            "critic, first chunk": made(1, estimate=1.0),
            "critic, switch": made(1, estimate=2.0, traffic=(sent,)),
            "critic update": made(1, estimate=0.125),
            "generator, first chunk": made(1, estimate=10.0),
        }
    )
    attention = [one.estimate.attention_seconds(r) for r in ("critic", "generator")]

    expected = 2.25 + 0.125 + attention[0] + (10.0 + attention[1]) / 5
    assert min(attention) > 0
    assert one.seconds_compiler() == pytest.approx(expected)
    # A GPU's compiler makes no estimate, and a refused program has none.
    assert with_estimate(**{"critic": made(1)}).seconds_compiler() is None
    refused = compiling.Refused("does not fit", 0, frozenset())
    assert with_estimate(**{"critic": refused}).seconds_compiler() is None


def test_a_mean_step_has_the_collectives_of_its_programs():
    def sent(seconds):
        row = Traffic("all-gather", 2, 8.0, 4.0, 1.0, seconds)
        return made(1, traffic=(row,))

    one = with_estimate(
        **{
            "critic, first chunk": sent(0.5),
            "critic, switch": sent(0.25),
            "critic update": sent(0.125),
            "generator, first chunk": sent(1.0),
        }
    )

    step = one.with_programs().estimate.step

    # The slower critic, its update, and a fifth of the generator.
    assert step.traffic == (
        Traffic("all-gather", 4.4, 17.6, 8.8, 2.2, pytest.approx(0.825)),
    )
    assert step.seconds == pytest.approx(max(step.compute, step.memory) + 0.825)
    summary = one.with_programs().summary()
    assert (
        summary["formula"]["has_programs"]
        and not (one.summary()["formula"]["has_programs"])
    )
    shown = "\n".join(plan_tables.training_table("v5e", summary))
    assert "mean step: all-gather" in shown and "formula: all-gather" not in shown


def test_what_the_formula_cannot_decide_is_said():
    one = with_estimate()
    needed = sum(one.resident.values()) + one.gradient + one.estimate.working
    chip = dataclasses.replace(one.target.chip, memory=needed + 1)
    close = dataclasses.replace(one, target=dataclasses.replace(one.target, chip=chip))

    assert close.fits and close.is_close and not one.is_close
    shown = "\n".join(plan_tables.training_table("v5e", close.summary()))
    assert "fits, but within the formula's error" in shown


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(command, "_prepare_environment", lambda: None)
    return main.main(["plan", *arguments])


def test_the_command_says_time_and_cost_beside_the_papers(
    monkeypatch, capsys, tmp_path
):
    file = tmp_path / "plan.json"

    status = run_command(
        monkeypatch,
        "--config=configs/train_streaming.py",
        *("--config.batch=56", "--config.mesh=(7,8,1,1)"),
        *("--topology=h100:7x8,a100:7x8", "--price=2.5", "--mfu=0.5"),
        *("--nocompile", f"--json={file}"),
    )

    shown = capsys.readouterr().out
    assert status == 0
    written = json.loads(file.read_text())
    assert list(written) == [
        "h100:7x8, remat nothing_saveable",
        "a100:7x8, remat nothing_saveable",
    ]
    for summary in written.values():
        cost, step = summary["cost"], summary["formula"]
        assert step["efficiency"] == 0.5 and step["mfu"] < 0.5
        assert cost["chip_hours"] == pytest.approx(3000 * step["seconds"] * 56 / 3600)
        assert cost["total"] == pytest.approx(2.5 * cost["chip_hours"])
        assert f"{cost['total']:,.0f} at 2.5 per chip-hour" in shown
        assert summary["paper"]["chip_hours"] == 1344
    assert "at an assumed 50 % of the peak" in shown
    assert shown.count("the paper: 1,344 A800-hours for 56 videos per step") == 2


def test_the_page_has_the_numbers_of_the_formula(monkeypatch, tmp_path):
    results, file = ROOT / "launch" / "results", tmp_path / "plan.json"
    kept = json.loads((results / "plan_streaming_v6e.json").read_text())
    given = [*shlex.split(kept["command"])[2:], "--nocompile", f"--json={file}"]

    assert run_command(monkeypatch, *given) == 0

    (made,), (shown,) = json.loads(file.read_text()).values(), kept["values"].values()
    assert shown["formula"]["seconds"] == pytest.approx(made["formula"]["seconds"])
    assert shown["formula"]["working"] == pytest.approx(made["formula"]["working"])
    assert shown["resident"] == made["resident"]


@pytest.mark.parametrize(
    "arguments, remedy",
    [
        # A mesh that splits the weights further does not exist.
        (
            ["--topology=h100:7x8", "--config.mesh=(7,8,1,1)", "--config.batch=336"],
            "--config.microbatches=3",
        ),
        # A batch with one video for each chip has no parts.
        (
            ["--topology=v6e:8x8", "--config.mesh=(1,64,1,1)", "--config.size=512x832"],
            "--config.size=480x832",
        ),
    ],
)
def test_the_command_leaves_out_what_the_chips_or_the_batch_refuse(
    monkeypatch, capsys, arguments, remedy
):
    given = ["--config=configs/train_streaming.py", "--nocompile", *arguments]

    assert run_command(monkeypatch, *given) == 0

    assert f"problem: by formula it fits with {remedy}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=configs/train_dmd.py"],
        ["--config=configs/train_streaming.py", "--config.lora.rank=64"],
        ["--config=configs/train_streaming.py", "--config.size=320x576"],
        ["--config=configs/train_streaming.py", "--teacher=1.3B"],
    ],
)
def test_other_trainings_are_not_the_papers(monkeypatch, capsys, arguments):
    assert run_command(monkeypatch, *arguments, "--target=v5p", "--nocompile") == 0

    shown = capsys.readouterr().out
    assert "chip-hours" in shown and "the paper" not in shown


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
