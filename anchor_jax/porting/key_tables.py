"""The key tables: official parameter names and ours, for each network.

Source of the official names: porting/README.md, "Names". Tables ending in `_DIFFUSERS`
and `_TRANSFORMERS` have the names of these libraries.
"""

from anchor_jax.porting.convert import KeyRule

_LINEAR = "o i -> i o"

UMT5 = (
    KeyRule("token_embedding.weight", "token_embedding/embedding"),
    KeyRule("norm.weight", "norm/scale"),
    KeyRule("blocks.{layer}.{norm:norm1|norm2}.weight", "blocks/{norm}/scale"),
    KeyRule(
        "blocks.{layer}.attn.{part:q|k|v|o}.weight",
        "blocks/attn/{part}/kernel",
        _LINEAR,
    ),
    KeyRule("blocks.{layer}.ffn.gate.0.weight", "blocks/ffn/gate/kernel", _LINEAR),
    KeyRule(
        "blocks.{layer}.ffn.{part:fc1|fc2}.weight",
        "blocks/ffn/{part}/kernel",
        _LINEAR,
    ),
    KeyRule(
        "blocks.{layer}.pos_embedding.embedding.weight",
        "blocks/position_bias/embedding",
    ),
)

_T5_LAYER = "encoder.block.{layer}.layer"
_T5_ATTENTION = _T5_LAYER + ".0.SelfAttention"
_T5_FFN = _T5_LAYER + ".1.DenseReluDense"

# Second names that a file may hold for arrays of its table.
UMT5_ALIAS = ("encoder.embed_tokens.weight", "shared.weight")

UMT5_TRANSFORMERS = (
    KeyRule("shared.weight", "token_embedding/embedding"),
    KeyRule("encoder.final_layer_norm.weight", "norm/scale"),
    KeyRule(_T5_LAYER + ".0.layer_norm.weight", "blocks/norm1/scale"),
    KeyRule(_T5_LAYER + ".1.layer_norm.weight", "blocks/norm2/scale"),
    KeyRule(
        _T5_ATTENTION + ".{part:q|k|v|o}.weight", "blocks/attn/{part}/kernel", _LINEAR
    ),
    KeyRule(
        _T5_ATTENTION + ".relative_attention_bias.weight",
        "blocks/position_bias/embedding",
    ),
    KeyRule(_T5_FFN + ".wi_0.weight", "blocks/ffn/gate/kernel", _LINEAR),
    KeyRule(_T5_FFN + ".wi_1.weight", "blocks/ffn/fc1/kernel", _LINEAR),
    KeyRule(_T5_FFN + ".wo.weight", "blocks/ffn/fc2/kernel", _LINEAR),
)

_CONV_3D = "o i t h w -> t h w i o"
_CONV_2D = "o i h w -> h w i o"
_HALF = "{half:encoder|decoder}"
_STAGE = _HALF + r".{stage:downsamples|upsamples|middle}.{at:\d+}"
_OUR_STAGE = "{half}/{stage}_{at}"

VAE = (
    KeyRule("{mix:conv1|conv2}.weight", "{mix}/kernel", "o i 1 1 1 -> i o"),
    KeyRule("{mix:conv1|conv2}.bias", "{mix}/bias"),
    KeyRule(_HALF + ".conv1.weight", "{half}/conv1/kernel", _CONV_3D),
    KeyRule(_HALF + ".conv1.bias", "{half}/conv1/bias"),
    KeyRule(_HALF + ".head.0.gamma", "{half}/head_0/scale", "c 1 1 1 -> c"),
    KeyRule(_HALF + ".head.2.weight", "{half}/head_2/kernel", _CONV_3D),
    KeyRule(_HALF + ".head.2.bias", "{half}/head_2/bias"),
    KeyRule(
        _STAGE + ".residual.{norm:0|3}.gamma",
        _OUR_STAGE + "/residual_{norm}/scale",
        "c 1 1 1 -> c",
    ),
    KeyRule(
        _STAGE + ".residual.{conv:2|6}.weight",
        _OUR_STAGE + "/residual_{conv}/kernel",
        _CONV_3D,
    ),
    KeyRule(
        _STAGE + ".residual.{conv:2|6}.bias",
        _OUR_STAGE + "/residual_{conv}/bias",
    ),
    KeyRule(
        _STAGE + ".shortcut.weight",
        _OUR_STAGE + "/shortcut/kernel",
        "o i 1 1 1 -> i o",
    ),
    KeyRule(_STAGE + ".shortcut.bias", _OUR_STAGE + "/shortcut/bias"),
    KeyRule(_STAGE + ".norm.gamma", _OUR_STAGE + "/norm/scale", "c 1 1 -> c"),
    KeyRule(
        _STAGE + ".{part:to_qkv|proj}.weight",
        _OUR_STAGE + "/{part}/kernel",
        "o i 1 1 -> i o",
    ),
    KeyRule(_STAGE + ".{part:to_qkv|proj}.bias", _OUR_STAGE + "/{part}/bias"),
    KeyRule(_STAGE + ".resample.1.weight", _OUR_STAGE + "/resample/kernel", _CONV_2D),
    KeyRule(_STAGE + ".resample.1.bias", _OUR_STAGE + "/resample/bias"),
    KeyRule(_STAGE + ".time_conv.weight", _OUR_STAGE + "/time_conv/kernel", _CONV_3D),
    KeyRule(_STAGE + ".time_conv.bias", _OUR_STAGE + "/time_conv/bias"),
)


_POINT_3D = "o i 1 1 1 -> i o"
_POINT_2D = "o i 1 1 -> i o"
_GAMMA_3D = "c 1 1 1 -> c"
_GAMMA_2D = "c 1 1 -> c"


def _layer(source: str, target: str, layout: str) -> tuple[KeyRule, KeyRule]:
    """Returns the rules of a convolution with a bias."""
    return (
        KeyRule(source + ".weight", target + "/kernel", layout),
        KeyRule(source + ".bias", target + "/bias"),
    )


def _residual(source: str, target: str) -> tuple[KeyRule, ...]:
    return (
        KeyRule(source + ".norm1.gamma", target + "/residual_0/scale", _GAMMA_3D),
        KeyRule(source + ".norm2.gamma", target + "/residual_3/scale", _GAMMA_3D),
        *_layer(source + ".conv1", target + "/residual_2", _CONV_3D),
        *_layer(source + ".conv2", target + "/residual_6", _CONV_3D),
        *_layer(source + ".conv_shortcut", target + "/shortcut", _POINT_3D),
    )


def _resample(source: str, target: str) -> tuple[KeyRule, ...]:
    return (
        *_layer(source + ".resample.1", target + "/resample", _CONV_2D),
        *_layer(source + ".time_conv", target + "/time_conv", _CONV_3D),
    )


def _upward(levels: int = 4, blocks: int = 3) -> tuple[KeyRule, ...]:
    """Returns the rules of the decoder's stages, numbered by level and within it."""
    rules, at = [], 0
    for level in range(levels):
        above = f"decoder.up_blocks.{level}"
        for block in range(blocks):
            target = f"decoder/upsamples_{at}"
            rules += _residual(f"{above}.resnets.{block}", target)
            at += 1
        if level < levels - 1:
            rules += _resample(f"{above}.upsamplers.0", f"decoder/upsamples_{at}")
            at += 1
    return tuple(rules)


VAE_DIFFUSERS = (
    *_layer("quant_conv", "conv1", _POINT_3D),
    *_layer("post_quant_conv", "conv2", _POINT_3D),
    *_layer(_HALF + ".conv_in", "{half}/conv1", _CONV_3D),
    *_layer(_HALF + ".conv_out", "{half}/head_2", _CONV_3D),
    KeyRule(_HALF + ".norm_out.gamma", "{half}/head_0/scale", _GAMMA_3D),
    *_residual(_HALF + ".mid_block.resnets.0", "{half}/middle_0"),
    *_residual(_HALF + ".mid_block.resnets.1", "{half}/middle_2"),
    KeyRule(
        _HALF + ".mid_block.attentions.0.norm.gamma",
        "{half}/middle_1/norm/scale",
        _GAMMA_2D,
    ),
    *_layer(
        _HALF + ".mid_block.attentions.0.{part:to_qkv|proj}",
        "{half}/middle_1/{part}",
        _POINT_2D,
    ),
    *_residual(r"encoder.down_blocks.{at:\d+}", "encoder/downsamples_{at}"),
    *_resample(r"encoder.down_blocks.{at:\d+}", "encoder/downsamples_{at}"),
    *_upward(),
)


def _linear(source: str, target: str) -> tuple[KeyRule, KeyRule]:
    """Returns the rules of a linear layer with a bias."""
    return _layer(source, target, _LINEAR)


# The linear layers inside the transformer's blocks: those that adapters change.
# Keys and values of the prompt do not depend on the video, so ours are
# outside the blocks.
_BLOCK_LINEAR = (
    ("blocks.{layer}.self_attn.{part:q|k|v|o}", "blocks/self_attn/{part}"),
    ("blocks.{layer}.cross_attn.{part:q|o}", "blocks/cross_attn/{part}"),
    ("blocks.{layer}.cross_attn.{part:k|v}", "context/{part}"),
    ("blocks.{layer}.ffn.0", "blocks/ffn_in"),
    ("blocks.{layer}.ffn.2", "blocks/ffn_out"),
)
_BLOCK_LINEAR_DIFFUSERS = (
    ("blocks.{layer}.attn1.to_{part:q|k|v}", "blocks/self_attn/{part}"),
    ("blocks.{layer}.attn1.to_out.0", "blocks/self_attn/o"),
    ("blocks.{layer}.attn2.to_q", "blocks/cross_attn/q"),
    ("blocks.{layer}.attn2.to_out.0", "blocks/cross_attn/o"),
    ("blocks.{layer}.attn2.to_{part:k|v}", "context/{part}"),
    ("blocks.{layer}.ffn.net.0.proj", "blocks/ffn_in"),
    ("blocks.{layer}.ffn.net.2", "blocks/ffn_out"),
)

BLOCK_MODULES = tuple(
    source for source, _ in (*_BLOCK_LINEAR, *_BLOCK_LINEAR_DIFFUSERS)
)
"""Templates of the names of the linear layers inside the blocks, in both styles."""

_OTHER_LINEAR = (
    ("text_embedding.0", "text_in"),
    ("text_embedding.2", "text_out"),
    ("time_embedding.0", "time_in"),
    ("time_embedding.2", "time_out"),
    ("time_projection.1", "time_projection"),
    ("head.head", "head/out"),
)
_OTHER_LINEAR_DIFFUSERS = (
    ("condition_embedder.text_embedder.linear_1", "text_in"),
    ("condition_embedder.text_embedder.linear_2", "text_out"),
    ("condition_embedder.time_embedder.linear_1", "time_in"),
    ("condition_embedder.time_embedder.linear_2", "time_out"),
    ("condition_embedder.time_proj", "time_projection"),
    ("proj_out", "head/out"),
)


def _dit(
    linear: tuple[tuple[str, str], ...],
    own: str,
    cross: str,
    norm: str,
    block_table: str,
    head_table: str,
) -> tuple[KeyRule, ...]:
    """Returns the transformer's table for one way of naming.

    Args:
      linear: Pairs of names for the linear layers.
      own: Name of the self-attention.
      cross: Name of the attention to the prompt.
      norm: Name of the norm before `cross`.
      block_table: Name of a block's modulation.
      head_table: Name of the head's modulation.
    """
    block = "blocks.{layer}."
    return (
        KeyRule(
            "patch_embedding.weight",
            "patch_embed/kernel",
            "o i t h w -> (t h w i) o",
            sizes=(("t", 1), ("h", 2), ("w", 2)),
        ),
        KeyRule("patch_embedding.bias", "patch_embed/bias"),
        KeyRule(head_table, "head/modulation", "1 part c -> part c"),
        KeyRule(block + block_table, "blocks/modulation", "1 part c -> part c"),
        KeyRule(
            block + own + ".{norm:norm_q|norm_k}.weight",
            "blocks/self_attn/{norm}/scale",
        ),
        KeyRule(f"{block}{norm}.weight", "blocks/norm3/scale"),
        KeyRule(f"{block}{norm}.bias", "blocks/norm3/bias"),
        KeyRule(f"{block}{cross}.norm_q.weight", "blocks/cross_attn/norm_q/scale"),
        KeyRule(f"{block}{cross}.norm_k.weight", "context/norm_k/scale"),
        *(rule for source, target in linear for rule in _linear(source, target)),
    )


DIT = _dit(
    _BLOCK_LINEAR + _OTHER_LINEAR,
    own="self_attn",
    cross="cross_attn",
    norm="norm3",
    block_table="modulation",
    head_table="head.modulation",
)
DIT_DIFFUSERS = _dit(
    _BLOCK_LINEAR_DIFFUSERS + _OTHER_LINEAR_DIFFUSERS,
    own="attn1",
    cross="attn2",
    norm="norm2",
    block_table="scale_shift_table",
    head_table="scale_shift_table",
)

PEFT = "base_model.model."


def _adapters(linear: tuple[tuple[str, str], ...]) -> tuple[KeyRule, ...]:
    """Returns the table of adapters on some linear layers."""
    return tuple(
        rule
        for source, target in linear
        for rule in (
            KeyRule(PEFT + source + ".lora_A.weight", target + "/a", "r i -> i r"),
            KeyRule(PEFT + source + ".lora_B.weight", target + "/b", "o r -> r o"),
        )
    )


LORA = _adapters(_BLOCK_LINEAR)
LORA_DIFFUSERS = _adapters(_BLOCK_LINEAR_DIFFUSERS)

TABLES = {
    ("generator", "wan"): DIT,
    ("generator", "diffusers"): DIT_DIFFUSERS,
    ("lora", "wan"): LORA,
    ("lora", "diffusers"): LORA_DIFFUSERS,
    ("text_encoder", "wan"): UMT5,
    ("text_encoder", "diffusers"): UMT5_TRANSFORMERS,
    ("vae", "wan"): VAE,
    ("vae", "diffusers"): VAE_DIFFUSERS,
}


def table_of(item: str, layout: str) -> tuple[KeyRule, ...]:
    """Returns the table of a network's names in a layout."""
    return TABLES["generator" if item == "fake_score" else item, layout]
