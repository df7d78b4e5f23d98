"""Published weights as files hold them: what they are, found without reading them."""

import dataclasses
import hashlib
import json
import math
import mmap
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from anchor_jax.errors import UserError, suggest
from anchor_jax.io import expand
from anchor_jax.porting.convert import Mismatch
from anchor_jax.porting.rules import PEFT, UMT5_ALIAS
from anchor_jax.porting.torch_file import open_torch, release

KEYS = ("generator", "generator_ema", "model")
DIFFUSION = "diffusion_pytorch_model"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16"
VAE_FILE = "Wan2.1_VAE"
TOKENIZER = ("spiece.model", "tokenizer.json")

_FRAGMENTS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_PREFIXES = ("module.", "model.")
_LORA_PREFIXES = (PEFT, "transformer.", "diffusion_model.", *_PREFIXES)
_LORA = re.compile(r"(.*\.lora_[AB])(?:\.default)?\.weight")
_CHUNK = 2**24
_MAX_JSON = 2**26
_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One network's weights, with the names of one layout.

    Attributes:
      item: What they become: generator, lora, fake_score, text_encoder or vae.
      layout: Whose names they have: "wan" or "diffusers".
      arrays: Arrays by plain name, on mapped files.
      files: What was read.
      settings: What a config file beside them says, or empty.
      key: The entry of a checkpoint that they were taken from, if any.
      prefixes: What was removed from names to make them plain.
      aliases: Further names in the file for arrays that are in `arrays`.
    """

    item: str
    layout: str
    arrays: Mapping[str, np.ndarray]
    files: tuple[pathlib.Path, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    key: str | None = None
    prefixes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


def open_wan(folder: str | pathlib.Path) -> list[Source]:
    """Returns what a folder of Wan2.1 has, in the official or the diffusers layout.

    Raises:
      UserError: It is no such folder, or one of its files is broken or missing.
    """
    folder = _path(folder)
    if not folder.is_dir():
        raise UserError(f"wan={str(folder)!r} is no folder; {_WANTED}")
    parts = {
        ("generator", "diffusers"): (folder / "transformer", DIFFUSION),
        ("text_encoder", "diffusers"): (folder / "text_encoder", "model"),
        ("vae", "diffusers"): (folder / "vae", DIFFUSION),
        ("generator", "wan"): (folder, DIFFUSION),
    }
    found = []
    for (item, layout), (place, stem) in parts.items():
        if files := _shards(place, stem):
            arrays = open_files(place, files, stem)
            settings = _settings(place / "config.json")
            found.append(Source(item, layout, arrays, files, settings))
    for item, stem in (("text_encoder", TEXT_FILE), ("vae", VAE_FILE)):
        if place := _first(folder, (f"{stem}.pth", f"{stem}.safetensors")):
            arrays = _tensors(place, open_weights(place))
            found.append(Source(item, "wan", arrays, (place,)))
    items = [source.item for source in found]
    if not found or len(set(items)) < len(items):
        problem = "holds two layouts at once" if found else "holds no weights of Wan2.1"
        raise UserError(f"wan={str(folder)!r} {problem}; {_WANTED}")
    return [_without_alias(source) for source in found]


_WANTED = (
    f"expected a download of Wan2.1: {DIFFUSION}*.safetensors, {TEXT_FILE}.pth and"
    f" {VAE_FILE}.pth in one folder, or the diffusers folders transformer/,"
    " text_encoder/ and vae/"
)


def tokenizer_files(folder: str | pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the tokenizer's files that a folder of Wan2.1 has, by name."""
    folder = _path(folder)
    places = (folder / "google" / "umt5-xxl", folder / "tokenizer")
    return {
        name: place / name
        for place in reversed(places)
        for name in TOKENIZER
        if (place / name).is_file()
    }


def open_generator(
    path: str | pathlib.Path, key: str | None = None, item: str = "generator"
) -> Source:
    """Returns a transformer from a checkpoint of a trainer.

    Args:
      path: A .pt or .safetensors.
      key: The entry to take; if None the first of `KEYS` that is there, or else the
        file itself.
      item: What it is to become.

    Raises:
      UserError: The file is broken, or has no such entry.
    """
    path = _path(path)
    content = open_weights(path)
    if key is None:
        key = next((name for name in KEYS if name in content), None)
    elif key not in content:
        present = [name for name, value in content.items() if isinstance(value, dict)]
        raise UserError(f"{path} has no key {key!r}{suggest(key, present, 'keys')}")
    if key is None and "generator_lora" in content:
        raise UserError(f"{path} holds a LoRA, expected a generator; give it as --lora")
    arrays = _tensors(path, content if key is None else content[key])
    arrays, prefixes = plain_names(arrays, _PREFIXES)
    layout = _layout(arrays, "condition_embedder.")
    return Source(item, layout, arrays, (path,), key=key, prefixes=prefixes)


def open_lora(path: str | pathlib.Path) -> Source:
    """Returns adapters from a checkpoint of a trainer, or a file or folder of PEFT.

    Names are `base_model.model.MODULE.lora_A.weight`, whatever they were before.

    Raises:
      UserError: The file is broken, or holds no adapters.
    """
    path = _path(path)
    if path.is_dir():
        path = path / "adapter_model.safetensors"
    content = open_weights(path)
    key = "generator_lora" if "generator_lora" in content else None
    content = _tensors(path, content if key is None else content[key])
    plain, prefixes = plain_names(content, _LORA_PREFIXES)
    arrays = {}
    for name, array in plain.items():
        match = _LORA.fullmatch(name)
        arrays[PEFT + (f"{match[1]}.weight" if match else name)] = array
    if not any(_LORA.fullmatch(name) for name in plain):
        raise UserError(
            f"{path} holds no adapters; expected names such as"
            f" {PEFT}blocks.0.ffn.0.lora_A.weight"
        )
    layout = _layout(arrays, ".attn1.")
    settings = _settings(path.with_name("adapter_config.json"))
    return Source("lora", layout, arrays, (path,), settings, key, prefixes)


def plain_names(
    arrays: Mapping[str, np.ndarray], starts: Sequence[str]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns arrays named without what wrappers add, and what was removed.

    Fragments of sharding and compiling go wherever they are; a start goes if all names
    have it. Source: algorithm.md, section 6.5.

    Raises:
      UserError: Two names become one.
    """
    removed = [part for part in _FRAGMENTS if any(part in name for name in arrays)]
    plain: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        short = name
        for part in removed:
            short = short.replace(part, "")
        if short in plain:
            raise UserError(f"{name}: another name is {short} too; expected one")
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


def _layout(names: Mapping[str, Any], mark: str) -> str:
    return "diffusers" if any(mark in name for name in names) else "wan"


def _without_alias(source: Source) -> Source:
    """Returns the source without the second name of the token embedding.

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
        raise UserError(f"{alias}: differs from {name}, expected the same values")
    return dataclasses.replace(source, arrays=arrays, aliases=(alias,))


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Returns whether two arrays have the same bits, read some rows at a time."""
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


def open_weights(path: pathlib.Path) -> Mapping[str, Any]:
    """Returns what a .pt, .pth or .safetensors holds, by name; nothing is executed.

    Raises:
      UserError: There is no such file, or it is broken or holds no names.
    """
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    content = open_torch(path)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path} holds a {kind}, expected a dict of names to tensors")
    return content


def _tensors(path: pathlib.Path, content: Any) -> dict[str, np.ndarray]:
    """Returns the content if it is a dict of arrays."""
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise UserError(f"{path}: got a {kind}, expected a dict of names to tensors")
    problems = [
        f"{name!r}: {type(value).__name__}, expected a tensor"
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, np.ndarray)
    ]
    if problems:
        known = [name for name, value in content.items() if isinstance(value, dict)]
        hint = f"; choose a key among {', '.join(map(str, known))}" if known else ""
        raise Mismatch([f"{path}: {line}{hint}" for line in problems])
    return dict(content)


def open_files(
    folder: pathlib.Path, files: Sequence[pathlib.Path], stem: str
) -> dict[str, np.ndarray]:
    """Returns the arrays of one file, or of shards as their index says.

    Raises:
      UserError: A file is broken, or holds other names than the index says.
    """
    shards = [file for file in files if file.suffix == ".safetensors"]
    index = _index(folder, stem)
    arrays: dict[str, np.ndarray] = {}
    problems = []
    for shard in shards:
        found = open_safetensors(shard)
        for name in found.keys() & arrays.keys():
            problems.append(f"{name}: in {shard.name} and in another shard")
        if index is not None:
            own = {name for name, file in index.items() if file == shard.name}
            for name in sorted(own ^ found.keys()):
                which = "lacks it" if name in own else "holds it"
                problems.append(f"{name}: {shard.name} {which}, unlike the index says")
        arrays.update(found)
    if problems:
        raise Mismatch(problems)
    return arrays


def _shards(folder: pathlib.Path, stem: str) -> tuple[pathlib.Path, ...]:
    """Returns the files of a network: one, or an index and its shards, or none."""
    single = folder / f"{stem}.safetensors"
    if single.is_file():
        return (single,)
    index = _index(folder, stem)
    if index is None:
        alone = sorted(folder.glob(f"{stem}-*.safetensors"))
        if alone:
            raise UserError(
                f"{alone[0]} is a shard, but {stem}.safetensors.index.json is missing;"
                " download it too"
            )
        return ()
    shards = [_inside(folder, name) for name in sorted(set(index.values()))]
    for shard in shards:
        if not shard.is_file():
            raise UserError(
                f"{shard} is missing, and the index names it; download it too"
            )
    return (folder / f"{stem}.safetensors.index.json", *shards)


def _index(folder: pathlib.Path, stem: str) -> dict[str, str] | None:
    """Returns the file of each name, or None where there are no shards."""
    path = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").is_file() or not path.is_file():
        return None
    index = _json(path).get("weight_map")
    if not isinstance(index, dict) or not all(
        isinstance(file, str) for file in index.values()
    ):
        raise UserError(f"{path}: weight_map is no object of names to file names")
    return index


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the place of a shard, which must be in the folder.

    A link may lead to elsewhere in the same download, as those of the cache of
    huggingface_hub do (snapshots/REVISION/... to blobs/).
    """
    base = folder.resolve()
    for above in (base, *base.parents):
        if above.parent.name == "snapshots":
            base = above.parent.parent
            break
    plain = name == pathlib.PurePath(name).name and name.isprintable()
    usable = plain and name.endswith(".safetensors")
    if not usable or not (folder / name).resolve().is_relative_to(base):
        raise UserError(
            f"the index in {folder} names {name!r}, expected a .safetensors inside the"
            " folder; do not trust this download"
        )
    return folder / name


def open_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file by name, read-only views of a mapping of it.

    Raises:
      UserError: There is no such file, or its header is not right.
    """
    try:
        with path.open("rb") as file:
            length = path.stat().st_size
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; download it again") from error
    try:
        header, start = _header(data, length)
        return dict(_views(header, data, start, length))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no whole safetensors file: {error}; download it again"
        ) from error


def _header(data: mmap.mmap, length: int) -> tuple[dict[str, Any], int]:
    """Returns the header of a file, and where its data starts."""
    size = int.from_bytes(data[:8], "little")
    if length < 8 or size > min(length - 8, _MAX_JSON):
        raise ValueError(f"a header of {size} bytes in a file of {length}")
    header = json.loads(data[8 : 8 + size].decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    return header, 8 + size


def _views(
    header: Mapping[str, Any], data: mmap.mmap, start: int, length: int
) -> Iterator[tuple[str, np.ndarray]]:
    spans = []
    for name, entry in header.items():
        dtype, shape, span = _entry(name, entry)
        spans.append((*span, name))
        if span[1] > length - start:
            raise ValueError(f"{name} ends at byte {span[1]} of {length - start}")
        yield name, np.ndarray(shape, dtype, data, start + span[0])
    end = 0
    for first, last, name in sorted(spans):
        if first != end:
            raise ValueError(f"{name} starts at byte {first}, expected {end}")
        end = last
    if end != length - start:
        raise ValueError(f"{length - start} bytes of data, expected {end}")


def _entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """Returns type, shape and span in bytes of a tensor, or raises."""
    try:
        dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
        shape, span = tuple(entry["shape"]), tuple(entry["data_offsets"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name} is described by {entry!r:.80}") from error
    whole = all(type(size) is int and 0 <= size < 2**48 for size in (*shape, *span))
    if not whole or len(span) != 2 or len(shape) > 16:
        raise ValueError(f"{name} has shape {shape!r:.80} and offsets {span!r:.80}")
    expected = math.prod(shape) * dtype.itemsize
    if span[1] - span[0] != expected:
        raise ValueError(f"{name} has {span[1] - span[0]} bytes, expected {expected}")
    return dtype, shape, span


def digest(path: pathlib.Path, progress: Callable[[int], None] | None = None) -> str:
    """Returns the SHA-256 of a file; `progress` is called with bytes read."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            if progress:
                progress(len(chunk))
    return found.hexdigest()


def _settings(path: pathlib.Path) -> dict[str, Any]:
    return _json(path) if path.is_file() else {}


def _json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a file of JSON."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"more than {_MAX_JSON} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def _first(folder: pathlib.Path, names: Sequence[str]) -> pathlib.Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _path(path: str | pathlib.Path) -> pathlib.Path:
    return expand(path)
