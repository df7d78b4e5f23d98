"""The tables: official parameter names and ours, network by network.

Source of the names: algorithm.md, sections 1.8, 6.4, 9.1 and 9.2.
"""

from anchor_jax.porting.convert import Rule

_LINEAR = "o i -> i o"

UMT5 = (
    Rule("token_embedding.weight", "token_embedding/embedding"),
    Rule("norm.weight", "norm/scale"),
    Rule("blocks.{layer}.{norm:norm1|norm2}.weight", "blocks/{norm}/scale"),
    Rule(
        "blocks.{layer}.attn.{part:q|k|v|o}.weight",
        "blocks/attn/{part}/kernel",
        _LINEAR,
    ),
    Rule("blocks.{layer}.ffn.gate.0.weight", "blocks/ffn/gate/kernel", _LINEAR),
    Rule(
        "blocks.{layer}.ffn.{part:fc1|fc2}.weight",
        "blocks/ffn/{part}/kernel",
        _LINEAR,
    ),
    Rule(
        "blocks.{layer}.pos_embedding.embedding.weight",
        "blocks/position_bias/embedding",
    ),
)

_CONV_3D = "o i t h w -> t h w i o"
_CONV_2D = "o i h w -> h w i o"
_HALF = "{half:encoder|decoder}"
_STAGE = _HALF + r".{stage:downsamples|upsamples|middle}.{at:\d+}"
_OUR_STAGE = "{half}/{stage}_{at}"

VAE = (
    Rule("{mix:conv1|conv2}.weight", "{mix}/kernel", "o i 1 1 1 -> i o"),
    Rule("{mix:conv1|conv2}.bias", "{mix}/bias"),
    Rule(_HALF + ".conv1.weight", "{half}/conv1/kernel", _CONV_3D),
    Rule(_HALF + ".conv1.bias", "{half}/conv1/bias"),
    Rule(_HALF + ".head.0.gamma", "{half}/head_0/scale", "c 1 1 1 -> c"),
    Rule(_HALF + ".head.2.weight", "{half}/head_2/kernel", _CONV_3D),
    Rule(_HALF + ".head.2.bias", "{half}/head_2/bias"),
    Rule(
        _STAGE + ".residual.{norm:0|3}.gamma",
        _OUR_STAGE + "/residual_{norm}/scale",
        "c 1 1 1 -> c",
    ),
    Rule(
        _STAGE + ".residual.{conv:2|6}.weight",
        _OUR_STAGE + "/residual_{conv}/kernel",
        _CONV_3D,
    ),
    Rule(
        _STAGE + ".residual.{conv:2|6}.bias",
        _OUR_STAGE + "/residual_{conv}/bias",
    ),
    Rule(
        _STAGE + ".shortcut.weight",
        _OUR_STAGE + "/shortcut/kernel",
        "o i 1 1 1 -> i o",
    ),
    Rule(_STAGE + ".shortcut.bias", _OUR_STAGE + "/shortcut/bias"),
    Rule(_STAGE + ".norm.gamma", _OUR_STAGE + "/norm/scale", "c 1 1 -> c"),
    Rule(
        _STAGE + ".{part:to_qkv|proj}.weight",
        _OUR_STAGE + "/{part}/kernel",
        "o i 1 1 -> i o",
    ),
    Rule(_STAGE + ".{part:to_qkv|proj}.bias", _OUR_STAGE + "/{part}/bias"),
    Rule(_STAGE + ".resample.1.weight", _OUR_STAGE + "/resample/kernel", _CONV_2D),
    Rule(_STAGE + ".resample.1.bias", _OUR_STAGE + "/resample/bias"),
    Rule(_STAGE + ".time_conv.weight", _OUR_STAGE + "/time_conv/kernel", _CONV_3D),
    Rule(_STAGE + ".time_conv.bias", _OUR_STAGE + "/time_conv/bias"),
)


def _linear(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns the rules of a linear layer with a bias."""
    return (
        Rule(source + ".weight", target + "/kernel", _LINEAR),
        Rule(source + ".bias", target + "/bias"),
    )


# The linear layers inside the transformer's blocks: those that adapters go on. Keys and
# values of the prompt do not depend on the video, so ours stand apart from the blocks.
_BLOCK_LINEAR = (
    ("blocks.{layer}.self_attn.{part:q|k|v|o}", "blocks/self_attn/{part}"),
    ("blocks.{layer}.cross_attn.{part:q|o}", "blocks/cross_attn/{part}"),
    ("blocks.{layer}.cross_attn.{part:k|v}", "context/{part}"),
    ("blocks.{layer}.ffn.0", "blocks/ffn_in"),
    ("blocks.{layer}.ffn.2", "blocks/ffn_out"),
)

_OTHER_LINEAR = (
    ("text_embedding.0", "text_in"),
    ("text_embedding.2", "text_out"),
    ("time_embedding.0", "time_in"),
    ("time_embedding.2", "time_out"),
    ("time_projection.1", "time_projection"),
    ("head.head", "head/out"),
)

DIT = (
    Rule(
        "patch_embedding.weight",
        "patch_embed/kernel",
        "o i t h w -> (t h w i) o",
        sizes=(("t", 1), ("h", 2), ("w", 2)),
    ),
    Rule("patch_embedding.bias", "patch_embed/bias"),
    Rule("head.modulation", "head/modulation", "1 part c -> part c"),
    Rule("blocks.{layer}.modulation", "blocks/modulation", "1 part c -> part c"),
    Rule(
        "blocks.{layer}.self_attn.{norm:norm_q|norm_k}.weight",
        "blocks/self_attn/{norm}/scale",
    ),
    Rule("blocks.{layer}.norm3.weight", "blocks/norm3/scale"),
    Rule("blocks.{layer}.norm3.bias", "blocks/norm3/bias"),
    Rule("blocks.{layer}.cross_attn.norm_q.weight", "blocks/cross_attn/norm_q/scale"),
    Rule("blocks.{layer}.cross_attn.norm_k.weight", "context/norm_k/scale"),
    *(
        rule
        for source, target in _BLOCK_LINEAR + _OTHER_LINEAR
        for rule in _linear(source, target)
    ),
)

_PEFT = "base_model.model."

LORA = tuple(
    rule
    for source, target in _BLOCK_LINEAR
    for rule in (
        Rule(_PEFT + source + ".lora_A.weight", target + "/a", "r i -> i r"),
        Rule(_PEFT + source + ".lora_B.weight", target + "/b", "o r -> r o"),
    )
)
