"""Settings of networks in the header of a safetensors file."""

from collections.abc import Mapping
from typing import Any

from anchor_jax.porting.convert import Mismatch
from anchor_jax.porting.files import parsed

HEADER_SETTINGS = (
    *("num_heads", "num_attention_heads", "attention_head_dim", "dim", "ffn_dim"),
    *("num_layers", "freq_dim", "text_dim", "text_len", "in_dim", "out_dim", "eps"),
    *("in_channels", "out_channels", "model_type", "_class_name", "qk_norm"),
    *("cross_attn_norm", "patch_size", "latents_mean", "latents_std", "z_dim"),
    *("image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "is_residual"),
    *("window_size", "rope_theta", "base_dim", "dim_mult", "num_res_blocks"),
    *("temperal_downsample", "decoder_base_dim", "vocab_size", "d_model", "d_kv"),
    *("d_ff", "feed_forward_proj", "layer_norm_epsilon"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
)
"""Names of network settings that are read from a file's header."""
_SECTIONS = ("config", "model_config", "transformer_config")


def with_header(
    settings: Mapping[str, Any], header: Mapping[str, str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns settings completed from a file's header, and notes about unused entries.

    Raises:
      Mismatch: A setting differs between the two.
    """
    values = dict(header)
    for name, text in header.items():
        try:
            values[name] = parsed(text)
        except (ValueError, RecursionError):
            continue
    for section in _SECTIONS:
        if isinstance(values.get(section), dict):
            values |= values.pop(section)
    known = {name: values.pop(name) for name in list(values) if name in HEADER_SETTINGS}
    problems = [
        f"config.json: {name}={settings[name]!r:.60}, the file's header {value!r:.60}"
        for name, value in known.items()
        if name in settings and settings[name] != value
    ]
    if problems:
        raise Mismatch(problems)
    rest = [name[:40] for name in values if name != "format"]
    notes = [
        f"of the header: {name}={value!r:.60} is used" for name, value in known.items()
    ]
    if rest:
        notes.append(f"unused header entries: {', '.join(sorted(rest)[:6])}")
    return {**settings, **known}, tuple(notes)
