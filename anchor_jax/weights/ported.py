"""The bundle in a checkpoint of ported weights."""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from anchor_jax import io, places, sharding, trees
from anchor_jax.config import from_config
from anchor_jax.errors import UserError, reason, shown, suggest
from anchor_jax.limits import check_sizes
from anchor_jax.wan import shapes
from anchor_jax.wan.spec import FAMILIES, WAN_2_1, ModelConfig
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.tokenizer import Tokenizer, load_tokenizer
from anchor_jax.wan.vae import VaeCodec, VaeConfig
from anchor_jax.weights import checkpoint
from anchor_jax.weights.bundle import Bundle
from anchor_jax.weights.options import LoadOptions
from anchor_jax.weights.tensors import (
    check_tensors,
    check_vocab,
    damaged_weights,
    expected_lora,
    merge_lora,
)

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class _Ported:
    """The content of the item `meta` of ported weights."""

    model: ModelConfig
    text: TextConfig
    vae: VaeConfig
    digest: str


def load_ported(folder: pathlib.Path, options: LoadOptions) -> Bundle:
    """Returns the bundle in a checkpoint."""
    meta = checkpoint.read_meta(folder)
    _check_items(folder, checkpoint.items(folder))
    with damaged_weights(folder):
        ported = _read_ported(meta, options.dtype or "bfloat16")
        _check_ported(ported)
        if "family" in meta:
            _check_strides(ported)
    model, text = options.with_param_dtype(ported.model), ported.text
    expected = _expected_ported(folder, ported)
    network = options.item(checkpoint.items(folder))
    if network == "fake_score":
        expected[network] = {"params": expected["generator"]["params"]}
    for item in expected:
        stored = trees.flatten(checkpoint.shapes(folder, item))
        with damaged_weights(folder):
            check_tensors(item, stored, trees.flatten(expected[item]))
    tokenizer = _ported_tokenizer(folder, text)

    def load(item: str, placements, mesh: Mesh | None):
        places = None
        if mesh is not None:
            places = sharding.shardings(expected[item], placements, mesh)
        return checkpoint.restore(folder, item, text.dtype, places)

    return Bundle(
        model=model,
        text=text,
        grid=options.fitting_grid(model, model.family.default_grid),
        codec=VaeCodec(ported.vae),
        tokenizer=tokenizer,
        encode_prompts=options.encoder(
            text,
            tokenizer,
            lambda: load("text_encoder", sharding.TEXT, options.text_mesh),
        ),
        load_variables=lambda: _load_network(folder, network, expected, options),
        load_codec=lambda: load("vae", sharding.CODEC, options.mesh),
        metadata=meta,
        digest=ported.digest
        if network == "generator"
        else hashlib.sha256(f"{network} {ported.digest}".encode()).hexdigest(),
    )


def _check_items(folder: pathlib.Path, present: Sequence[str]) -> None:
    """Raises UserError unless every network of a bundle exists."""
    for item in ("generator", "text_encoder", "vae"):
        if item not in present:
            raise UserError(
                f"{folder} has no {item}, only {', '.join(present)}; port all parts"
                " at once into a new folder, with anchor-jax port --wan=FOLDER"
                " [--generator=FILE --lora=FILE --method=METHOD] --out=NEW; FOLDER is"
                " one of the published Wan2.1 files"
            )


def _read_ported(meta: Mapping[str, Any], dtype: str) -> _Ported:
    def read(kind, name: str):
        section = meta.get(name)
        if not isinstance(section, Mapping):
            raise UserError(
                f"meta.{name} is {shown(section)}, which must be an object of sizes"
            )
        types = {"dtype": dtype, "param_dtype": dtype}
        whole = dataclasses.asdict(kind()) | dict(section) | types
        return from_config(kind, whole, f"meta.{name}")

    return _Ported(
        read(_model_kind(meta), "model"),
        read(TextConfig, "text"),
        read(VaeConfig, "vae"),
        _source_digest(meta.get("sources")),
    )


def _model_kind(meta: Mapping[str, Any]) -> type[ModelConfig]:
    """Returns the class of the generator's sizes; that of Wan2.1 by default."""
    name = meta.get("family", WAN_2_1.name)
    if name not in FAMILIES:
        known = suggest(str(name), FAMILIES, "families")
        raise UserError(f"meta.family={shown(name)}{known}")
    return FAMILIES[name]


def _source_digest(sources: Any) -> str:
    """Returns a SHA-256 of the ported files' SHA-256, independent of their names.

    It includes the entry that was taken from a file, and the scale.
    """
    if not isinstance(sources, list) or not sources:
        raise UserError("meta.sources is missing; it must list the ported files")
    parts = []
    for number, source in enumerate(sources):
        try:
            hashes = [file["sha256"] for file in source["files"]]
            taken = [source[key] for key in ("item", "key", "alpha")]
            taken += source.get("factors") or []
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"meta.sources, entry {number}: {reason(error)}") from error
        for one in hashes:
            if not isinstance(one, str) or not _DIGEST.fullmatch(one):
                raise UserError(f"meta.sources: {shown(one)} is not a SHA-256")
        parts.append([*taken, sorted(hashes)])
    ordered = sorted(json.dumps(part) for part in parts)
    return hashlib.sha256("\n".join(ordered).encode()).hexdigest()


def _check_ported(ported: _Ported) -> None:
    """Raises UserError unless the sizes are valid and fit together."""
    model, text, vae = ported.model, ported.text, ported.vae
    for name in ("model", "text", "vae"):
        check_sizes(f"meta.{name}", getattr(ported, name))
    for name, value, wanted in (
        ("text.dim", text.dim, model.text_dim),
        ("text.text_len", text.text_len, model.text_len),
        ("vae.z_dim", vae.z_dim, model.latent_channels),
    ):
        if value != wanted:
            raise UserError(f"meta.{name}={value}, but the model has {wanted}")


def _check_strides(ported: _Ported) -> None:
    """Raises UserError unless the VAE has the strides of the stated family."""
    family, strides = ported.model.family, ported.vae.strides
    if strides != family.strides:
        raise UserError(
            f"meta.vae has strides {strides}, expected {family.strides} of the family"
            f" {family.name}"
        )


def _expected_ported(folder: pathlib.Path, ported: _Ported) -> dict[str, Any]:
    """Returns the shapes of every item by name."""
    stored = checkpoint.shapes(folder, "generator")
    with damaged_weights(folder):
        text, codec = shapes.of(ported.text), shapes.of(ported.vae)
        generator = {"params": shapes.of(ported.model)}
        if "lora" in stored:
            generator["lora"] = expected_lora(generator["params"], stored["lora"])
    return {"generator": generator, "text_encoder": text, "vae": codec}


def _load_network(folder: pathlib.Path, item: str, expected, options: LoadOptions):
    """Returns a network's collections, with low-rank updates as requested."""
    expected = expected[item]
    places, dtype = None, options.param_dtype or options.dtype or "bfloat16"
    if options.mesh is not None:
        tables = {"params": sharding.GENERATOR, "lora": sharding.LORA}
        places = {
            name: sharding.shardings(tree, tables[name], options.mesh)
            for name, tree in expected.items()
        }
    # Merged before rounding if the stored type is wider.
    merges = options.lora == "merged" and "lora" in expected
    kept = None if merges else {"params": dtype}
    variables = checkpoint.restore(folder, item, kept, places)
    if merges:
        return {
            "params": merge_lora(variables.pop("params"), variables.pop("lora"), dtype)
        }
    if options.lora == "none":
        variables.pop("lora", None)
    return variables


def _ported_tokenizer(folder: pathlib.Path, text: TextConfig) -> Tokenizer:
    """Returns the ported tokenizer, checked against the text encoder's vocabulary."""
    names = ("tokenizer.json", "spiece.model")
    place = folder / "tokenizer"
    found = [name for name in names if places.exists(place / name)]
    for name in found:
        checkpoint.file(folder, f"tokenizer/{name}")
    try:
        with io.local_copies(place, found) as copies:
            tokenizer = load_tokenizer(copies, text.text_len)
    # The package `tokenizers` raises plain exceptions for unreadable files.
    except Exception as error:
        raise UserError(
            f"{place} holds no usable tokenizer: {error}; port the weights again"
        ) from error
    check_vocab(place, tokenizer, text)
    return tokenizer
