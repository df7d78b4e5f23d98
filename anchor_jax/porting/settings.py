"""Sizes of the networks, from their tensors and their settings files.

Every setting of a `config.json` is used, has the only supported value, is known not to
change the network's results, or is refused by name.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from anchor_jax.porting.convert import Mismatch, num_layers, shape_of
from anchor_jax.porting.key_tables import table_of
from anchor_jax.porting.sources import Source
from anchor_jax.wan.spec import FAMILIES, PRESETS, WAN_2_1, Family, ModelConfig
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.vae import VAES, VaeConfig

_LARGEST = 2**20
_ABSENT = (None, False, [], {}, "")


@dataclasses.dataclass(frozen=True)
class Known:
    """The settings of one network's `config.json`.

    Attributes:
      used: Names of settings that are read.
      fixed: The only supported values; null and a missing setting are allowed too.
      inert: Names of settings that do not change the network's results.
    """

    used: tuple[str, ...]
    fixed: Mapping[str, tuple[Any, ...]]
    inert: tuple[str, ...]

    def problems(self, settings: Mapping[str, Any]) -> Iterator[str]:
        """Yields a line for each unusable setting."""
        for name, value in settings.items():
            right = self.fixed.get(name)
            if right is not None and value is not None and value not in right:
                allowed = " or ".join(repr(one) for one in right) or "none"
                yield f"{name}={value!r:.60} is not supported, expected {allowed}"
            known = (*self.used, *self.fixed, *self.inert)
            if name not in known and name[:1] != "_" and value not in _ABSENT:
                yield (
                    f"{name!r:.60}={value!r:.60} is unknown; remove it if it does not"
                    " change what the network computes"
                )


_MODEL = Known(
    used=(
        *("dim", "num_heads", "num_attention_heads", "attention_head_dim", "ffn_dim"),
        *("num_layers", "freq_dim", "text_dim", "text_len", "in_dim", "in_channels"),
        *("out_dim", "out_channels", "eps"),
    ),
    fixed={
        "_class_name": ("WanModel", "CausalWanModel", "WanTransformer3DModel"),
        "model_type": ("t2v",),
        "window_size": ([-1, -1],),
        "qk_norm": (True, "rms_norm_across_heads"),
        "cross_attn_norm": (True,),
        "image_dim": (),
        "added_kv_proj_dim": (),
        "pos_embed_seq_len": (),
        "quantization_config": (),
    },
    # The first limits positions; the cache policy replaces the others.
    inert=(
        *("rope_max_seq_len", "local_attn_size", "sink_size", "max_attention_size"),
        *("torch_dtype", "dtype", "num_frame_per_block", "independent_first_frame"),
    ),
)
_TEXT = Known(
    used=(
        *("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers"),
        *("relative_attention_num_buckets", "relative_attention_max_distance"),
        "layer_norm_epsilon",
    ),
    fixed={
        "model_type": ("umt5",),
        "feed_forward_proj": ("gated-gelu",),
        "dense_act_fn": ("gelu_new",),
        "is_gated_act": (True,),
        "is_decoder": (False,),
        "pad_token_id": (0,),
        "eos_token_id": (1,),
        "quantization_config": (),
    },
    inert=(
        *("architectures", "classifier_dropout", "decoder_start_token_id"),
        *("dropout_rate", "initializer_factor", "is_encoder_decoder", "output_past"),
        *("num_decoder_layers", "scalable_attention", "tie_word_embeddings"),
        *("scale_decoder_outputs", "tokenizer_class", "torch_dtype", "dtype"),
        *("transformers_version", "use_cache", "return_dict", "id2label", "label2id"),
        *("output_hidden_states", "output_attentions", "problem_type"),
        *("chunk_size_feed_forward", "task_specific_params", "bos_token_id"),
        *("n_positions", "max_length", "gradient_checkpointing", "use_bfloat16"),
        *("attn_implementation", "num_return_sequences", "top_k", "top_p"),
        *("temperature", "num_beams", "num_beam_groups", "length_penalty"),
        *("repetition_penalty", "diversity_penalty", "typical_p", "early_stopping"),
    ),
)
_VAE = Known(
    used=(
        *("base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample"),
        *("latents_mean", "latents_std", "decoder_base_dim"),
    ),
    fixed={
        "_class_name": ("AutoencoderKLWan",),
        "attn_scales": ([],),
        "is_residual": (False,),
        "in_channels": (3,),
        "out_channels": (3,),
        "quantization_config": (),
    },
    inert=("dropout", "torch_dtype", "dtype", "clip_output"),
)
_HEADS = {
    (model.dim, model.ffn_dim): model.num_heads
    for model in (PRESETS["1.3B"], PRESETS["14B"])
}


def check(source: Source, known: Known, **fixed: Any) -> None:
    """Raises `Mismatch` if settings describe an unsupported network.

    Args:
      source: The network with its settings.
      known: The settings of such a network.
      **fixed: The only supported values that depend on the family.
    """
    values = {name: (value,) for name, value in fixed.items()}
    known = dataclasses.replace(known, fixed={**known.fixed, **values})
    problems = [
        f"{source.item}, config.json: {line}"
        for line in known.problems(source.settings)
    ]
    if problems:
        raise Mismatch(problems)


def model_config(source: Source, family: Family = WAN_2_1) -> ModelConfig:
    """Returns a transformer's sizes from its tensors and settings file.

    Args:
      source: The transformer.
      family: Its family.

    Raises:
      Mismatch: A tensor that determines a size is missing, or the settings contradict
        it.
      ValueError: The sizes are not those of a transformer.
    """
    check(source, _MODEL, patch_size=list(family.patch))
    table, settings = table_of(source.item, source.layout), source.settings
    shape = functools.partial(shape_of, source.arrays, table)
    features, dim = shape("patch_embed/kernel")
    sizes = {
        "dim": dim,
        "ffn_dim": shape("blocks/ffn_in/kernel")[-1],
        "num_layers": num_layers(source.arrays, table),
        "freq_dim": shape("time_in/kernel")[0],
        "text_dim": shape("text_in/kernel")[0],
        "latent_channels": features // math.prod(family.patch),
    }
    _check_sizes(source, sizes)
    heads = _heads(source, sizes)
    names = ("dim", "ffn_dim", "num_layers", "freq_dim", "text_dim")
    _agree(source, sizes, {name: settings.get(name) for name in names})
    per_head = {"attention_head_dim": dim // heads}
    _agree(source, per_head, {name: settings.get(name) for name in per_head})
    for name in ("in_dim", "in_channels", "out_dim", "out_channels"):
        _agree(source, {name: sizes["latent_channels"]}, {name: settings.get(name)})
    return FAMILIES[family.name](
        **sizes,
        num_heads=heads,
        text_len=_whole(settings, "text_len", family.text_len),
        eps=_positive(settings, "eps", 1e-6),
    )


def text_config(source: Source) -> TextConfig:
    """Returns a text encoder's sizes; raises as `model_config`."""
    check(source, _TEXT)
    table, settings = table_of(source.item, source.layout), source.settings
    shape = functools.partial(shape_of, source.arrays, table)
    vocab, dim = shape("token_embedding/embedding")
    buckets, heads = shape("blocks/position_bias/embedding")
    sizes = {
        "vocab": vocab,
        "dim": dim,
        "attention_dim": shape("blocks/attn/q/kernel")[-1],
        "ffn_dim": shape("blocks/ffn/gate/kernel")[-1],
        "num_heads": heads,
        "num_layers": num_layers(source.arrays, table),
        "num_buckets": buckets,
    }
    _check_sizes(source, sizes)
    names = {
        "vocab": "vocab_size",
        "dim": "d_model",
        "ffn_dim": "d_ff",
        "num_heads": "num_heads",
        "num_layers": "num_layers",
        "num_buckets": "relative_attention_num_buckets",
    }
    _agree(source, sizes, {ours: settings.get(name) for ours, name in names.items()})
    width = {"d_kv": sizes["attention_dim"] // heads}
    _agree(source, width, {"d_kv": settings.get("d_kv")})
    return TextConfig(
        **sizes,
        max_distance=_whole(settings, "relative_attention_max_distance", 128),
        eps=_positive(settings, "layer_norm_epsilon", 1e-6),
    )


def vae_config(source: Source, family: Family = WAN_2_1) -> VaeConfig:
    """Returns a VAE's sizes; arguments and errors as for `model_config`.

    Its stages are those of the family; only widths may differ.
    """
    standard = VAES[family.name]
    check(
        source,
        _VAE,
        patch_size=standard.pixel_patch,
        scale_factor_temporal=standard.temporal_stride,
        scale_factor_spatial=standard.spatial_stride,
    )
    table = table_of(source.item, source.layout)
    shape = functools.partial(shape_of, source.arrays, table)
    sizes = {
        "base_dim": shape("encoder/conv1/kernel")[-1],
        "z_dim": shape("conv2/kernel")[-1],
    }
    _check_sizes(source, sizes)
    stated = {
        **{name: source.settings.get(name) for name in ("base_dim", "z_dim")},
        "dim_mult": source.settings.get("dim_mult"),
        "num_res_blocks": source.settings.get("num_res_blocks"),
        # This misspelling is the name in diffusers' files.
        "temporal_downsample": source.settings.get("temperal_downsample"),
    }
    stages = {
        "dim_mult": list(standard.dim_mult),
        "num_res_blocks": standard.num_res_blocks,
        "temporal_downsample": list(standard.temporal_downsample),
    }
    _agree(source, {**sizes, **stages}, stated)
    decoder = {"decoder_base_dim": shape("decoder/head_2/kernel")[-2]}
    name = "decoder_base_dim"
    _agree(source, decoder, {name: source.settings.get(name)})
    means, deviations = (
        _numbers(source, f"latents_{name}", default, sizes["z_dim"])
        for name, default in (
            ("mean", standard.latent_mean),
            ("std", standard.latent_std),
        )
    )
    if min(deviations) <= 0:
        raise Mismatch(
            [f"vae, config.json: latents_std has {min(deviations):g}, expected above 0"]
        )
    return dataclasses.replace(
        standard, **sizes, latent_mean=means, latent_std=deviations
    )


def _check_sizes(source: Source, sizes: Mapping[str, int]) -> None:
    """Raises `Mismatch` if tensors have impossible sizes."""
    problems = [
        f"{source.item}: its tensors give {name}={size}, expected from 1 to {_LARGEST}"
        for name, size in sizes.items()
        if not 1 <= size <= _LARGEST
    ]
    if problems:
        raise Mismatch(problems)


def _agree(source: Source, sizes: Mapping[str, Any], stated: Mapping[str, Any]) -> None:
    """Raises `Mismatch` if settings contradict the tensors."""
    problems = [
        f"{source.item}, config.json: {name}={value!r:.60}, the tensors have"
        f" {sizes[name]}"
        for name, value in stated.items()
        if value is not None and value != sizes[name]
    ]
    if problems:
        raise Mismatch(problems)


def _heads(source: Source, sizes: Mapping[str, int]) -> int:
    """Returns the number of heads, which tensors do not determine.

    Raises:
      Mismatch: The settings lack it, and the sizes are not published ones.
    """
    names = ("num_heads", "num_attention_heads")
    stated = [source.settings[name] for name in names if name in source.settings]
    per_head = source.settings.get("attention_head_dim")
    if not stated and type(per_head) is int and per_head > 0:
        stated = [sizes["dim"] // per_head]
    heads = stated[0] if stated else published_heads(sizes["dim"], sizes["ffn_dim"])
    if heads is None:
        raise Mismatch(
            [
                f"{source.item}: its number of heads is unknown, and width"
                f" {sizes['dim']} with ffn_dim {sizes['ffn_dim']} is not a size of"
                " Wan2.1;"
                f' write {{"num_heads": NUMBER}} into config.json beside'
                f" {source.files[-1].name}"
            ]
        )
    if type(heads) is not int or not 1 <= heads <= sizes["dim"]:
        raise Mismatch([f"config.json: num_heads={heads!r:.60}, expected at least 1"])
    if stated[1:] not in ([], [heads]):
        raise Mismatch([f"config.json: num_heads={stated[0]} and {stated[1]!r:.60}"])
    if sizes["dim"] % heads:
        raise Mismatch(
            [f"config.json: num_heads={heads} does not divide the width {sizes['dim']}"]
        )
    return heads


def published_heads(dim: int, ffn_dim: int) -> int | None:
    """Returns the number of heads of a published size of Wan2.1, or None."""
    return _HEADS.get((dim, ffn_dim))


def _whole(settings: Mapping[str, Any], name: str, default: int) -> int:
    value = default if settings.get(name) is None else settings[name]
    if type(value) is not int or not 1 <= value <= 2**20:
        raise Mismatch([f"config.json: {name}={value!r:.60}, expected at least 1"])
    return value


def _positive(settings: Mapping[str, Any], name: str, default: float) -> float:
    value = default if settings.get(name) is None else settings[name]
    if type(value) is not float or not 0 < value < 1:
        raise Mismatch([f"config.json: {name}={value!r:.60}, expected from 0 to 1"])
    return value


def _numbers(
    source: Source, name: str, default: tuple[float, ...], count: int
) -> tuple[float, ...]:
    """Returns one number per latent channel."""
    value = source.settings.get(name)
    value = default if value is None else value
    numbers = isinstance(value, list | tuple) and all(
        type(one) in (int, float) and math.isfinite(one) for one in value
    )
    if not numbers or len(value) != count:
        raise Mismatch(
            [
                f"{source.item}, config.json: {name}={value!r:.60}, expected {count}"
                " numbers"
            ]
        )
    return tuple(map(float, value))
