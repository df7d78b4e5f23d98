"""Config files of published folders, with keys that their libraries know.

diffusers warns about keys that a class does not know, so there are none.
"""

from collections.abc import Mapping
from typing import Any

from anchor_jax.wan.spec import WAN_2_1

# The version of diffusers that wrote the published Wan2.1 folders.
_DIFFUSERS = {"_diffusers_version": "0.33.0"}
_FAST = "PreTrainedTokenizerFast"
TEXT_LEN = WAN_2_1.text_len
"""Tokens to which `WanPipeline` pads a prompt unless it is given another length."""
LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_PREFIX = "transformer."
LORA_METADATA = "lora_adapter_metadata"
"""Name of the header entry with the settings of diffusers' LoRA files, as JSON."""

SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    **_DIFFUSERS,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
"""Scheduler of the published folder for 480 x 832."""


def transformer(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns diffusers' config of a transformer from its sizes in a manifest."""
    channels = model["latent_channels"]
    return {
        "_class_name": "WanTransformer3DModel",
        **_DIFFUSERS,
        "attention_head_dim": model["dim"] // model["num_heads"],
        "cross_attn_norm": True,
        "eps": model["eps"],
        "ffn_dim": model["ffn_dim"],
        "freq_dim": model["freq_dim"],
        "in_channels": channels,
        "num_attention_heads": model["num_heads"],
        "num_layers": model["num_layers"],
        "out_channels": channels,
        "patch_size": list(model["patch"]),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": model["text_dim"],
    }


def official_transformer(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the official config of a transformer from its sizes in a manifest."""
    channels = model["latent_channels"]
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": model["dim"],
        "eps": model["eps"],
        "ffn_dim": model["ffn_dim"],
        "freq_dim": model["freq_dim"],
        "in_dim": channels,
        "model_type": "t2v",
        "num_heads": model["num_heads"],
        "num_layers": model["num_layers"],
        "out_dim": channels,
        "text_len": model["text_len"],
    }


def text_encoder(text: Mapping[str, Any]) -> dict[str, Any]:
    """Returns transformers' config of a text encoder from its sizes in a manifest."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "d_ff": text["ffn_dim"],
        "d_kv": text["attention_dim"] // text["num_heads"],
        "d_model": text["dim"],
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": text["eps"],
        "num_heads": text["num_heads"],
        "num_layers": text["num_layers"],
        "pad_token_id": 0,
        "relative_attention_max_distance": text["max_distance"],
        "relative_attention_num_buckets": text["num_buckets"],
        "vocab_size": text["vocab"],
    }


def vae(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns diffusers' config of a VAE from its sizes in a manifest."""
    return {
        "_class_name": "AutoencoderKLWan",
        **_DIFFUSERS,
        "attn_scales": [],
        "base_dim": sizes["base_dim"],
        "dim_mult": list(sizes["dim_mult"]),
        "dropout": 0.0,
        "latents_mean": list(sizes["latent_mean"]),
        "latents_std": list(sizes["latent_std"]),
        "num_res_blocks": sizes["num_res_blocks"],
        "temperal_downsample": list(sizes["temporal_downsample"]),
        "z_dim": sizes["z_dim"],
    }


def tokenizer(ends: bool, extra_ids: int, text_len: int) -> dict[str, Any]:
    """Returns a tokenizer's config for a source without one.

    Args:
      ends: whether a `tokenizer.json` exists that appends `</s>`, which is then used
        unchanged. Otherwise transformers builds a T5 tokenizer.
      extra_ids: number of sentinels after the vocabulary of a `spiece.model`.
      text_len: number of tokens that the text encoder takes.
    """
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    shared = {**special, "model_max_length": text_len}
    if ends:
        return {**shared, "tokenizer_class": _FAST}
    return {**shared, "extra_ids": extra_ids, "tokenizer_class": "T5Tokenizer"}


def model_index(tokenizer: Any, scheduler: Any) -> dict[str, Any]:
    """Returns the list of a pipeline's parts.

    Args:
      tokenizer: class named in its config.
      scheduler: class named in its config.
    """
    tokenizer, scheduler = (
        name if isinstance(name, str) and name.isidentifier() else None
        for name in (tokenizer, scheduler)
    )
    # Names that exist in both transformers 4 and 5.
    names = {"T5Tokenizer": "T5TokenizerFast", "TokenizersBackend": _FAST}
    tokenizer = tokenizer or "T5TokenizerFast"
    return {
        "_class_name": "WanPipeline",
        **_DIFFUSERS,
        "scheduler": ["diffusers", scheduler or SCHEDULER["_class_name"]],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", names.get(tokenizer, tokenizer)],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
