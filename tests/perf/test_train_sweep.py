"""The ranking of meshes and rematerialisation policies."""

import dataclasses
import json
import math

import pytest

from anchor_jax.cli import main, plan_tables
from anchor_jax.cli import plan as command
from anchor_jax.errors import UserError
from anchor_jax.perf import targets, train_plan, train_sweep
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.training.stages.regression import RegressionConfig
from anchor_jax.wan.spec import WAN_1_3B, WAN_14B
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.vae import VaeConfig

HELD = {"param_dtype": "bfloat16"}
NETWORKS = train_plan.NetworkSizes(
    dataclasses.replace(WAN_1_3B, **HELD),
    dataclasses.replace(WAN_14B, **HELD),
    VaeConfig(**HELD),
    TextConfig(**HELD),
)
CONFIG = TrainConfig(
    stage="regression",
    batch=16,
    mesh=(1, -1, 1, 1),
    regression=RegressionConfig(forcing="noise"),
)
TWO_NODES = targets.parse_topology("a100:2x8")


def test_meshes_divide_the_chips_the_batch_and_the_heads():
    found = list(train_sweep.meshes(16, CONFIG, NETWORKS))

    # 12 and 40 heads are divided by 1, 2 and 4.
    shared = {context * tensor for _, _, context, tensor in found}
    assert shared == {1, 2, 4} and len(set(found)) == len(found)
    assert {(2, 8, 1, 1), (1, 4, 1, 4), (1, 4, 2, 2), (2, 4, 2, 1)} <= set(found)
    assert all(math.prod(shape) == 16 for shape in found)
    quarter = dataclasses.replace(CONFIG, batch=4)
    for _, _, context, tensor in train_sweep.meshes(16, quarter, NETWORKS):
        assert context * tensor == 4
    kept = dataclasses.replace(CONFIG, mesh=(1, -1, 2, 1))
    assert {shape[2] for shape in train_sweep.meshes(16, kept, NETWORKS)} == {2}


def test_every_part_of_a_batch_has_videos_for_all_chips():
    parts = dataclasses.replace(CONFIG, microbatches=4)

    found = list(train_sweep.meshes(16, parts, NETWORKS))

    # 16 videos in four parts: four at once.
    assert found and all(data * fsdp == 4 for data, fsdp, _, _ in found)
    ranked = train_sweep.rank(TWO_NODES, parts, NETWORKS)
    assert {one.config.mesh for one in ranked} == set(found)
    assert all(one.config.microbatches == 4 for one in ranked)


def test_heads_are_split_over_tensor_and_context():
    kept = dataclasses.replace(CONFIG, mesh=(1, -1, 4, 1), batch=4)

    found = list(train_sweep.meshes(16, kept, NETWORKS))

    # 12 and 40 heads have at most four parts.
    assert found and {shape[2:] for shape in found} == {(4, 1)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": 5}, "config.batch=5: no mesh of 16 chips.*of 16, such as 16$"),
        (
            {"batch": 15, "microbatches": 3},
            "config.batch=15 with config.microbatches=3: .*of 48, such as 48$",
        ),
        (
            {"batch": 6, "microbatches": 4, "mesh": (1, -1, 2, 1)},
            "batch=6 with config.microbatches=4 and context=2 in config.mesh: no mesh"
            ".*of 32, such as 32$",
        ),
        (
            {"mesh": (1, -1, 8, 1)},
            "batch=16 and context=8 in .*; context must divide the chips and the 12 and"
            " 40 heads$",
        ),
    ],
)
def test_a_batch_that_no_mesh_divides_is_refused(change, message):
    odd = dataclasses.replace(CONFIG, **change)

    with pytest.raises(UserError, match=message):
        train_sweep.rank(TWO_NODES, odd, NETWORKS)


def test_the_fastest_come_first():
    ranked = train_sweep.rank(TWO_NODES, CONFIG, NETWORKS)

    seconds = [one.seconds for one in ranked]
    assert seconds == sorted(seconds)
    assert len(ranked) == 3 * len(list(train_sweep.meshes(16, CONFIG, NETWORKS)))
    # Recomputation takes time, and so do sums over split heads.
    by_name = {(one.config.mesh, one.config.remat): one.seconds for one in ranked}
    split, heads = (1, 16, 1, 1), (1, 4, 1, 4)
    assert by_name[split, "none"] < by_name[split, "nothing_saveable"]
    assert by_name[split, "none"] < by_name[heads, "none"]
    # The ranking has the seconds of the plan itself.
    one = ranked[0]
    report = train_plan.plan(TWO_NODES, one.config, NETWORKS, compiles=False)
    assert report.estimate.step.seconds == pytest.approx(one.seconds)


def test_meshes_that_split_the_sides_of_a_slice_are_ranked_too():
    pod = targets.parse_topology("v6e:8x8")
    config = dataclasses.replace(CONFIG, batch=64)

    fitting, others = train_sweep.best(pod, config, NETWORKS, count=50)

    made = {one.config.mesh for one in (*fitting, *others)}
    assert made == {one.config.mesh for one in train_sweep.rank(pod, config, NETWORKS)}
    assert (4, 16, 1, 1) in made


def test_only_what_fits_is_chosen():
    fitting, others = train_sweep.best(TWO_NODES, CONFIG, NETWORKS, count=2)

    assert len(fitting) == 2 and others
    assert all(one.report.fits for one in fitting)
    # 21 frames without recomputation fit on no chip.
    assert {one.config.remat for one in others} >= {"none"}
    assert all(one.seconds <= fitting[-1].seconds for one in others)


def test_the_command_ranks_and_plans_the_best_three(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "_prepare_environment", lambda: None)
    file = tmp_path / "sweep.json"

    status = main.main(
        [
            "plan",
            "--config=configs/train_causal.py",
            "--config.batch=16",
            "--topology=a100:2x8",
            "--sweep",
            "--nocompile",
            f"--json={file}",
        ]
    )

    assert status == 0
    shown = capsys.readouterr().out
    assert "a100:2x8, sweep" in shown
    written = json.loads(file.read_text())
    ranking = written.pop("a100:2x8, sweep")["ranking"]
    assert len([row for row in ranking if row["fits"]]) == 3 == len(written)
    assert all(summary["fits"] for summary in written.values())
    lines = plan_tables.ranking(ranking)
    assert "\n".join(lines) in shown and len(lines) == 1 + 3 + 1
    assert "faster ones do not fit; the fastest of them:" in lines[-1]


def test_a_sweep_chooses_the_policy_itself(monkeypatch, capsys):
    monkeypatch.setattr(command, "_prepare_environment", lambda: None)
    given = ["plan", "--config=configs/train_dmd.py", "--sweep", "--remat=none"]

    assert main.main([*given, "--topology=v5p:4x4x4"]) == 2
    assert "--remat and --sweep" in capsys.readouterr().err
