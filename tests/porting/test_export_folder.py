"""What an export writes beside the tensors, so that other libraries load it."""

import json

import bundles
import jax
import numpy as np
import pytest
from layouts import SMALL, write_layout
from safetensors import safe_open
from safetensors.numpy import load_file

from anchor_jax.errors import UserError
from anchor_jax.porting import port, published
from anchor_jax.porting.export import export
from anchor_jax.wan import lora
from anchor_jax.weights import checkpoint
from anchor_jax.weights.lineage import write_run

TRANSFORMER = {
    "_class_name",
    "_diffusers_version",
    "attention_head_dim",
    "cross_attn_norm",
    "eps",
    "ffn_dim",
    "freq_dim",
    "in_channels",
    "num_attention_heads",
    "num_layers",
    "out_channels",
    "patch_size",
    "qk_norm",
    "rope_max_seq_len",
    "text_dim",
}
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}
WORDS = {"tokenizer_class": "TokenizersBackend", "model_max_length": 77}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def ported(folder, kind="diffusers", **files):
    """Ports a small layout with further files in it, and returns the checkpoint."""
    layout, _ = write_layout(folder / "in", kind, dtype=np.float32)
    for name, content in files.items():
        place = layout / name.replace("__", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_suffix(".json").write_text(content, encoding="utf-8")
    port.run(port.plan(layout), folder / "ported")
    return folder / "ported"


@pytest.mark.slow
def test_a_folder_of_diffusers_has_all_that_a_pipeline_needs(tmp_path):
    weights = ported(tmp_path)

    assert export(weights, tmp_path / "back", "diffusers") == ()

    back = tmp_path / "back"
    index = read(back / "model_index.json")
    parts = {name: tuple(part) for name, part in index.items() if name[0] != "_"}
    assert index["_class_name"] == "WanPipeline"
    assert parts == {
        "scheduler": ("diffusers", "UniPCMultistepScheduler"),
        "text_encoder": ("transformers", "UMT5EncoderModel"),
        "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
        "transformer": ("diffusers", "WanTransformer3DModel"),
        "vae": ("diffusers", "AutoencoderKLWan"),
    }
    assert all((back / part).is_dir() for part in parts)
    scheduler = read(back / "scheduler" / "scheduler_config.json")
    assert (scheduler["flow_shift"], scheduler["use_flow_sigmas"]) == (3.0, True)
    assert scheduler["prediction_type"] == "flow_prediction"
    assert read(back / "transformer" / "config.json").keys() == TRANSFORMER
    words = read(back / "tokenizer" / "tokenizer_config.json")
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (words["pad_token"], words["eos_token"]) == ("<pad>", "</s>")


@pytest.mark.slow
def test_a_source_keeps_its_own_scheduler_and_tokenizer(tmp_path):
    own = {
        "scheduler__scheduler_config": json.dumps(SCHEDULER),
        "tokenizer__tokenizer_config": json.dumps(WORDS),
        "tokenizer__special_tokens_map": '{"pad_token": "<pad>"}',
    }
    weights = ported(tmp_path, **own)

    export(weights, tmp_path / "back", "diffusers")

    for name, content in own.items():
        place = (tmp_path / "back" / name.replace("__", "/")).with_suffix(".json")
        assert read(place) == json.loads(content)
    index = read(tmp_path / "back" / "model_index.json")
    assert index["scheduler"][1] == "FlowMatchEulerDiscreteScheduler"
    assert index["tokenizer"][1] == "PreTrainedTokenizerFast"
    again = port.plan(tmp_path / "back")
    assert {*again.files} == {*port.plan(tmp_path / "in").files}


@pytest.mark.parametrize(
    "name", ["scheduler__scheduler_config", "tokenizer__tokenizer_config"]
)
def test_a_broken_config_is_refused_when_it_is_ported(tmp_path, name):
    with pytest.raises(UserError, match=r"_config\.json is damaged or not JSON"):
        ported(tmp_path, **{name: "{"})
    assert not (tmp_path / "ported").exists()


@pytest.mark.slow
def test_the_official_layout_has_a_tokenizer_that_is_recognised(tmp_path):
    weights = ported(tmp_path, "wan")
    (weights / "tokenizer" / "spiece.model").unlink()
    ends = {"post_processor": {"type": "TemplateProcessing"}}
    (weights / "tokenizer" / "tokenizer.json").write_text(json.dumps(ends))

    assert export(weights, tmp_path / "back", "wan") == ()

    place = tmp_path / "back" / "google" / "umt5-xxl"
    assert {path.name for path in place.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    words = read(place / "tokenizer_config.json")
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert words["model_max_length"] == 32
    config = read(tmp_path / "back" / "config.json")
    assert config["_class_name"] == "WanModel" and config["model_type"] == "t2v"
    assert not (tmp_path / "back" / "model_index.json").exists()


def test_sentinels_fill_the_vocabulary_of_the_encoder():
    made = published.tokenizer(ends=False, extra_ids=12, text_len=512)

    assert made["extra_ids"] == 12


def test_a_transformer_alone_has_a_note_instead_of_a_list(tmp_path):
    base, _ = write_layout(tmp_path / "base", "generator")
    port.run(port.plan(generator=base, method="causvid"), tmp_path / "ported")

    (note,) = export(tmp_path / "ported", tmp_path / "back", "diffusers")

    assert note.startswith("without text_encoder, vae, tokenizer no model_index.json")
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["transformer"]


@pytest.mark.slow
def test_another_length_of_text_is_noted(tmp_path):
    weights = ported(tmp_path, "wan")

    (note,) = export(weights, tmp_path / "back", "diffusers")

    assert "max_sequence_length=32" in note


def test_adapters_are_written_for_diffusers_too(tmp_path):
    base, _ = write_layout(tmp_path / "base", "generator", dtype=np.float32)
    peft, arrays = write_layout(tmp_path / "peft", "peft", dtype=np.float32)
    plan = port.plan(generator=base, lora=peft, method="longlive")
    port.run(plan, tmp_path / "ported")

    export(tmp_path / "ported", tmp_path / "back", "diffusers")

    place = tmp_path / "back" / "lora"
    config = read(place / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (SMALL.rank, 2 * SMALL.rank)
    adapters = load_file(place / "adapter_model.safetensors")
    beside = load_file(place / "pytorch_lora_weights.safetensors")
    start = "base_model.model."
    assert {name.removeprefix(start) for name in adapters} == {
        name.removeprefix("transformer.") for name in beside
    }
    name = "blocks.1.attn1.to_q.lora_B.weight"
    for found in (adapters[start + name], beside[f"transformer.{name}"]):
        expected = arrays["lora"][f"{start}blocks.1.self_attn.q.lora_B.weight"]
        np.testing.assert_array_equal(found, expected)
    with safe_open(place / "pytorch_lora_weights.safetensors", "numpy") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.lora_alpha"] == config["lora_alpha"]
    assert metadata["transformer.r"] == config["r"]
    assert "attn1.to_out.0" in metadata["transformer.target_modules"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ported(tmp_path_factory.mktemp("base"), "wan")


def trained(folder, base, adapters):
    """Writes a training of low-rank updates, and returns its folder."""
    checkpoint.write(folder, {"generator": {"lora": adapters}}, {"training": {}})
    write_run(folder, str(base))
    return folder


def uneven(params):
    """Returns updates of few layers, of two ranks."""
    fresh = lora.init(params, 2, jax.random.key(0))["blocks"]["self_attn"]
    rng = np.random.default_rng(3)
    return {
        "blocks": {
            "self_attn": {
                part: {
                    "a": rng.standard_normal((*fresh[part]["a"].shape[:2], rank)),
                    "b": rng.standard_normal((len(fresh[part]["b"]), rank, SMALL.dim)),
                }
                for part, rank in {"q": 2, "k": 2, "v": 3}.items()
            }
        }
    }


@pytest.mark.slow
def test_adapters_of_several_ranks_on_some_layers(base, tmp_path):
    params = checkpoint.restore(base, "generator")["params"]
    adapters = jax.tree.map(lambda x: x.astype(np.float32), uneven(params))
    run = trained(tmp_path / "run", base, adapters)

    export(run, tmp_path / "apart", "diffusers")
    export(run, tmp_path / "merged", "wan", lora="merged")

    config = read(tmp_path / "apart" / "lora" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"attn1.to_v": 3}
    assert config["target_modules"] == ["attn1.to_k", "attn1.to_q", "attn1.to_v"]
    written = load_file(tmp_path / "apart" / "lora" / "adapter_model.safetensors")
    v = adapters["blocks"]["self_attn"]["v"]
    name = "base_model.model.blocks.2.attn1.to_v.lora_B.weight"
    np.testing.assert_array_equal(written[name], v["b"][2].T)
    merged = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    kernel = params["blocks"]["self_attn"]["v"]["kernel"][2] + v["a"][2] @ v["b"][2]
    found = merged["blocks.2.self_attn.v.weight"]
    np.testing.assert_allclose(found, kernel.T, rtol=1e-5, atol=1e-5)
    untouched = merged["blocks.2.cross_attn.q.weight"]
    kernel = params["blocks"]["cross_attn"]["q"]["kernel"][2]
    np.testing.assert_array_equal(untouched, kernel.T)


def test_an_error_names_the_folder_that_was_given(base, tmp_path):
    bundles.save(tmp_path / "tiny")
    run = tmp_path / "run"
    checkpoint.write(run, {"generator": bundles.params()["generator"]}, {})
    write_run(run, str(tmp_path / "tiny"))
    messages = {
        run: rf"weights={run}: started from .*/tiny, and .*--layout=bundle",
        tmp_path / "none": rf"weights={tmp_path}/none: no such folder; give",
        tmp_path / "tiny": "a model in one file can only be .*--layout=bundle",
    }
    for weights, message in messages.items():
        with pytest.raises(UserError, match=message):
            export(weights, tmp_path / "out", "wan")
    write_run(run, str(tmp_path / "gone"))
    with pytest.raises(
        UserError, match=rf"weights={run}: .*/gone, .*is missing: restore it"
    ):
        export(run, tmp_path / "out", "wan")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_export_that_fails_leaves_nothing(base, tmp_path, monkeypatch):
    def stop(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", stop)
    with pytest.raises(UserError, match="free disk space"):
        export(base, tmp_path / "out" / "back", "wan")
    assert [*(tmp_path / "out").rglob("*")] == []


def test_classes_that_are_not_names_are_dropped():
    plain = published.model_index(None, None)

    for name in (["a"], {}, 3, "", "os; system"):
        assert published.model_index(name, name) == plain
