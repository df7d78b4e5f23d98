"""Exports of trainings that began with ported weights."""

import json

import bundles
import jax
import numpy as np
import pytest
from layouts import write_layout
from safetensors.numpy import load_file

from anchor_jax.cli.main import main
from anchor_jax.errors import UserError
from anchor_jax.porting import port
from anchor_jax.porting.export import export
from anchor_jax.wan import lora
from anchor_jax.weights import checkpoint
from anchor_jax.weights.lineage import write_run
from anchor_jax.weights.trained import CRITIC

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ported")
    layout, _ = write_layout(folder / "in", "wan", dtype=np.float32)
    port.run(port.plan(layout), folder / "base")
    export(folder / "base", folder / "back", "wan")
    return folder / "base"


def run(folder, base, **items):
    """Writes a training that began with weights, and returns its folder."""
    checkpoint.write(folder, items, {"training": {}})
    write_run(folder, str(base))
    return folder


def scaled(tree, factor):
    return jax.tree.map(lambda x: np.asarray(factor * x, x.dtype), tree)


def updates(params, seed):
    rng = np.random.default_rng(seed)
    fresh = lora.init(params, 2, jax.random.key(0))
    return jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32), fresh
    )


def assert_scaled(ours, theirs, factor):
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, factor * theirs[name], err_msg=name)


@pytest.mark.slow
def test_a_training_is_exported_with_its_initial_weights(base, tmp_path):
    params = checkpoint.restore(base, "generator")["params"]
    mean, last = ({"params": scaled(params, by)} for by in (4.0, 2.0))
    trained = run(tmp_path / "run", base, generator=last, ema=mean)

    flags = [f"--weights={trained}", f"--out={tmp_path / 'out'}", "--layout=wan"]
    assert main(["export", *flags]) == 0
    export(trained / "0", tmp_path / "step", "wan", item="generator")

    before = load_file(base.parent / "back" / WEIGHTS)
    assert_scaled(load_file(tmp_path / "out" / WEIGHTS), before, 4)
    assert_scaled(load_file(tmp_path / "step" / WEIGHTS), before, 2)
    names = [
        {place.relative_to(folder) for place in folder.rglob("*")}
        for folder in (tmp_path / "out", base.parent / "back")
    ]
    assert names[0] == names[1] and len(names[0]) > 3


@pytest.mark.slow
def test_low_rank_updates_are_exported_beside_and_merged(base, tmp_path):
    params = checkpoint.restore(base, "generator")["params"]
    first, second = updates(params, 1), updates(params, 2)
    trained = run(tmp_path / "run", base, generator={"lora": first})
    again = run(tmp_path / "again", trained, generator={"lora": second})
    whole = {"params": lora.merge(params, second)}

    export(again, tmp_path / "apart", "wan")
    export(again, tmp_path / "merged", "wan", lora="merged")
    export(run(tmp_path / "whole", base, generator=whole), tmp_path / "full", "wan")

    before = load_file(base.parent / "back" / WEIGHTS)
    assert_scaled(load_file(tmp_path / "apart" / WEIGHTS), before, 1)
    peft = load_file(tmp_path / "apart" / "lora" / "adapter_model.safetensors")
    found = peft["base_model.model.blocks.1.self_attn.q.lora_A.weight"]
    np.testing.assert_array_equal(found, second["blocks"]["self_attn"]["q"]["a"][1].T)
    merged, full = (load_file(tmp_path / name / WEIGHTS) for name in ("merged", "full"))
    assert merged.keys() == full.keys()
    for name, array in merged.items():
        np.testing.assert_allclose(array, full[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_trained_text_encoder_is_exported(base, tmp_path):
    params = checkpoint.restore(base, "generator")["params"]
    text = scaled(checkpoint.restore(base, "text_encoder"), 2.0)
    trained = run(tmp_path / "run", base, generator={"params": params, "text": text})

    export(trained, tmp_path / "diffusers", "diffusers")
    export(base, tmp_path / "before", "diffusers")

    file = "text_encoder/model.safetensors"
    ours, before = (load_file(tmp_path / x / file) for x in ("diffusers", "before"))
    assert_scaled(ours, before, 2)


def test_what_has_no_published_layout_is_refused(tmp_path):
    bundles.save(tmp_path / "tiny")
    params = {"params": bundles.params()["generator"]}
    trained = run(tmp_path / "run", tmp_path / "tiny", generator=params)

    with pytest.raises(UserError, match="--layout=bundle"):
        export(trained, tmp_path / "out", "wan")
    export(trained, tmp_path / "out", "generator")
    assert load_file(tmp_path / "out" / "generator.safetensors")


@pytest.mark.slow
def test_a_critic_of_another_size_is_exported_with_its_own(base, tmp_path):
    params = checkpoint.restore(base, "generator")["params"]
    deeper = {
        **params,
        "blocks": jax.tree.map(lambda x: np.concatenate([x, x[:1]]), params["blocks"]),
    }
    items = {"generator": {"params": params}, "fake_score": {"params": deeper}}
    layers = checkpoint.read_meta(base)["model"]["num_layers"] + 1
    meta = {"training": {}, CRITIC: {"num_layers": layers}}
    checkpoint.write(tmp_path / "run", items, meta)
    write_run(tmp_path / "run", str(base))

    export(tmp_path / "run", tmp_path / "out", "wan", item="fake_score")

    sizes = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sizes["num_layers"] == layers
    names = load_file(tmp_path / "out" / WEIGHTS)
    assert any(name.startswith(f"blocks.{layers - 1}.") for name in names)


@pytest.mark.slow
def test_a_bundle_is_of_what_streams(tmp_path, capsys):
    bundles.save(tmp_path / "tiny")
    params = {"params": bundles.params()["generator"]}
    trained = run(tmp_path / "run", tmp_path / "tiny", generator=params, ema=params)
    flags = [f"--weights={trained}", f"--out={tmp_path / 'out'}", "--layout=bundle"]

    for item in ("generator", "fake_score"):
        assert main(["export", *flags, f"--item={item}"]) == 2
        assert (
            "--layout=bundle writes only the network that samples"
            in capsys.readouterr().err
        )
    assert main(["export", *flags, "--item=ema"]) == 0
