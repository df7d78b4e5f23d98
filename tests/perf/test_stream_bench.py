"""The benchmark: what it reports of a small stream."""

import json
import os

import numpy as np
import pytest

from anchor_jax.cli.main import main
from anchor_jax.config import load_config
from anchor_jax.errors import UserError
from anchor_jax.perf import roofline
from anchor_jax.perf import stream_bench as bench

SMALL = [
    "--config.model.dim=32",
    "--config.model.ffn_dim=64",
    "--config.model.num_heads=2",
    "--config.model.num_layers=2",
    "--config.model.text_dim=16",
    "--config.model.text_len=8",
    "--config.text.dim=16",
    "--config.text.attention_dim=16",
    "--config.text.ffn_dim=32",
    "--config.text.num_heads=2",
    "--config.text.num_layers=1",
    "--config.text.text_len=8",
    "--config.vae.base_dim=4",
    "--config.height=4",
    "--config.width=6",
    "--config.frames=18",
    "--config.switch_frame=9",
    "--config.repeats=1",
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.json"

    assert main(["bench", "--config=bench_medium", *SMALL, f"--out={path}"]) == 0

    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_blocks_are_counted_with_the_keys_that_they_saw(measured):
    block = measured["block"]
    workload = bench.make_workload(load_config("bench_medium", SMALL))
    model, grid = workload.setup.model, workload.setup.grid

    assert block["keys"] == [3, 6, 9, 12, 12, 12]
    np.testing.assert_allclose(
        block["flops"],
        [5 * roofline.pass_flops(model, grid, 3, keys).total for keys in block["keys"]],
    )
    assert block["cpu_seconds"]["min"] <= block["cpu_seconds"]["median"]
    assert block["cpu_seconds"]["median"] <= block["cpu_seconds"]["max"]


@pytest.mark.slow
def test_every_program_is_traced_once(measured):
    assert measured["traces"] == {"advance": 1, "switch": 1, "decode": 2}


@pytest.mark.slow
def test_every_phase_has_times_and_an_efficiency(measured):
    phases = measured["phases"]

    assert set(phases) == {
        *("text", "project", "switch", "decode", "levels", "clean pass"),
    }
    for name in ("text", "project", "switch", "decode"):
        assert phases[name]["cpu_seconds"] > 0
        expected = phases[name]["flops"] / phases[name]["cpu_seconds"]
        expected /= measured["matmul"]["flops_per_second"]
        assert phases[name]["efficiency"] == pytest.approx(expected)


@pytest.mark.slow
def test_latencies_and_sizes_are_reported(measured):
    parts = [measured["phases"][name]["seconds"] for name in ("text", "project")]

    assert measured["switch_latency_seconds"] == pytest.approx(
        sum(parts) + measured["phases"]["switch"]["seconds"]
    )
    assert measured["first_frame_seconds"] > sum(parts)
    speed = measured["frames_per_second"]
    assert speed["with decoding"] < speed["without decoding"]
    assert speed["without decoding"] == pytest.approx(
        12 / measured["block"]["seconds"]["median"]
    )
    # Keys and values of 12 latent frames of 6 tokens, and a few integers.
    assert 0 <= measured["cache_bytes"] - 2 * 2 * 12 * 6 * 32 * 4 < 1000


@pytest.mark.parametrize(
    "override, reason",
    [
        ("--config.switch_frame=10", "switch_frame=10: must be a multiple"),
        ("--config.repeats=0", "repeats=0"),
        ("--config.attention=cudnn", "it computes in bfloat16"),
        ("--config.policy=anchor", "unknown policy 'anchor'"),
        ("--config.rules=old", "rules='old'"),
    ],
)
def test_a_wrong_field_is_named(override, reason):
    with pytest.raises(UserError, match=reason):
        bench.make_workload(load_config("bench_medium", [*SMALL, override]))


def test_the_full_config_is_the_published_model():
    workload = bench.make_workload(load_config("bench_full"))
    model = workload.setup.model

    assert roofline.model_params(model) == 1_418_996_800
    assert roofline.text_params(workload.text) == 5_680_910_336
    assert (model.dtype, model.param_dtype) == ("bfloat16", "bfloat16")
    assert workload.setup.grid.tokens(model.patch) == (30, 52)


def test_more_cores_than_there_are_are_refused(capsys):
    before = os.sched_getaffinity(0)

    assert main(["bench", "--config=bench_medium", "--threads=4096"]) == 2

    assert "--threads=4096" in capsys.readouterr().err
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("policy=self_forcing", "frames=30"),
        ("policy=causvid", "policy='causvid'"),
        ("frames=31", "frames=31"),
        ("height=5", "5x26"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(override, named):
    with pytest.raises(UserError, match=named):
        bench.make_workload(load_config("bench_medium", [f"--config.{override}"]))
