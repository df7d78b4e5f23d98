import pytest

from anchor_jax import machine
from anchor_jax.wan.spec import WAN_2_1

GB = 10**9


@pytest.fixture
def on_chip(monkeypatch, tmp_path):
    """Makes the report see one accelerator of a kind, with so much memory."""

    def use(kind, place, memory):
        device = {
            "platform": place, "kind": kind, "count": 1, "cores": 4, "memory": memory,
        }  # fmt: skip
        monkeypatch.setattr(machine, "_device", lambda: device)
        return machine.examine(cache=tmp_path)

    return use


def row(report, model, size):
    (found,) = [
        row for row in report["sizes"] if (row["model"], row["size"]) == (model, size)
    ]
    return found


@pytest.mark.slow
def test_weights_that_cannot_be_read_are_something_to_do(tmp_path):
    report = machine.examine(str(tmp_path / "nowhere"), tmp_path)

    (problem,) = [line for line in report["do"] if "nowhere" in line]
    assert f"do: {problem}" in machine.lines(report)


def test_a_known_chip_is_judged_by_its_data_sheet(on_chip):
    report = on_chip("NVIDIA H100 80GB HBM3", "gpu", 80 * GB)

    first = row(report, "1.3B", "480x832")
    assert report["speed"]["flops"] == 989e12
    assert report["kernels"]["1.3B"] == "cudnn"
    assert report["kernels"]["tiny"] == "plain"
    assert first["fits"] == "yes"
    assert first["frames_per_second"] == pytest.approx(
        WAN_2_1.strides[0] * 3 * 989e12 * 0.4 / (5 * 32.331e12 + 40.65e12), rel=1e-3
    )
    assert report["do"] == []
    assert "do: nothing; no problems" in machine.lines(report)


def test_a_small_chip_frees_the_text_encoder(on_chip):
    report = on_chip("TPU v5 lite", "tpu", 16 * GB)

    assert report["kernels"]["1.3B"] == "splash"
    assert row(report, "1.3B", "320x576")["fits"] == "freed"
    assert row(report, "14B", "480x832")["fits"] == "no"
    assert any("text_encoder=free" in line for line in report["do"])
    assert any("less than real time" in line for line in report["do"])


def test_memory_that_jax_may_not_use_is_reported(on_chip):
    report = on_chip("NVIDIA H200", "gpu", 105 * GB)

    assert any("XLA_PYTHON_CLIENT_MEM_FRACTION" in line for line in report["do"])


def test_a_chip_without_room_for_any_model_is_reported(on_chip):
    report = on_chip("NVIDIA A100-SXM4-40GB", "gpu", 4 * GB)

    assert any("no Wan model fits" in line for line in report["do"])


@pytest.mark.slow
def test_missing_parts_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_has", lambda part: part != "av")

    report = machine.examine(cache=tmp_path)

    assert any(line.startswith("pip install av") for line in report["do"])
    assert "av missing (videos)" in "\n".join(machine.lines(report))


@pytest.mark.slow
def test_a_missing_cache_of_programs_is_reported():
    report = machine.examine()

    assert report["compiled"] == {"folder": None, "bytes": 0}
    assert any("every run compiles again" in line for line in report["do"])
