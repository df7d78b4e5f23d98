"""Recognises unsupported weights by their names, and says what to do instead."""

import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from anchor_jax.errors import UserError
from anchor_jax.filetypes import unfinished_in
from anchor_jax.porting.key_tables import TABLES
from anchor_jax.wan.spec import WAN_2_1, Family

_ADAPTERS = (
    r"\.lora_[AB]\b|\.lora_(down|up)\.|^lora_|\.lora\.(down|up)\.|lora_linear_layer"
    r"|\.hada_w|\.lokr_w"
)
# In this order: networks with additional parts come first.
_KINDS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in {
        "adapters": _ADAPTERS,
        "VACE": r"^vace_",
        "image-to-video": (
            r"^img_emb\.|\.[kv]_img\.|\.image_embedder\.|\.add_[kv]_proj\."
        ),
        "controlled": (
            r"^(face_|motion_encoder|pose_patch|audio_|casual_audio|cond_encoder"
            r"|control_adapter|ref_conv|trainable_cond)"
        ),
        "Wan2.2 VAE": (
            r"^(encoder\.downsamples|decoder\.upsamples)\.\d+\.(downsamples|upsamples)"
            r"|^encoder\.down_blocks\.\d+\.resnets"
        ),
        "vae": (
            r"^(encoder|decoder)\.(downsamples|upsamples|middle|conv1|down_blocks"
            r"|up_blocks|mid_block|conv_in)\b"
        ),
        "text_encoder": r"^token_embedding\.|^shared\.weight$|^encoder\.block\.\d",
        "image encoder": r"^(visual|textual|vision_model)\.",
        "generator": r"^patch_embedding\.|^blocks\.\d+\.(self_attn|attn1)\.",
        "other": (
            r"^((double|single|single_transformer|transformer|joint|input|down|mid)"
            r"_blocks?|model\.layers|text_model)\."
        ),
    }.items()
)
_WORDS = {
    "generator": "a transformer of Wan2.1 (text to video)",
    "text_encoder": "a text encoder (umT5)",
    "vae": "a VAE of Wan2.1",
    "adapters": "low-rank adapters (LoRA)",
    "VACE": "a transformer of Wan VACE",
    "image-to-video": "a transformer for image to video (I2V)",
    "controlled": "a transformer with further conditions (audio, pose, camera)",
    "Wan2.2 VAE": "the VAE of Wan2.2-TI2V-5B",
    "image encoder": "an image or CLIP encoder",
    "other": "a network that is not Wan's",
}
_REMEDIES = {
    "adapters": "give it with --lora",
    "generator": "give it with --generator",
    "text_encoder": "put it into the folder of --wan",
    "vae": "put it into the folder of --wan",
}
_OTHERWISE = "give a file of Wan2.1 text to video (T2V), 1.3B or 14B"

_QUANTISED = re.compile(
    r"(^|\.)scaled_fp8$|\.scale_(weight|input)$|\.(weight|input)_scale(_inv|_2)?$"
    r"|\.comfy_quant$|\.(absmax|quant_map|quant_state.*|SCB|qweight|qzeros)$"
)
_TAKE_WIDE = (
    "quantised weights are not supported; use the file of the same weights in bfloat16,"
    " float16 or float32"
)
ADAPTER_FILES = (
    *("adapter_model.safetensors", "pytorch_lora_weights.safetensors"),
    *("adapter_model.bin", "pytorch_lora_weights.bin"),
)
_PARTS = ("mp_rank_*_model_states.pt", "zero_pp_rank_*", "*_optim_states.pt")


def kind_of(names: Iterable[str]) -> str | None:
    """Returns the kind of weights by their names: a network's item, or another kind."""
    names = list(names)
    for kind, pattern in _KINDS:
        if any(pattern.search(name) for name in names):
            return kind
    return None


def check_network(
    path: pathlib.Path,
    item: str,
    arrays: Mapping[str, np.ndarray],
    family: Family = WAN_2_1,
) -> None:
    """Raises `UserError` if plain names are those of other known weights.

    Args:
      path: The file, for messages.
      item: The expected item: generator, text_encoder or vae.
      arrays: Arrays by plain name.
      family: The expected family. One that has its own names is checked by its table.
    """
    check_values(path, arrays)
    if (item, family.name) in TABLES:
        return
    kind = kind_of(arrays)
    if kind not in (item, None):
        remedy = _REMEDIES.get(kind, _OTHERWISE)
        raise UserError(f"{path} holds {_WORDS[kind]}, not {_WORDS[item]}; {remedy}")
    if item == "generator":
        _check_channels(path, arrays, family)


def check_values(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Raises `UserError` if weights are quantised, or parts of sharded weights."""
    flat = [name for name in arrays if name.endswith("_flat_param")]
    if flat:
        raise UserError(
            f"{path} holds flat parameters of FSDP ({flat[0]!r:.120}) of one process"
            " each; save them again with StateDictType.FULL_STATE_DICT"
        )
    marks = [name for name in arrays if _QUANTISED.search(name)]
    if marks:
        raise UserError(f"{path} is quantised ({marks[0]!r:.120}); {_TAKE_WIDE}")
    for name, array in arrays.items():
        kind = np.dtype(array.dtype).name
        if kind.startswith("float8") or (kind == "int8" and name.endswith(".weight")):
            raise UserError(
                f"{path} is quantised ({name!r:.120} is {kind}); {_TAKE_WIDE}"
            )


def _check_channels(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], family: Family
) -> None:
    """Raises `UserError` if a transformer's input and output channels differ."""
    patch = arrays.get("patch_embedding.weight")
    head = arrays.get("head.head.bias", arrays.get("proj_out.bias"))
    if patch is None or head is None or patch.ndim != 5 or head.ndim != 1:
        return
    taken, given = patch.shape[1], head.shape[0] // math.prod(family.patch)
    if taken != given:
        raise UserError(
            f"{path} takes {taken} channels and gives {given}: a transformer for image"
            f" to video (I2V) or of Wan-Fun; {_OTHERWISE}"
        )
    if taken == 48 != family.latent_channels:
        raise UserError(
            f"{path} has 48 latent channels: it is Wan2.2-TI2V-5B; {_OTHERWISE}"
        )


def check_name(path: pathlib.Path) -> None:
    """Raises `UserError` if a file's name shows that it is only one part."""
    name = path.name
    if re.search(r"(high|low)[_-]?noise", name, re.IGNORECASE):
        raise UserError(
            f"{path} is one of the two transformers of Wan2.2-A14B (high and low"
            f" noise), which belong together and are not supported; {_OTHERWISE}"
        )
    if name.endswith(".distcp") or name == ".metadata":
        raise UserError(_distributed(path.parent))
    if any(path.match(pattern) for pattern in _PARTS):
        raise UserError(_deepspeed(path.parent))
    if name.endswith(".index.json"):
        raise UserError(f"{path} is the index of shards; give its folder")


def check_folder(folder: pathlib.Path) -> None:
    """Raises `UserError` if a folder is of a known but unsupported kind."""
    if (folder / ".metadata").is_file() or any(folder.glob("*.distcp")):
        raise UserError(_distributed(folder))
    parts = [*_PARTS, "zero_to_fp32.py"]
    if any(any(folder.glob(f"{at}{part}")) for part in parts for at in ("", "*/")):
        raise UserError(_deepspeed(folder))
    two = ("high_noise_model", "low_noise_model", "transformer_2")
    if any((folder / name).is_dir() for name in two):
        raise UserError(
            f"{folder} is Wan2.2-A14B, which has two transformers, for high and low"
            f" noise, and is not supported; {_OTHERWISE}"
        )
    if (folder / "snapshots").is_dir() and (folder / "blobs").is_dir():
        raise UserError(
            f"{folder} is a hub's cache; give the folder of one revision in it,"
            f" {folder / 'snapshots'}/REVISION"
        )


def explain(folder: pathlib.Path) -> None:
    """Raises `UserError` if the reason for a missing network is known."""
    if unfinished := unfinished_in(folder):
        raise UserError(
            f"{folder}: a download is unfinished ({', '.join(unfinished)}); let it"
            " finish, or start it again"
        )
    if packed := sorted(place.name for place in folder.glob("*.gguf")):
        raise UserError(f"{folder / packed[0]} is in the GGUF format; {_TAKE_WIDE}")


def explain_nothing(folder: pathlib.Path) -> None:
    """Raises `UserError` if a folder without networks is of a known kind."""
    explain(folder)
    if any((folder / name).is_file() for name in ADAPTER_FILES):
        raise UserError(
            f"{folder} holds only {_WORDS['adapters']}; {_REMEDIES['adapters']}"
        )


def _distributed(folder: pathlib.Path) -> str:
    return (
        f"{folder} is a checkpoint of torch.distributed.checkpoint, in parts; convert"
        " it to one file where PyTorch is installed, and give that file: python -m"
        f" torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUT.pt"
    )


def _deepspeed(folder: pathlib.Path) -> str:
    return (
        f"{folder} is a checkpoint of DeepSpeed, in parts; convert it to one file with"
        " the script that DeepSpeed writes beside it, and give that file: python"
        f" zero_to_fp32.py {folder} OUT"
    )
