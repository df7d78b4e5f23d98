"""Published weights in training: ported, tuned by the release's rules, sampled."""

import json

import bundles
import jax
import numpy as np
import ported
import pytest

from anchor_jax.cli import main
from anchor_jax.compile_cache import CACHE_VARIABLE
from anchor_jax.errors import UserError
from anchor_jax.weights import checkpoint
from anchor_jax.weights.load import load_bundle

RANK = 3  # of the ported updates


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "ported"
    ported.save(folder, "anchor_forcing")
    return folder


@pytest.fixture(scope="module")
def tuned(weights, tmp_path_factory):
    """A run of one step, of both networks, over a prompt switch."""
    folder = tmp_path_factory.mktemp("runs")
    prompts = [folder / "prompts.txt", folder / "switched.txt"]
    for path, texts in zip(prompts, (bundles.RED, bundles.BLUE), strict=True):
        path.write_text(f"{texts}\n" * 2)
    fields = {
        **dict.fromkeys(("weights", "teacher", "critic"), weights),
        "out": folder / "tuned",
        "data.path": prompts[0],
        "data.switch_path": prompts[1],
        "distillation.steps": "(1000,500)",
        "distillation.frames": 6,
        "distillation.length": 12,
        "distillation.switches": "(6,)",
        "distillation.every": 2,
        "distillation.negative_prompt": "''",
        "samples.frames": 6,
        "optimizer.learning_rate": 1e-2,
        "size": "16x32",
        "lora.rank": RANK,
        **dict.fromkeys(("steps", "sample_every", "samples.num", "log_every"), 1),
        "batch": jax.device_count(),
        "rules": "release",
    }
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, "off")
        assert main.main(["train", "--config=train_streaming", *given]) == 0
    return folder / "tuned"


@pytest.mark.slow
def test_training_continues_the_ported_updates(tuned, weights):
    before = checkpoint.restore(weights, "generator")["lora"]
    after = checkpoint.restore(tuned, "generator")["lora"]

    changes = [
        float(np.abs(np.asarray(a) - b).max())
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    ]
    assert 0 < max(changes) < 0.02  # A step of Adam at 0.01.
    lines = (tuned / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
    assert {"generator_loss", "critic_loss"} <= json.loads(lines[0]).keys()
    assert sorted(path.name for path in (tuned / "samples").iterdir()) == [
        *("step-000001.mp4", "step-000001.png"),
    ]


@pytest.mark.slow
def test_a_ported_critic_is_one_to_begin_with(tmp_path):
    ported.save(tmp_path / "both", "longlive", critic=True)
    stored = checkpoint.restore(tmp_path / "both", "fake_score")["params"]

    critic = load_bundle(str(tmp_path / "both"), dtype="float32", network="critic")

    assert critic.variables.keys() == {"params"}
    jax.tree.map(np.testing.assert_array_equal, critic.variables["params"], stored)


@pytest.mark.slow
def test_updates_of_a_critic_are_not_a_critic(tuned):
    with pytest.raises(UserError, match="holds only updates of a critic"):
        load_bundle(str(tuned), network="critic")


@pytest.mark.slow
def test_they_are_added_once(tuned, weights):
    plain, merged = (
        load_bundle(str(folder), dtype="float32", lora=how).variables["params"]
        for folder, how in ((weights, "none"), (tuned, "merged"))
    )
    update = checkpoint.restore(tuned, "generator")["lora"]["blocks"]["ffn_in"]

    change = merged["blocks"]["ffn_in"]["kernel"] - plain["blocks"]["ffn_in"]["kernel"]
    np.testing.assert_allclose(change, update["a"] @ update["b"], atol=1e-5)


@pytest.mark.slow
def test_they_are_sampled_as_they_were_trained(tuned, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    clip = f"{bundles.RED}[3f] | {bundles.BLUE}[3f]"
    given = ["--config=interactive", f"--config.weights={tuned}", f"--out={tmp_path}"]
    given += ["--config.size=16x32", f"--config.prompt={clip}"]

    assert main.main(["sample", *given]) == 0

    printed = capsys.readouterr().err
    assert (
        "rules: release, policy: anchor_forcing (as the weights were trained)"
        in printed
    )
    recipe = json.loads((tmp_path / "000.json").read_text())
    assert recipe["config"]["sampler"]["steps"] == [1000, 500]
