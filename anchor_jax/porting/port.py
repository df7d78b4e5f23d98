"""Converts published weights into a checkpoint; all checks come before writing."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from anchor_jax import trees
from anchor_jax.errors import UserError, suggest
from anchor_jax.io import expand
from anchor_jax.porting import adapters, companions, lora_settings, sources
from anchor_jax.porting.convert import Mismatch, convert_lazily, fill
from anchor_jax.porting.files import digest
from anchor_jax.porting.finite import Watch
from anchor_jax.porting.key_tables import TABLES as TABLES
from anchor_jax.porting.key_tables import table_of
from anchor_jax.porting.lora_settings import Scales
from anchor_jax.porting.settings import (
    model_config,
    published_heads,
    text_config,
    vae_config,
)
from anchor_jax.porting.sources import Source
from anchor_jax.sampling.methods import METHODS
from anchor_jax.wan import lora, shapes
from anchor_jax.wan.spec import FAMILIES, WAN_2_1, Family
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.tokenizer import (
    SPIECE_NOTE,
    FastTokenizer,
    SentencePieceTokenizer,
)
from anchor_jax.wan.vae import VaeConfig
from anchor_jax.weights import checkpoint

_NOT_SIZES = ("dtype", "param_dtype", "remat", "unroll", "conv")
# Sizes that older versions do not know, with the value that they take.
_ADDED = {"pixel_patch": VaeConfig.pixel_patch}
# The first existing file is used.
_TOKENIZERS = {
    "tokenizer/tokenizer.json": FastTokenizer,
    "tokenizer/spiece.model": SentencePieceTokenizer,
}
_MISSING = {
    "generator": "--wan=FOLDER or --generator=FILE.pt",
    "text_encoder": "--wan=FOLDER, with the text encoder in it",
    "vae": "--wan=FOLDER, with the VAE in it",
    "tokenizer": "--wan=FOLDER, with google/umt5-xxl/ or tokenizer/ in it",
}


@dataclasses.dataclass(frozen=True, eq=False)
class PortPlan:
    """A checked plan of the checkpoint to write.

    Attributes:
      items: Trees of `Lazy` by item name.
      meta: The item `meta`, without the digests of the sources.
      sources: The sources of the weights.
      files: Small files by their path in the checkpoint.
      notes: Notes for the user: settings that were used, guessed, or ignored.
    """

    items: Mapping[str, Any]
    meta: Mapping[str, Any]
    sources: tuple[Source, ...]
    files: Mapping[str, pathlib.Path]
    notes: tuple[str, ...] = ()

    @property
    def read_bytes(self) -> int:
        """Bytes of the source files; each is read once for its digest."""
        return sum(path.stat().st_size for path in self.paths())

    @property
    def write_bytes(self) -> int:
        """Bytes of the arrays."""
        return trees.nbytes(dict(self.items))

    @property
    def peak_bytes(self) -> int:
        """Peak memory in bytes: the largest leaf, twice because it is encoded."""
        leaves = jax.tree.leaves(dict(self.items))
        return 2 * max(map(trees.leaf_nbytes, leaves), default=0)

    def missing(self) -> dict[str, str]:
        """Returns the missing parts that sampling needs, and how to add each."""
        present = {*self.items, *(name.split("/")[0] for name in self.files)}
        return {name: how for name, how in _MISSING.items() if name not in present}

    def paths(self) -> list[pathlib.Path]:
        """Returns the source files without duplicates."""
        return list(dict.fromkeys(path for one in self.sources for path in one.files))


def plan(
    wan: str | pathlib.Path | None = None,
    generator: str | pathlib.Path | None = None,
    lora: str | pathlib.Path | None = None,
    *,
    key: str | None = None,
    critic: bool = False,
    alpha: float | None = None,
    method: str | None = None,
    family: str = WAN_2_1.name,
) -> PortPlan:
    """Returns the plan of a conversion after all checks; writes nothing.

    Args:
      wan: A folder of Wan2.1, official or diffusers layout.
      generator: A checkpoint whose generator replaces the folder's.
      lora: Adapters for the generator.
      key: The entry of the checkpoint with the generator.
      critic: Whether to convert the checkpoint's critic too, as `fake_score`.
      alpha: Alpha of the adapters, which overrides the value in their files.
      method: One of `METHODS`: how the generator was trained.
      family: One of `FAMILIES`.

    Raises:
      UserError: Files are damaged, or do not fit their networks or each other.
    """
    method, family = _method(method, generator or lora), _family(family)
    found = _gather(wan, generator, lora, key, critic, family)
    if not found:
        raise UserError("nothing to port: give --wan=FOLDER, --generator=FILE or both")
    problems: list[str] = []
    networks = _configs(found, problems, family)
    scales = _scales(found.get("lora"), alpha, problems)
    parts = {}
    for item, source in found.items():
        try:
            parts[item] = _tree(source, networks, scales)
        except Mismatch as mismatch:
            problems += mismatch.problems
    if problems:
        raise Mismatch(problems)
    files = _companions(wan, networks.get("text_encoder"), family)
    notes = _notes(found, networks, scales, files)
    return PortPlan(
        items=_items(parts),
        meta={
            **_meta(method, found, networks, parts, scales),
            **({} if family == WAN_2_1 else {"family": family.name}),
            "notes": notes,
        },
        sources=tuple(found.values()),
        files=files,
        notes=notes,
    )


def run(
    plan: PortPlan,
    out: str | pathlib.Path,
    progress: Callable[[int], None] | None = None,
    overwrite: bool = False,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Writes the checkpoint and returns its manifest, the item `meta`.

    Args:
      plan: The result of `plan`.
      out: The folder. It is created under its name when complete.
      progress: Called with numbers of bytes that were read for digests, and then
        written; in total `read_bytes` + `write_bytes`.
      overwrite: Whether to replace an existing checkpoint.
      watch: Counts non-finite values, and refuses them unless it allows them.

    Raises:
      UserError: The folder exists or is not writable, or weights are not finite.
    """
    if not overwrite:
        check_free(out)
    watch = watch or Watch()
    files = {path: _file(path, progress) for path in plan.paths()}
    described = [
        {**entry, "files": [files[path] for path in source.files]}
        for entry, source in zip(plan.meta["sources"], plan.sources, strict=True)
    ]
    meta = {**plan.meta, "sources": described}
    items = {item: _watched(plan, item, watch) for item in plan.items}
    try:
        checkpoint.write(out, items, meta, plan.files, progress, overwrite)
    except Exception:
        # The writer may have wrapped the refusal in its own error.
        if watch.refusal is not None:
            raise watch.refusal from None
        raise
    return meta


def _watched(plan: PortPlan, item: str, watch: Watch) -> Any:
    """Returns an item's tree, whose values are checked while it is written."""
    layouts = {source.item: source.layout for source in plan.sources}
    tables = {"": table_of(item, layouts[item])}
    if item in ("generator", "fake_score"):
        tables = {"params": tables[""]}
    if item == "generator" and "lora" in layouts:
        tables["lora"] = table_of("lora", layouts["lora"])
    return watch.over(item, plan.items[item], tables)


def check_free(
    out: str | pathlib.Path, remedy: str = "choose another folder, or remove it"
) -> None:
    """Raises `UserError` if a folder exists and is not empty."""
    out = expand(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out={str(out)!r} already exists; {remedy}")


def _file(path: pathlib.Path, progress) -> dict[str, Any]:
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "sha256": digest(path, progress),
    }


def _method(method: str | None, trained: Any) -> str:
    """Returns the method, which is required with a generator or LoRA."""
    if method is None and trained:
        raise UserError(
            "--method is missing; --generator and --lora need it; choose one of"
            f" {', '.join(METHODS)}"
        )
    method = method or "wan"
    if method not in METHODS:
        raise UserError(
            f"unknown method {method!r}{suggest(method, METHODS, 'methods')}"
        )
    return method


def _family(name: str) -> Family:
    """Returns the family of a name."""
    if name not in FAMILIES:
        raise UserError(f"unknown family {name!r}{suggest(name, FAMILIES, 'families')}")
    return FAMILIES[name].family


def _gather(wan, generator, lora, key, critic, family) -> dict[str, Source]:
    """Returns the sources by item; a checkpoint's generator replaces the folder's."""
    networks = sources.open_wan(wan, family) if wan else []
    found = {source.item: source for source in networks}
    if (key or critic) and not generator:
        raise UserError("--key and --critic need --generator=FILE")
    if generator:
        source = sources.open_generator(generator, key, family=family)
        base = found.get("generator")
        if base and _width(base) == _width(source):
            settings = {**base.settings, **source.settings}
            source = dataclasses.replace(source, settings=settings)
        found["generator"] = source
    if critic:
        found["fake_score"] = sources.open_generator(
            generator, "critic", "fake_score", family
        )
    if lora:
        if "generator" not in found:
            raise UserError(
                f"--lora={str(lora)!r} needs the generator on which it was trained;"
                " give it with --generator or --wan"
            )
        found["lora"] = sources.open_lora(lora)
    return found


def _width(source: Source) -> tuple[int, ...] | None:
    bias = source.arrays.get("patch_embedding.bias")
    return None if bias is None else bias.shape


def _configs(
    found: Mapping[str, Source], problems: list[str], family: Family
) -> dict[str, Any]:
    """Returns the networks' configs by item; appends mismatches to `problems`."""
    read = {
        "generator": functools.partial(model_config, family=family),
        "text_encoder": text_config,
        "vae": functools.partial(vae_config, family=family),
    }
    configs = {}
    for item, of in read.items():
        if item not in found:
            continue
        try:
            configs[item] = of(found[item])
        except Mismatch as mismatch:
            problems += mismatch.problems
        except UserError:
            raise
        except ValueError as error:
            problems.append(f"{item}: {error}")
    model, text, vae = (configs.get(item) for item in read)
    if model and text and text.dim != model.text_dim:
        problems.append(
            f"the text encoder has width {text.dim}, but the generator expects"
            f" {model.text_dim}"
        )
    if model and text:
        configs["text_encoder"] = dataclasses.replace(text, text_len=model.text_len)
    if model and vae and vae.z_dim != model.latent_channels:
        problems.append(
            f"the VAE has {vae.z_dim} channels, but the generator expects"
            f" {model.latent_channels}"
        )
    return configs


def _scales(
    source: Source | None, alpha: float | None, problems: list[str]
) -> Scales | None:
    """Returns the scales of adapters; appends mismatches to `problems`.

    Raises:
      UserError: The scale is unknown, or `alpha` is invalid.
    """
    if source is None:
        if alpha is not None:
            raise UserError("--alpha needs adapters; give them with --lora")
        return None
    default = None
    if source.key == "generator_lora":
        default = "as in the published trainings of this layout (generator_lora)"
    elif source.adapters.form == "other" and not any(
        one.is_whole for one in source.statements
    ):
        default = "other readers of such files assume the same"
    try:
        return lora_settings.settle(
            source.adapters.ranks, list(source.statements), alpha, default
        )
    except Mismatch as mismatch:
        problems += mismatch.problems
        return None


def _tree(source: Source, configs: Mapping[str, Any], scales: Scales | None) -> Any:
    """Returns a network's tree of `Lazy`. Without a config only names are checked.

    Raises:
      Mismatch: Names, shapes or types are wrong.
    """
    table = table_of(source.item, source.layout)
    item = "generator" if source.item in ("fake_score", "lora") else source.item
    expected = shapes.of(configs[item]) if item in configs else None
    if source.item != "lora":
        return convert_lazily(source.arrays, table, expected)
    layers = configs[item].num_layers if item in configs else None
    factors = scales.factors if scales else {}
    arrays = adapters.filled(source.arrays, factors, table, layers)
    if expected is not None:
        expected = _expected_adapters(expected, arrays, table, source)
    return convert_lazily(arrays, table, expected)


def _expected_adapters(params: Any, arrays: Mapping[str, Any], table, source) -> Any:
    """Returns the shapes of adapters for the layers that have adapters."""
    rank = max(source.adapters.ranks.values(), default=1)
    start = functools.partial(lora.init, rank=rank, rng=jax.random.key(0))
    every = trees.flatten(jax.eval_shape(start, params))
    present = set()
    for name in arrays:
        for rule in table:
            if (fields := rule.match_source(name)) is not None:
                present.add(fill(rule.target, fields))
    found = {path: leaf for path, leaf in every.items() if path in present}
    return trees.unflatten(found)


def _notes(found, networks, scales: Scales | None, files) -> tuple[str, ...]:
    """Returns the notes about each source, prefixed with its item."""
    notes = [f"{item}: {note}" for item, one in found.items() for note in one.notes]
    model = networks.get("generator")
    heads = ("num_heads", "num_attention_heads")
    if model and not any(name in found["generator"].settings for name in heads):
        if published_heads(model.dim, model.ffn_dim):
            notes.append(
                f"generator: {model.num_heads} heads are assumed, as in the published"
                " model of this width, because no config.json gives their number"
            )
    if scales:
        notes += [f"lora: {note}" for note in scales.notes]
    counts = [name for name in _TOKENIZERS if name in files][:1]
    if counts == ["tokenizer/spiece.model"]:
        notes.append(f"tokenizer: {SPIECE_NOTE}")
    return tuple(notes)


def _items(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the networks' trees in the layout of the checkpoint's items."""
    items = dict(parts)
    adapters = items.pop("lora", None)
    for name in ("generator", "fake_score"):
        if name in items:
            items[name] = {"params": items[name]}
    if adapters is not None:
        items["generator"]["lora"] = adapters
    return items


def _meta(method, found, configs, parts, scales) -> dict[str, Any]:
    entries = [
        {
            "item": item,
            "layout": source.layout,
            "key": source.key,
            "prefixes": list(source.prefixes),
            "aliases": list(source.aliases),
            "alpha": scales.alpha if item == "lora" else None,
            "rank": scales.rank if item == "lora" else None,
            **({"factors": scales.different} if item == "lora" else {}),
        }
        for item, source in found.items()
    ]
    totals = {
        item: {
            "tensors": len(found[item].arrays),
            "parameters": trees.count(tree),
        }
        for item, tree in parts.items()
    }
    return {
        "format_version": checkpoint.FORMAT_VERSION,
        "method": method,
        "model": sizes_of(configs.get("generator")),
        "text": sizes_of(configs.get("text_encoder")),
        "vae": sizes_of(configs.get("vae")),
        "sources": entries,
        "totals": totals,
    }


def sizes_of(config: Any) -> dict[str, Any] | None:
    """Returns the fields of a config that the weights determine, for JSON."""
    if config is None:
        return None
    fields = dataclasses.asdict(config)
    unknown = {name for name, value in _ADDED.items() if fields.get(name) == value}
    left_out = unknown.union(_NOT_SIZES)
    return {name: value for name, value in fields.items() if name not in left_out}


def _companions(
    wan: Any, text: TextConfig | None, family: Family
) -> dict[str, pathlib.Path]:
    """Returns the small files by their path in the checkpoint.

    Raises:
      UserError: The tokenizer is damaged, or does not fit the text encoder.
    """
    found = companions.find(wan) if wan else {}
    for name, kind in _TOKENIZERS.items():
        if name in found:
            _check_tokenizer(kind, found[name], text, family.text_len)
            break
    return found


def _check_tokenizer(
    kind, path: pathlib.Path, text: TextConfig | None, text_len: int
) -> None:
    remedy = "use the tokenizer of google/umt5-xxl"
    try:
        tokenizer = kind(path, text_len)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a tokenizer of UMT5: {error}; {remedy}"
        ) from error
    if text is not None and tokenizer.vocab > text.vocab:
        raise UserError(
            f"{path} has {tokenizer.vocab} pieces, but the text encoder has"
            f" {text.vocab}; {remedy}"
        )
