"""A bundle in one safetensors file with a tokenizer file beside it."""

import dataclasses
import errno
import hashlib
import importlib.resources
import json
import os
import pathlib
import stat
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Mesh

from anchor_jax import io, places, sharding, trees
from anchor_jax.config import from_config
from anchor_jax.errors import UserError, shown, suggest
from anchor_jax.filetypes import check_start
from anchor_jax.io import parse_json, replacing
from anchor_jax.limits import check_sizes
from anchor_jax.wan.spec import TINY, LatentGrid, ModelConfig
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.tokenizer import SentencePieceTokenizer
from anchor_jax.weights.bundle import Bundle
from anchor_jax.weights.codecs import CODECS, STORED
from anchor_jax.weights.options import LoadOptions
from anchor_jax.weights.tensors import (
    check_tensors,
    check_vocab,
    damaged_weights,
    expected_tensors,
)

FORMAT_VERSION = 1
TINY_TEXT = TextConfig(
    vocab=64,
    dim=TINY.text_dim,
    attention_dim=64,
    ffn_dim=128,
    num_heads=4,
    num_layers=2,
    text_len=TINY.text_len,
    dtype="float32",
)
TINY_GRID = LatentGrid(8, 8)

_HEADER = "anchor_jax"


@dataclasses.dataclass(frozen=True)
class _Header:
    """The header of the weights' file."""

    format_version: int
    model: ModelConfig
    text: TextConfig
    grid: LatentGrid
    codec: str
    tokenizer: str
    metadata: Mapping[str, Any]


def load_saved(weights: str, options: LoadOptions) -> Bundle:
    """Returns the bundle in a safetensors file."""
    model_file, tokenizer_file = _files(weights)
    names = model_file.name, tokenizer_file.name
    with io.local_copies(model_file.parent, names) as folder:
        content, pieces = (_read(folder / name, weights) for name in names)
        header = _header(folder / model_file.name)
    if header.tokenizer != hashlib.sha256(pieces).hexdigest():
        raise UserError(
            f"{tokenizer_file} is not the tokenizer of {model_file}; use two files that"
            " were saved together"
        )
    codec = CODECS[header.codec]
    tokenizer = _tokenizer(tokenizer_file, pieces, header.text)
    model = options.with_param_dtype(options.typed(header.model))
    text = options.typed(header.text)
    with damaged_weights(model_file):
        stored = safetensors.numpy.load(content)
        expected = expected_tensors(model, text, codec)
    check_tensors(model_file, stored, expected)

    def load(part: str, placements, mesh: Mesh | None):
        names = [name for name in expected if name.startswith(f"{part}/")]
        leaves = {
            name: jnp.asarray(stored[name], expected[name].dtype) for name in names
        }
        params = trees.unflatten(leaves)[part]
        if mesh is None:
            return params
        return jax.device_put(params, sharding.shardings(params, placements, mesh))

    def load_text():
        return load("text", sharding.TEXT, options.text_mesh)

    return Bundle(
        model=model,
        text=text,
        grid=options.fitting_grid(model, header.grid),
        codec=codec,
        tokenizer=tokenizer,
        encode_prompts=options.encoder(text, tokenizer, load_text),
        load_variables=lambda: {
            "params": load("generator", sharding.GENERATOR, options.mesh)
        },
        load_codec=lambda: load("codec", sharding.CODEC, options.mesh),
        metadata=header.metadata,
        digest=hashlib.sha256(content).hexdigest(),
        trained_grid=header.grid,
    )


def save_bundle(
    params: Mapping[str, Any],
    tokenizer: bytes,
    path: str | io.Place,
    metadata: Mapping[str, Any],
    *,
    model: ModelConfig = TINY,
    text: TextConfig = TINY_TEXT,
    grid: LatentGrid = TINY_GRID,
) -> None:
    """Writes a bundle as float16; each file appears under its name when complete.

    Args:
      params: `generator`, `text` and `codec`, nested dicts of arrays.
      tokenizer: a SentencePiece model.
      path: `NAME.safetensors`, with `NAME.model` beside it, or a folder for
        `model.safetensors` and `tokenizer.model`.
      metadata: values stored as JSON: settings of the training, sampler defaults.
      model: sizes of the generator.
      text: sizes of the text encoder.
      grid: latent size of the videos.

    Raises:
      UserError: The tensors do not fit the sizes, a value overflows, or the files
        cannot be written.
    """
    model_file, tokenizer_file = _files_in(places.given(path))
    header = {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(model),
        "text": dataclasses.asdict(text),
        "grid": dataclasses.asdict(grid),
        "codec": STORED,
        "tokenizer": hashlib.sha256(tokenizer).hexdigest(),
        "metadata": dict(metadata),
    }
    flat = trees.flatten(params)
    check_tensors(model_file, flat, expected_tensors(model, text, CODECS[STORED]))
    halves = {name: _half(name, value) for name, value in sorted(flat.items())}
    content = safetensors.numpy.save(halves, {_HEADER: json.dumps(header)})
    with replacing(tokenizer_file) as part:
        part.write_bytes(tokenizer)
    with replacing(model_file) as part:
        part.write_bytes(content)


def save_loaded(bundle: Bundle, path: str | pathlib.Path) -> None:
    """Writes a loaded bundle, such as that of a training, with `save_bundle`.

    Args:
      bundle: bundle with the linear codec. Low-rank updates are merged.
      path: as for `save_bundle`.

    Raises:
      UserError: The bundle's kind does not have this layout.
    """
    if not bundle.codec == CODECS[STORED]:
        raise UserError(
            "layout=bundle supports only models with the linear codec, such as the tiny"
            f" model; got {type(bundle.codec).__name__}: choose layout wan or diffusers"
        )
    params = {
        "generator": bundle.variables["params"],
        "text": bundle.encode_prompts.params,
        "codec": bundle.codec_params,
    }
    sizes = {"model": bundle.model, "text": bundle.text, "grid": bundle.grid}
    metadata = _without_places(bundle.metadata)
    save_bundle(params, bundle.tokenizer.content, path, metadata, **sizes)


def _without_places(value: Any) -> Any:
    """Returns metadata for publication, with only the last part of paths."""
    if isinstance(value, Mapping):
        return {name: _without_places(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(one) for one in value]
    is_path = isinstance(value, str) and "/" in value and " " not in value
    return pathlib.PurePath(value).name if is_path else value


def _files(weights: str) -> tuple[io.Place, io.Place]:
    """Returns the files of a bundle by name or path."""
    if weights == "tiny":
        assets = pathlib.Path(str(importlib.resources.files("anchor_jax"))) / "assets"
        return _files_in(assets / "tiny.safetensors")
    return _files_in(io.place(weights))


def _files_in(path: io.Place) -> tuple[io.Place, io.Place]:
    if path.suffix == ".safetensors":
        return path, path.with_suffix(".model")
    return path / "model.safetensors", path / "tokenizer.model"


def _read(path: pathlib.Path, weights: str) -> bytes:
    name = shown(weights, 200)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        check_start(path)
        return path.read_bytes()
    except OSError as error:
        if not places.exists(io.place(weights)):
            raise UserError(
                f"weights={name}: no such folder; run the stage that writes it, or give"
                " a folder of a training, of anchor-jax port or of anchor-jax export,"
                " or 'tiny'"
            ) from error
        if not os.path.exists(path) and any(path.parent.iterdir()):
            raise UserError(
                f"weights={name} holds neither {path.name} nor a checkpoint; published"
                " weights must be ported first: anchor-jax port --help"
            ) from error
        raise UserError(
            f"weights={name}: {path} cannot be read ({error.strerror}); give"
            " 'tiny', the folder of a training, one that anchor-jax port wrote, or a"
            " bundle of anchor-jax export with model.safetensors and tokenizer.model"
        ) from error


def _header(path: pathlib.Path) -> _Header:
    """Returns the sizes and metadata in the file's header."""
    try:
        with safetensors.safe_open(path, "np") as opened:
            stored = opened.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path} is not a complete safetensors file ({error}); copy it again"
        ) from error
    if _HEADER not in stored:
        raise UserError(
            f"{path} has no {_HEADER!r} in its header, so it is not a bundle; write it"
            " with anchor_jax.bundle.save_bundle"
        )
    with damaged_weights(path):
        header = parse_json(stored[_HEADER], "its header")
    version = header.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {shown(version)}, expected {FORMAT_VERSION};"
            " use the version of anchor_jax that wrote it, or save it again"
        )
    with damaged_weights(path):
        read = from_config(_Header, header, "header")
        _check_header(read)
    return read


def _check_header(header: _Header) -> None:
    """Raises an error unless the sizes are valid for the networks and fit together."""
    if header.codec not in CODECS:
        known = suggest(header.codec, CODECS, "codecs")
        raise UserError(f"unknown codec {shown(header.codec)}{known}")
    for name in ("model", "text", "grid"):
        check_sizes(name, getattr(header, name))
    model, text = header.model, header.text
    if text.dim != model.text_dim:
        raise UserError(f"text.dim={text.dim}, but the model has {model.text_dim}")
    header.grid.tokens(model.patch)


def _tokenizer(path: pathlib.Path, pieces: bytes, text: TextConfig):
    """Returns the tokenizer, checked against the text encoder's vocabulary."""
    try:
        tokenizer = SentencePieceTokenizer(pieces, text.text_len)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a usable tokenizer: {error}; it must be a"
            " SentencePiece model; copy it again"
        ) from error
    check_vocab(path, tokenizer, text)
    return tokenizer


def _half(name: str, value) -> np.ndarray:
    with np.errstate(over="ignore"):
        # The format writes a buffer in memory order: a transposed view would be wrong.
        half = np.ascontiguousarray(np.asarray(value), np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"{name} does not fit into float16; its training diverged")
    return half
