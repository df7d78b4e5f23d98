import json
import pathlib

import numpy as np
import pytest
import tiny

from anchor_jax import flow
from anchor_jax.cache.policies import Flush, Recache
from anchor_jax.cache.positions import Absolute
from anchor_jax.streaming.types import StreamSetup
from anchor_jax.tiny_world import ablation, events
from anchor_jax.tiny_world import evaluate as world

SETUP = StreamSetup(
    tiny.MODEL, tiny.GRID, ablation.ARMS["both"].policy,
    flow.few_step_levels((1000, 500), 5.0),
)  # fmt: skip
TRIAL = ablation.AblationTrial(scripts=4, starts=1, segments=3, blocks=2, batch=2)


def test_arms_differ_from_the_baseline_in_what_they_are_named_for():
    arms = {name: arm.policy for name, arm in ablation.ARMS.items()}

    assert isinstance(arms["baseline"].positions, Absolute)
    assert isinstance(arms["flush"].positions, Absolute)
    assert isinstance(arms["flush"].on_switch, Flush)
    assert {name for name, one in arms.items() if one.junction} == {"anchors", "both"}
    assert all(one.on_switch == Recache() for k, one in arms.items() if k != "flush")
    assert len(set(arms.values())) == len(arms)


def test_every_arm_sees_the_same_scripts_and_noise(monkeypatch):
    seen = []

    def record(bundle, setup, prompts, blocks, seed, negative_prompt):
        meanings = [[events.parse(text) for text in texts] for texts in prompts]
        seen.append((setup.policy, meanings, blocks, seed))
        return np.zeros((2, 4 * 18 - 3, 64, 64, 3), np.uint8)

    monkeypatch.setattr(world, "generate", record)
    for start in (0, 1):
        found = ablation.measure(None, SETUP, TRIAL, start)
        assert len(found) == 4 and all("all" in one for one in found)

    first, second = seen[:2], seen[2:]
    assert [one[1] for one in first] == [one[1] for one in second]
    assert not {one[3] for one in first} & {one[3] for one in second}
    assert all(one[2] == (2, 2, 2) for one in seen)


def test_a_script_counts_once_however_many_starts():
    base = [[{"speed": 0.0, "all": 1.0}, {"speed": 1.0, "all": 0.0}]] * 3
    better = [[{"speed": 0.5, "all": 1.0}, {"speed": 1.5, "all": 0.0}]] * 3

    found = ablation.summarize({"baseline": base, "both": better})

    assert found["both"]["speed"]["value"]["mean"] == 1.0
    assert found["both"]["speed"]["value"]["n"] == 2
    assert found["both"]["speed"]["difference"] == {
        "mean": 0.5, "n": 2, "low": 0.5, "high": 0.5,
    }  # fmt: skip
    assert found["both"]["recalled"]["value"] is None
    text = ablation.table(found)
    assert "1.00 ± 0.98 (n=2)" in text and "| 73 | 23.85 |" in text
    assert "+0.50 ± 0.00 (n=2)" in text


def test_each_start_has_a_mean_of_its_own():
    starts = [[{"speed": 1.0}, {"speed": 2.0}], [{"speed": 3.0}, {}], [{}, {}]]

    found = ablation.summarize({"baseline": starts})

    assert found["baseline"]["speed"]["by_start"] == [1.5, 3.0, None]
    assert "Differences" not in ablation.table(found)
    last = ablation.table(found).splitlines()[-1]
    assert last.startswith("| absolute RoPE, re-cache | 1.50, 3.00, - |")


def test_what_is_measured_is_kept_and_damage_is_measured_again(tmp_path):
    calls = []

    def run():
        calls.append(1)
        return [{"all": 1.0}]

    path = tmp_path / "arm" / "both-0.json"
    for about in ({"seed": 1}, {"seed": 1}, {"seed": 2}):
        assert ablation.measure_once(path, about, run) == [{"all": 1.0}]
    assert len(calls) == 2

    strange = {"about": {"seed": 2}, "streams": [{"all": "1.0"}]}
    damaged = [path.read_text()[:20], "[" * 100_000, "[]", json.dumps(strange)]
    for number, text in enumerate(damaged, 3):
        path.write_text(text)
        assert ablation.measure_once(path, {"seed": 2}, run) == [{"all": 1.0}]
        assert len(calls) == number
        assert json.loads(path.read_text())["about"] == {"seed": 2}


@pytest.fixture(scope="module")
def probed():
    from anchor_jax.weights.load import load_bundle

    model = load_bundle("tiny")
    setup = StreamSetup(model.model, model.grid, SETUP.policy, SETUP.levels)
    return ablation.probe(model, setup, count=8)


@pytest.mark.slow
def test_the_probe_sees_that_a_trained_model_uses_its_past(probed):
    for rows in probed.values():
        assert rows["as laid out"]["n"] == 8
    near = probed["noise level 0.9"]
    assert near["past of another stream"]["low"] > 0
    assert "60 frames further" in ablation.probe_table(probed)


@pytest.mark.parametrize("part", ["swaps", "trained"])
def test_the_shipped_page_has_the_tables_of_the_shipped_numbers(part):
    root = pathlib.Path(__file__).parents[2]
    kept = json.loads((root / "launch" / "ablation" / f"{part}.json").read_text())

    text = ablation.table(kept["arms"])

    assert len(text.split("\n\n")) == 5
    assert text in (root / "launch" / "ablation" / f"{part}.md").read_text()
