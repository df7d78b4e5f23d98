"""Settings beside weights: used, known not to matter, or refused by name."""

import json

import numpy as np
import pytest
from layouts import SMALL, dit_names, draw, write_layout
from safetensors.numpy import load_file, save_file
from torch_files import write_torch

from anchor_jax.errors import UserError
from anchor_jax.porting import port, settings

# What the libraries write for the published models.
TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0",
    "added_kv_proj_dim": None,
    "cross_attn_norm": True,
    "image_dim": None,
    "out_channels": 16,
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
UMT5 = {
    "architectures": ["UMT5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_kv": 5,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-6,
    "model_type": "umt5",
    "num_decoder_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "scalable_attention": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "T5Tokenizer",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0.dev0",
    "use_cache": True,
}
VAE = {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.33.0",
    "attn_scales": [],
    "dropout": 0.0,
    "latents_mean": [0.5] * 16,
    "latents_std": [2.0] * 16,
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "is_residual": False,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "in_channels": 3,
    "decoder_base_dim": None,
}


@pytest.fixture
def planned(tmp_path):
    """Returns the plan of a folder of diffusers with more settings in one part."""

    def plan(part, more):
        folder, _ = write_layout(tmp_path / "in", "diffusers")
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
        return port.plan(folder)

    return plan


@pytest.mark.parametrize(
    "part, more", [("transformer", TRANSFORMER), ("text_encoder", UMT5), ("vae", VAE)]
)
def test_settings_of_the_published_models_are_understood(planned, part, more):
    plan = planned(part, more)

    if part == "vae":
        assert plan.meta["vae"]["latent_mean"] == (0.5,) * 16
        assert plan.meta["vae"]["latent_std"] == (2.0,) * 16


@pytest.mark.parametrize(
    "part, setting",
    [
        *(
            ("transformer", setting)
            for setting in (
                {"_class_name": "WanVACETransformer3DModel"},
                {"qk_norm": "rms_norm"},
                {"qk_norm": False},
                {"cross_attn_norm": False},
                {"patch_size": [1, 4, 4]},
                {"image_dim": 1280},
                {"added_kv_proj_dim": 5120},
                {"pos_embed_seq_len": 514},
                {"eps": 0.0},
                {"num_attention_heads": 3},
                {"num_attention_heads": 0},
                {"num_attention_heads": True},
                {"num_attention_heads": [2]},
                {"attention_head_dim": 7},
                {"out_channels": 32},
                {"quantization_config": {"bits": 8}},
                {"vace_layers": [0, 2]},
                {"rope_theta": 5.0},
            )
        ),
        *(
            ("text_encoder", setting)
            for setting in (
                {"feed_forward_proj": "relu"},
                {"feed_forward_proj": "gated-silu"},
                {"dense_act_fn": "silu"},
                {"is_gated_act": False},
                {"model_type": "t5"},
                {"is_decoder": True},
                {"d_kv": 64},
                {"relative_attention_num_buckets": 16},
                {"relative_attention_max_distance": 0},
                {"layer_norm_epsilon": -1.0},
                {"num_heads": 4},
                {"something": "new"},
            )
        ),
        *(
            ("vae", setting)
            for setting in (
                {"latents_std": [0.0] * 16},
                {"latents_std": [-1.0] + [1.0] * 15},
                {"latents_std": [1.0] * 15},
                {"latents_mean": [0.0] * 48},
                {"latents_mean": ["a"] * 16},
                {"latents_mean": 0.5},
                {"is_residual": True},
                {"attn_scales": [1.0]},
                {"dim_mult": [1, 2, 4]},
                {"temperal_downsample": [True, True, True]},
                {"num_res_blocks": 3},
                {"z_dim": 48},
                {"decoder_base_dim": 256},
                {"in_channels": 12},
                {"patch_size": 2},
                {"scale_factor_spatial": 16},
                {"_class_name": "AutoencoderKL"},
            )
        ),
    ],
    ids=str,
)
def test_what_the_networks_are_not_is_refused_by_name(planned, part, setting):
    name = next(iter(setting))
    name = {
        "num_attention_heads": "num_heads|width",
        "attention_head_dim": "dim",
        "dim_mult": "dim_mult",
        "temperal_downsample": "temporal_downsample",
        "relative_attention_num_buckets": "num_buckets",
    }.get(name, name)

    with pytest.raises(UserError, match=name):
        planned(part, setting)


def test_heads_are_guessed_for_published_sizes_alone(tmp_path):
    assert settings.published_heads(1536, 8960) == 12
    assert settings.published_heads(5120, 13824) == 40
    assert settings.published_heads(1536, 6144) is None
    path = tmp_path / "model.safetensors"
    save_file(draw(dit_names(SMALL), np.float32, 0), path)
    options = {"generator": path, "method": "causvid"}

    with pytest.raises(UserError, match=r"number of heads.*\"num_heads\": NUMBER"):
        port.plan(**options)

    (tmp_path / "config.json").write_text('{"num_heads": 4}')
    assert port.plan(**options).meta["model"]["num_heads"] == 4


def test_heads_in_a_files_header_are_used_and_reported(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = draw(dit_names(SMALL), np.float32, 0)
    for header in ({"num_heads": "4"}, {"config": '{"num_heads": 4}'}):
        save_file(arrays, path, metadata={"format": "pt", "author": "me", **header})
        plan = port.plan(generator=path, method="causvid")
        assert plan.meta["model"]["num_heads"] == 4
        assert any("num_heads=4 is used" in note for note in plan.notes)
        assert any("unused header entries: author" in note for note in plan.notes)
    save_file(arrays, path, metadata={"num_heads": "4", "qk_norm": "false"})
    with pytest.raises(UserError, match="qk_norm=False"):
        port.plan(generator=path, method="causvid")


def test_a_header_and_a_config_must_agree(tmp_path):
    folder, _ = write_layout(tmp_path / "in", "wan")
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path), path, metadata={"num_heads": "4"})

    with pytest.raises(UserError, match=r"num_heads=2, the file's header 4"):
        port.plan(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "[" * 5000, '{"a": ' + "[" * 100 + "]" * 100 + "}", "NaN"]
)
def test_damaged_settings_are_named(tmp_path, text):
    folder, _ = write_layout(tmp_path / "in", "wan")
    (folder / "config.json").write_text(text)

    with pytest.raises(UserError, match=r"config\.json (is not valid JSON|holds)"):
        port.plan(folder)


def test_unused_entries_of_a_checkpoint_are_reported(tmp_path):
    arrays = draw(dit_names(SMALL), np.float32, 0)
    path = tmp_path / "model.pt"
    write_torch(path, {"generator": arrays, "generator_ema": arrays, "step": 3})
    (tmp_path / "config.json").write_text('{"num_heads": 2}')

    plan = port.plan(generator=path, method="causvid")

    assert "generator: its entry 'generator' is used, not generator_ema, step" in (
        plan.notes
    )


@pytest.mark.parametrize(
    "name, flag",
    [("model.safetensors", "generator"), ("wan2.1_t2v_small.safetensors", "wan")],
)
def test_a_config_beside_a_single_file_is_used(tmp_path, name, flag):
    path, config = tmp_path / name, tmp_path / "config.json"
    save_file(draw(dit_names(SMALL), np.float32, 0), path, metadata={"num_heads": "2"})
    options = {flag: path if flag == "generator" else tmp_path, "method": "wan"}

    config.write_text('{"eps": 1e-5}')
    assert port.plan(**options).meta["model"]["eps"] == 1e-5
    config.write_text('{"num_heads": 4}')
    with pytest.raises(UserError, match="num_heads=4, the file's header 2"):
        port.plan(**options)
    config.write_text('{"of": "a training"}')
    assert any("is not used" in note for note in port.plan(**options).notes)
    save_file(draw(dit_names(SMALL), np.float32, 0), path)
    config.write_text('{"num_heads": 4}')
    assert port.plan(**options).meta["model"]["num_heads"] == 4


def test_the_width_of_heads_is_used_and_compared(tmp_path):
    path = tmp_path / "model.safetensors"
    arrays = draw(dit_names(SMALL), np.float32, 0)
    options = {"generator": path, "method": "causvid"}

    save_file(arrays, path, metadata={"attention_head_dim": "4"})
    assert port.plan(**options).meta["model"]["num_heads"] == 4
    for header, part in (
        ({"attention_head_dim": "5"}, "does not divide"),
        ({"attention_head_dim": "4", "num_heads": "2", "dim": "16"}, "head_dim=4"),
        ({"num_heads": "2", "rope_theta": "5000"}, "rope_theta"),
        ({"num_heads": "2", "dim": "NaN"}, "dim=nan"),
        ({"num_heads": "2", "model_config": '{"eps": 3}'}, "eps=3"),
    ):
        save_file(arrays, path, metadata=header)
        with pytest.raises(UserError, match=part):
            port.plan(**options)
