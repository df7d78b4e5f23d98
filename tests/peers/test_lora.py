"""Adapters as peft and diffusers save them, ported; and ours, loaded by them."""

import copy

import jax
import peer_models as peers
import peft
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file

from anchor_jax.porting import port
from anchor_jax.porting.export import export
from anchor_jax.wan.spec import ModelConfig

ALL = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
FORMS = {
    "alpha_is_rank": {"r": 4, "lora_alpha": 4},
    "alpha": {"r": 4, "lora_alpha": 32},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "partial": {"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_v"]},
    "rank_pattern": {"r": 4, "lora_alpha": 4, "rank_pattern": {"attn1.to_q": 2}},
    "alpha_pattern": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"ffn.net.2": 3}},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {"to_v": 4, "blocks.1.attn2.to_q": 3},
        "alpha_pattern": {"to_v": 1, "blocks.0.ffn.net.0.proj": 5},
    },
}


def inputs():
    return peers.draw(1, 2, 4, 4, 16), 600.0, peers.draw(1, 512, 16, seed=1)


def adapted(settings):
    """Returns a diffusers transformer with random adapters."""
    config = peft.LoraConfig(**{"target_modules": list(ALL), **settings})
    model = copy.deepcopy(peers.transformer())
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, config


def save_diffusers(model, config, folder):
    """Saves adapters as `WanPipeline.save_lora_weights` does in training scripts."""
    layers = peft.get_peft_model_state_dict(model)
    WanPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"


def save_peft(model, config, folder):
    """Saves adapters as a `PeftModel` does."""
    wrapped = peft.get_peft_model(copy.deepcopy(peers.transformer()), config)
    adapters = peft.get_peft_model_state_dict(model)
    named = {f"base_model.model.{name}": value for name, value in adapters.items()}
    missing = peft.set_peft_model_state_dict(wrapped, named)
    assert not missing.unexpected_keys
    wrapped.save_pretrained(folder)
    return folder


OFFICIAL = {
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "attn1.to_": "self_attn.",
    "attn2.to_": "cross_attn.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def official(model):
    """Yields official name, matrices a and b, and alpha of each adapted module."""
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        for theirs, ours in OFFICIAL.items():
            name = name.replace(theirs, ours)
        matrices = module.lora_A["default"].weight, module.lora_B["default"].weight
        alpha = module.scaling["default"] * module.r["default"]
        yield name, *(matrix.detach().clone() for matrix in matrices), alpha


def save_named(model, folder, start, ends, flat=False):
    """Saves adapters with an alpha of each module, under official names."""
    tensors = {}
    for name, a, b, alpha in official(model):
        name = start + (name.replace(".", "_") if flat else name)
        tensors |= {f"{name}.{ends[0]}.weight": a, f"{name}.{ends[1]}.weight": b}
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    folder.mkdir()
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def save_kohya(model, config, folder):
    return save_named(model, folder, "lora_unet_", ("lora_down", "lora_up"), flat=True)


def save_comfyui(model, config, folder):
    return save_named(model, folder, "diffusion_model.", ("lora_down", "lora_up"))


def save_comfyui_ab(model, config, folder):
    return save_named(model, folder, "diffusion_model.", ("lora_A", "lora_B"))


SAVE = {
    "diffusers": save_diffusers,
    "peft": save_peft,
    "kohya": save_kohya,
    "comfyui": save_comfyui,
    "comfyui_ab": save_comfyui_ab,
}


CASES = [(form, name) for form in ("diffusers", "peft") for name in FORMS]
CASES += [
    (form, name)
    for form in ("kohya", "comfyui", "comfyui_ab")
    for name in ("alpha", "partial", "patterns")
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a transformer as diffusers saves it."""
    folder = tmp_path_factory.mktemp("base")
    peers.transformer().save_pretrained(folder / "transformer")
    return folder


def predict_ported(plan):
    """Returns what our transformer predicts with the weights of a plan."""
    variables = jax.tree.map(lambda leaf: leaf.load(), plan.items["generator"])
    config = ModelConfig(**plan.meta["model"], dtype="float32")
    return peers.predict_ours(config, variables, *inputs())


@pytest.mark.parametrize("form, name", CASES)
def test_adapters_do_what_they_do_in_their_library(base, tmp_path, name, form):
    model, config = adapted(FORMS[name])
    theirs = peers.predict(model, *inputs())
    plain = peers.predict(peers.transformer(), *inputs())
    assert abs(theirs - plain).max() > 1e-2 * abs(plain).max()

    saved = SAVE[form](model, config, tmp_path / "saved")
    plan = port.plan(base, lora=saved, method="longlive")

    peers.assert_close(predict_ported(plan), theirs)


@pytest.mark.parametrize("form", ["kohya", "comfyui", "comfyui_ab"])
def test_files_with_other_names_are_those_that_diffusers_reads(
    pipeline, tmp_path, form
):
    model, config = adapted(FORMS["patterns"])
    saved = SAVE[form](model, config, tmp_path / "saved")

    pipe = WanPipeline(**{**pipeline.components, "transformer": peers.transformer()})
    pipe.load_lora_weights(str(saved))

    theirs = peers.predict(model, *inputs())
    peers.assert_close(peers.predict(pipe.transformer, *inputs()), theirs)


@pytest.fixture
def ported(base, tmp_path):
    """A function that returns a transformer with adapters, and its checkpoint."""

    def run(name):
        model, config = adapted(FORMS[name])
        saved = save_peft(model, config, tmp_path / "saved")
        port.run(port.plan(base, lora=saved, method="longlive"), tmp_path / "ported")
        return model, tmp_path / "ported"

    return run


@pytest.mark.parametrize("name", FORMS)
def test_exported_adapters_do_the_same(ported, pipeline, tmp_path, name, complaints):
    model, weights = ported(name)
    theirs = peers.predict(model, *inputs())

    (note,) = export(weights, tmp_path / "back", "diffusers")

    assert note.startswith("without text_encoder, vae, tokenizer no model_index.json")
    lora = tmp_path / "back" / "lora"
    parts = {**pipeline.components, "transformer": load(tmp_path / "back")}
    pipe = WanPipeline(**parts)
    pipe.load_lora_weights(str(lora))
    peers.assert_close(peers.predict(pipe.transformer, *inputs()), theirs)
    wrapped = peft.PeftModel.from_pretrained(load(tmp_path / "back"), lora)
    peers.assert_close(peers.predict(wrapped, *inputs()), theirs)
    again = port.plan(tmp_path / "back", lora=lora, method="longlive")
    peers.assert_close(predict_ported(again), theirs)
    assert complaints() == []


def load(folder):
    return WanTransformer3DModel.from_pretrained(folder / "transformer")


def test_merged_adapters_need_no_library(ported, tmp_path):
    model, weights = ported("alpha")

    export(weights, tmp_path / "back", "diffusers", lora="merged")

    theirs = peers.predict(model, *inputs())
    peers.assert_close(peers.predict(load(tmp_path / "back"), *inputs()), theirs)
    assert not (tmp_path / "back" / "lora").exists()
