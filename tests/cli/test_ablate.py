"""The ablation command: which arms it trains and measures, and what it keeps."""

import json
import types

import bundles
import pytest

from anchor_jax.cli.main import main
from anchor_jax.tiny_world import ablation
from anchor_jax.training import run


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """The configs of the trainings that are started, which end at once."""
    bundles.save(tmp_path / "start")
    configs = []

    def open_training(config, tell):
        configs.append(config)
        bundles.save(config.out)
        return types.SimpleNamespace(run=lambda: config.steps)

    def measure(model, setup, trial, start):
        speed = 1.0 + (setup.policy.junction is not None)
        return [{"speed": speed}] * trial.scripts

    monkeypatch.setattr(run, "open_training", open_training)
    monkeypatch.setattr(ablation, "measure", measure)
    return configs


def ablate(folder, *more):
    flags = ["--scripts=2", "--starts=2", "--steps=7", "--teacher=there"]
    start = f"--config.weights={folder / 'start'}"
    out = f"--out={folder / 'arms'}"
    return main(["ablate", "--part=trained", start, out, *flags, *more])


@pytest.mark.slow
def test_arms_start_equally_and_differ_in_their_memory(opened, tmp_path, capsys):
    assert ablate(tmp_path) == 0

    trained = {(one.distillation.policy, one.seed) for one in opened}
    assert trained == {
        (policy, seed) for policy in ablation.TRAINED.values() for seed in (0, 1)
    }
    assert {one.weights for one in opened} == {str(tmp_path / "start")}
    assert {(one.teacher, one.steps) for one in opened} == {("there", 7)}
    found = json.loads((tmp_path / "arms" / "trained.json").read_text())["arms"]
    assert found["both"]["speed"]["value"]["mean"] == 2.0
    assert "tri-region RoPE, anchor re-cache" in capsys.readouterr().out


def test_a_training_that_was_stopped_is_not_measured(
    opened, tmp_path, monkeypatch, capsys
):
    stopped = types.SimpleNamespace(run=lambda: 3)
    monkeypatch.setattr(run, "open_training", lambda config, tell: stopped)

    assert ablate(tmp_path, "--arms=both") == 130

    assert "Stopped at 3/7. Rerun this command to resume." in capsys.readouterr().err
    assert not list(tmp_path.glob("arms/**/*.json"))


def test_what_only_trained_arms_read_is_refused_for_swaps(capsys):
    for flag in ("--steps=3", "--teacher=runs/teacher"):
        assert main(["ablate", flag]) == 2
        assert "needs --part=trained; --part=swaps" in capsys.readouterr().err
