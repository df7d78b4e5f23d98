"""Opens published weights and identifies their kind without reading the arrays."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anchor_jax.errors import UserError, suggest
from anchor_jax.io import expand
from anchor_jax.porting import adapters, lora_settings, recognise
from anchor_jax.porting.adapters import Adapters
from anchor_jax.porting.files import (
    first_of,
    open_files,
    open_weights,
    read_settings,
    shards_of,
    tensors_of,
)
from anchor_jax.porting.headers import HEADER_SETTINGS, with_header
from anchor_jax.porting.key_tables import PEFT, TABLES, UMT5_ALIAS
from anchor_jax.porting.lora_settings import Statement
from anchor_jax.porting.torch_file import release
from anchor_jax.wan.spec import WAN_2_1, Family

KEYS = ("generator", "generator_ema", "model")
DIFFUSION = "diffusion_pytorch_model"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16"
VAE_FILE = "Wan2.1_VAE"

_FRAGMENTS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_PREFIXES = ("module.", "model.", "diffusion_model.")
_LORA_PREFIXES = (PEFT, "transformer.", "pipe.dit.", *_PREFIXES)
# Prefix of the transformer in files that contain all networks.
_WITHIN = "model.diffusion_model."
_BESIDE = ("first_stage_model.", "cond_stage_model.", "text_encoders.", "vae.")
_CHUNK = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One network's weights, with the names of one layout.

    Attributes:
      item: Target item: generator, lora, fake_score, text_encoder or vae.
      layout: Naming scheme: "wan", "diffusers", or a family with its own names.
      arrays: Arrays by plain name, memory-mapped.
      files: The files.
      settings: Settings from a config file beside them, or empty.
      key: Entry of the checkpoint from which they were taken, or None.
      prefixes: Parts that were removed from the names.
      aliases: Additional names in the file for arrays in `arrays`.
      adapters: The form of `arrays`, if they are adapters.
      statements: Statements of the files on the adapters' scale.
      notes: Notes for the user about what was read and what was not.
    """

    item: str
    layout: str
    arrays: Mapping[str, np.ndarray]
    files: tuple[pathlib.Path, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    key: str | None = None
    prefixes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    adapters: Adapters | None = None
    statements: tuple[Statement, ...] = ()
    notes: tuple[str, ...] = ()


def open_wan(folder: str | pathlib.Path, family: Family = WAN_2_1) -> list[Source]:
    """Returns the networks in a folder of Wan2.1, official or diffusers layout.

    Weights of another family have the same files, perhaps with other names of tensors.

    Raises:
      UserError: It is not such a folder, or a file is damaged or missing.
    """
    folder = expand(folder)
    if not folder.is_dir():
        raise UserError(f"--wan={str(folder)!r} is not a folder; {_WANTED}")
    recognise.check_folder(folder)
    parts = (
        ("generator", folder / "transformer", DIFFUSION),
        ("text_encoder", folder / "text_encoder", "model"),
        ("vae", folder / "vae", DIFFUSION),
        ("generator", folder, DIFFUSION),
    )
    found = [
        _open_network(item, place, stem, files, family)
        for item, place, stem in parts
        if (files := shards_of(place, stem))
    ]
    for item, stem in (("text_encoder", TEXT_FILE), ("vae", VAE_FILE)):
        if place := first_of(folder, (f"{stem}.pth", f"{stem}.safetensors")):
            found.append(_open_single(place, item, family))
    items = [source.item for source in found]
    for item, patterns in _SINGLE.items():
        if item not in items and (place := _single(folder, patterns)):
            found.append(_open_single(place, item, family))
    if len(found) < len(_MARKS):
        recognise.explain(folder)
    if not found:
        recognise.explain_nothing(folder)
        raise UserError(f"--wan={str(folder)!r} has no weights of Wan2.1; {_WANTED}")
    if len(set(items)) < len(items):
        raise UserError(
            f"--wan={str(folder)!r} has a network in two layouts; {_WANTED}"
        )
    return [_without_alias(source) for source in found]


def _open_network(
    item: str,
    folder: pathlib.Path,
    stem: str,
    files: tuple[pathlib.Path, ...],
    family: Family = WAN_2_1,
) -> Source:
    """Returns a network from its file or shards, and an optional config.json."""
    arrays, header = open_files(folder, files, stem)
    recognise.check_network(files[-1], item, arrays, family)
    settings, notes = with_header(read_settings(folder / "config.json"), header)
    layout = _layout_of(item, arrays, family)
    return Source(item, layout, arrays, files, settings, notes=notes)


# Names of single files as repackaged for ComfyUI, and its folders.
_SINGLE = {
    "generator": ("wan2.1_t2v*.safetensors", "Wan2_1-T2V*.safetensors"),
    "text_encoder": ("umt5_xxl*.safetensors", "umt5-xxl*.safetensors"),
    "vae": ("wan_2.1_vae*.safetensors", "Wan2_1_VAE*.safetensors"),
}
_SINGLE_FOLDERS = (".", "diffusion_models", "text_encoders", "vae", "split_files/*")


def _single(folder: pathlib.Path, patterns: Sequence[str]) -> pathlib.Path | None:
    """Returns the single file of a network with a repackaged name, or None.

    Raises:
      UserError: There are several.
    """
    found = {
        path
        for pattern in patterns
        for place in _SINGLE_FOLDERS
        for path in folder.glob(f"{place}/{pattern}")
    }
    if len(found) > 1:
        names = ", ".join(sorted(path.name for path in found)[:4])
        raise UserError(f"{folder} has several files, {names}; keep only one of them")
    return found.pop() if found else None


def _open_single(path: pathlib.Path, item: str, family: Family) -> Source:
    """Returns a network from a single file with either layout of names."""
    recognise.check_name(path)
    content = open_weights(path)
    arrays, removed = plain_names(tensors_of(path, content.values), _PREFIXES)
    notes = [] if path.name.startswith((TEXT_FILE, VAE_FILE)) else [f"{path.name} read"]
    if item == "text_encoder" and arrays.pop("spiece_model", None) is not None:
        notes.append(
            "the tokenizer in the file is not used; put google/umt5-xxl/ into the"
            " folder of --wan"
        )
    recognise.check_network(path, item, arrays, family)
    layout = _layout_of(item, arrays, family)
    # A config.json beside single files of all networks is the transformer's.
    beside, unused = _own_settings(path) if item == "generator" else ({}, ())
    settings, more = with_header(beside, content.header)
    notes = (*notes, *unused, *more)
    return Source(
        item, layout, arrays, (path,), settings, prefixes=removed, notes=notes
    )


_MARKS = {
    "generator": "condition_embedder.",
    "text_encoder": "encoder.block.",
    "vae": "conv_in.",
}


_WANTED = (
    f"expected a download of Wan2.1: {DIFFUSION}*.safetensors, {TEXT_FILE}.pth and"
    f" {VAE_FILE}.pth in one folder, or the diffusers folders transformer/,"
    " text_encoder/ and vae/"
)


def open_generator(
    path: str | pathlib.Path,
    key: str | None = None,
    item: str = "generator",
    family: Family = WAN_2_1,
) -> Source:
    """Returns a transformer from a training checkpoint.

    Args:
      path: A .pt or .safetensors file.
      key: The entry to use. None takes the first of `KEYS` that exists, or else the
        whole file.
      item: The target item.
      family: The family of the transformer.

    Raises:
      UserError: The file is damaged, or has no such entry.
    """
    path = expand(path)
    if path.is_dir():
        return _open_folder(path, key, item, family)
    recognise.check_name(path)
    content = open_weights(path)
    values, notes = content.values, []
    if key is None:
        key = next((name for name in KEYS if isinstance(values.get(name), dict)), None)
    elif key not in values:
        present = [name for name, value in values.items() if isinstance(value, dict)]
        raise UserError(f"{path} has no key {key!r}{suggest(key, present, 'keys')}")
    if key is None and "generator_lora" in values:
        raise UserError(f"{path} is a LoRA, not a generator; give it with --lora")
    if key is not None:
        notes.append(f"its entry {key!r} is used" + _others(values, key))
    arrays = tensors_of(path, values if key is None else values[key])
    arrays, within = _within(arrays)
    arrays, prefixes = plain_names(arrays, _PREFIXES)
    recognise.check_network(path, "generator", arrays, family)
    beside, unused = _own_settings(path)
    settings, more = with_header(beside, content.header)
    layout = _layout_of("generator", arrays, family)
    return Source(
        item,
        layout,
        arrays,
        (path,),
        settings,
        key,
        prefixes,
        notes=(*notes, *within, *unused, *more),
    )


def _open_folder(
    folder: pathlib.Path, key: str | None, item: str, family: Family
) -> Source:
    """Returns the transformer in its own folder."""
    recognise.check_folder(folder)
    files = shards_of(folder, DIFFUSION)
    if not files or key is not None:
        recognise.explain_nothing(folder)
        raise UserError(
            f"{folder} is a folder without {DIFFUSION}.safetensors; give a file, or"
            " give the folder of a complete model with --wan"
        )
    network = _open_network("generator", folder, DIFFUSION, files, family)
    return dataclasses.replace(network, item=item)


def _others(content: Mapping[str, Any], key: str) -> str:
    """Names the entries of a checkpoint that are not used."""
    names = [str(name)[:40] for name in content if name != key]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f", not {', '.join(names[:6])}{more}" if names else ""


def _within(arrays: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the transformer of a file with all networks, and notes about the rest."""
    own = {name: part for name, part in arrays.items() if name.startswith(_WITHIN)}
    rest = [name for name in arrays if name not in own]
    if not own or not all(name.startswith(_BESIDE) for name in rest) or not rest:
        return dict(arrays), ()
    return own, (f"{len(rest)} tensors of other networks in the file are not used",)


def _own_settings(path: pathlib.Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the settings in config.json beside a transformer's file, and notes.

    A config.json without any known setting belongs to something else.
    """
    settings = read_settings(path.with_name("config.json"))
    if not settings or any(name in settings for name in HEADER_SETTINGS):
        return settings, ()
    return {}, ("config.json beside the file has no known setting, so it is not used",)


def open_lora(path: str | pathlib.Path) -> Source:
    """Returns adapters from a training checkpoint, or from an adapter file or folder.

    All names are converted to `base_model.model.MODULE.lora_A.weight`.
    `anchor_jax.porting.adapters` lists the known forms.

    Raises:
      UserError: The file is damaged, or has no adapters.
    """
    path = expand(path)
    if path.is_dir():
        recognise.check_folder(path)
        path = first_of(path, recognise.ADAPTER_FILES) or _only(path)
    recognise.check_name(path)
    content = open_weights(path)
    values, key, notes = content.values, _lora_key(path, content.values), []
    if key is not None:
        notes.append(f"its entry {key!r} is used" + _others(values, key))
    arrays = tensors_of(path, _own_tensors(values) if key is None else values[key])
    recognise.check_values(path, arrays)
    plain, prefixes = plain_names(arrays, _LORA_PREFIXES)
    found = adapters.read(plain, prefixes)
    if found is None:
        kind = recognise.kind_of(plain)
        what = "a whole transformer" if kind == "generator" else "no adapters"
        raise UserError(
            f"{path} holds {what}; expected LoRA tensors with names such as"
            f" {PEFT}blocks.0.ffn.0.lora_A.weight"
        )
    said = content.header or {
        name: value
        for name, value in values.items()
        if name not in arrays and name != key
    }
    statements, unused = lora_settings.of_sections(path.name, said)
    if found.alphas:
        statements.append(lora_settings.of_tensors(found.alphas))
    settings = read_settings(path.with_name("adapter_config.json"))
    if settings:
        statements.append(lora_settings.of_peft("adapter_config.json", settings))
    unused = [name for name in unused if content.header and name != "format"]
    if unused:
        notes.append(f"unused header entries: {', '.join(sorted(unused)[:6])}")
    return Source(
        item="lora",
        layout=_layout(found.arrays, ".attn1.", ".attn2.", ".ffn.net."),
        arrays=found.arrays,
        files=(path,),
        settings=settings,
        key=key,
        prefixes=prefixes,
        adapters=found,
        statements=tuple(statements),
        notes=tuple(notes),
    )


def _only(folder: pathlib.Path) -> pathlib.Path:
    """Returns the only safetensors file in a folder of adapters."""
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    recognise.explain(folder)
    names = ", ".join(path.name for path in found[:5]) or "none"
    raise UserError(
        f"{folder} has no {' or '.join(recognise.ADAPTER_FILES[:2])}; its safetensors"
        f" files: {names}; give the file itself"
    )


def _lora_key(path: pathlib.Path, values: Mapping[str, Any]) -> str | None:
    """Returns the entry of a checkpoint with the adapters; None is the whole file.

    Raises:
      UserError: Several entries have adapters.
    """
    if isinstance(values.get("generator_lora"), dict):
        return "generator_lora"
    dicts = [name for name, value in values.items() if isinstance(value, dict)]
    with_adapters = [
        name
        for name in dicts
        if recognise.kind_of(map(str, values[name])) == "adapters"
    ]
    alone = not any(isinstance(value, np.ndarray) for value in values.values())
    if alone and len(with_adapters) > 1:
        names = ", ".join(str(name)[:40] for name in with_adapters[:6])
        raise UserError(
            f"{path} holds several adapters, {names}; save the one that you want in its"
            " own file"
        )
    return with_adapters[0] if alone and with_adapters else None


def _own_tensors(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns only the tensors of a checkpoint that mixes tensors and settings."""
    own = {k: v for k, v in values.items() if isinstance(v, np.ndarray)}
    return own or values


def plain_names(
    arrays: Mapping[str, np.ndarray], starts: Sequence[str]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Removes from names the parts that wrappers add; returns arrays and the parts.

    Fragments of sharding and compiling are removed everywhere. A prefix is removed if
    all names have it.

    Source: porting/README.md, "Names".

    Raises:
      UserError: Two names become equal.
    """
    removed = [part for part in _FRAGMENTS if any(part in name for name in arrays)]
    plain: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        short = name
        for part in removed:
            short = short.replace(part, "")
        if short in plain:
            raise UserError(
                f"{name}: without wrapper parts this is {short}, but another tensor has"
                " the same name; remove one of them"
            )
        plain[short] = array
    while plain and (start := _common(plain, starts)):
        plain = {name.removeprefix(start): array for name, array in plain.items()}
        removed.append(start)
    return plain, tuple(removed)


def _common(names: Mapping[str, Any], starts: Sequence[str]) -> str | None:
    for start in starts:
        if all(name.startswith(start) for name in names):
            return start
    return None


def _layout_of(item: str, names: Mapping[str, Any], family: Family) -> str:
    """Returns the layout of a network's names: a family's own, if it has a table."""
    if (item, family.name) in TABLES:
        return family.name
    return _layout(names, _MARKS[item])


def _layout(names: Mapping[str, Any], *marks: str) -> str:
    is_other = any(mark in name for name in names for mark in marks)
    return "diffusers" if is_other else "wan"


def _without_alias(source: Source) -> Source:
    """Removes the duplicate name of the token embedding.

    Raises:
      UserError: The two arrays differ.
    """
    alias, name = UMT5_ALIAS
    if source.item != "text_encoder" or alias not in source.arrays:
        return source
    arrays = dict(source.arrays)
    again = arrays.pop(alias)
    if name not in arrays:
        return dataclasses.replace(source, arrays={**arrays, name: again})
    if not _equal(arrays[name], again):
        raise UserError(f"{alias} must equal {name}, but the values differ")
    return dataclasses.replace(source, arrays=arrays, aliases=(alias,))


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether two arrays are bit-identical; reads a few rows at a time."""
    if one.shape != other.shape or one.dtype != other.dtype or one.ndim == 0:
        return False
    step = max(1, _CHUNK // max(1, one[:1].nbytes))
    for row in range(0, len(one), step):
        parts = one[row : row + step], other[row : row + step]
        if parts[0].tobytes() != parts[1].tobytes():
            return False
        for part in parts:
            release(part)
    return True
