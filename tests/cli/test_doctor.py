import json
import time

import pytest

from anchor_jax.cli import compile_cache, doctor, main
from anchor_jax.perf import roofline

GB = 10**9


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty home, so that no cache of another run is looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile_cache, "enable", lambda: tmp_path)
    (tmp_path / "program").write_bytes(b"x" * 1000)
    return tmp_path


@pytest.fixture
def on_chip(monkeypatch, cache):
    """Makes the command see one accelerator of a kind, with so much memory."""

    def use(kind, place, memory):
        device = {
            "platform": place, "kind": kind, "count": 1, "cores": 4, "memory": memory,
        }  # fmt: skip
        monkeypatch.setattr(doctor, "_device", lambda: device)
        return doctor.examine()

    return use


def row(report, model, size):
    (found,) = [
        row for row in report["sizes"] if (row["model"], row["size"]) == (model, size)
    ]
    return found


def test_it_runs_on_this_machine_without_weights(cache, capsys):
    began = time.perf_counter()

    assert main.main(["doctor"]) == 0

    shown = capsys.readouterr().out
    assert time.perf_counter() - began < 60
    assert "(cpu, " in shown
    assert "heads for tiny" in shown
    assert f"compiled   {cache}, 0.0 MB" in shown
    assert "do: use a GPU or TPU" in shown
    assert shown.count("1.3B ") == 3


def test_json_is_one_object_with_every_number(cache, capsys):
    assert main.main(["doctor", "--json", "--weights=tiny"]) == 0

    report = json.loads(capsys.readouterr().out)
    assert report["compiled"]["bytes"] == 1000
    assert report["weights"]["items"]["generator"] > 1_000_000
    assert report["speed"]["flops"] > 1e8
    assert len(report["sizes"]) == 6
    assert report["device"]["memory"] > 0


def test_weights_that_cannot_be_read_are_something_to_do(cache, tmp_path):
    report = doctor.examine(str(tmp_path / "nowhere"))

    (problem,) = [line for line in report["do"] if "nowhere" in line]
    assert f"do: {problem}" in doctor.lines(report)


def test_a_known_chip_is_judged_by_its_data_sheet(on_chip):
    report = on_chip("NVIDIA H100 80GB HBM3", "gpu", 80 * GB)

    first = row(report, "1.3B", "480x832")
    assert report["speed"]["flops"] == 989e12
    assert report["kernels"]["1.3B"] == "cudnn"
    assert report["kernels"]["tiny"] == "plain"
    assert first["fits"] == "yes"
    assert first["frames_per_second"] == pytest.approx(
        roofline.PIXEL_FRAMES * 3 * 989e12 * 0.4 / (5 * 32.331e12 + 40.65e12), rel=1e-3
    )
    assert report["do"] == []
    assert "do: nothing; no problems" in doctor.lines(report)


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


def test_a_chip_without_room_for_any_model_is_told_so(on_chip):
    report = on_chip("NVIDIA A100-SXM4-40GB", "gpu", 4 * GB)

    assert any("no Wan model fits" in line for line in report["do"])


def test_missing_parts_are_named(cache, monkeypatch):
    monkeypatch.setattr(doctor, "_has", lambda part: part != "av")

    report = doctor.examine()

    assert any(line.startswith("pip install av") for line in report["do"])
    assert "av missing (videos)" in "\n".join(doctor.lines(report))
