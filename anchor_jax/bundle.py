"""A bundle: the weights of generator, text encoder and codec, and the tokenizer."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from anchor_jax.config import from_config
from anchor_jax.errors import UserError, suggest
from anchor_jax.media import replacing
from anchor_jax.wan import dit
from anchor_jax.wan.spec import TINY, LatentGrid, ModelConfig
from anchor_jax.wan.text import TextConfig, Umt5Encoder
from anchor_jax.wan.tokenizer import SentencePieceTokenizer, Tokenizer
from anchor_jax.world.codec import BLOCK_VALUES, LinearCodec

FORMAT_VERSION = 1
TINY_TEXT = TextConfig(
    vocab=64,
    dim=64,
    attention_dim=64,
    ffn_dim=128,
    num_heads=4,
    num_layers=2,
    text_len=16,
    dtype="float32",
)
TINY_GRID = LatentGrid(8, 8)

_HEADER = "anchor_jax"
_CODECS = {"linear": LinearCodec()}
_DTYPES = ("float32", "bfloat16", "float16")
_LARGEST = {
    "height": 4096,
    "width": 4096,
    "text_len": 65536,
    "num_layers": 512,
    "num_heads": 1024,
    "unroll": 512,
}
_LARGEST_OTHER = 2**20
_SHOWN = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """All that a stream takes from files.

    Attributes:
      model: sizes of the generator.
      text: sizes of the text encoder.
      codec: the codec as a streaming decoder; hashable.
      grid: latent size of the videos.
      tokenizer: for the text encoder.
      variables: the generator's collections.
      text_params: the text encoder's parameters.
      codec_params: the codec's parameters.
      metadata: what was stored with the weights, such as how they were trained.
      digest: SHA-256 of the weights' file.
    """

    model: ModelConfig
    text: TextConfig
    codec: LinearCodec
    grid: LatentGrid
    tokenizer: Tokenizer
    variables: Mapping[str, Any]
    text_params: Mapping[str, Any]
    codec_params: Mapping[str, jax.Array]
    metadata: Mapping[str, Any]
    digest: str

    def encode_prompts(self, texts: Sequence[str]) -> jax.Array:
        """Returns conditioning [batch, text, dim]; rows past a prompt's end are zero.

        Compiles once per batch size.
        """
        ids, mask = self.tokenizer.encode(texts)
        return _encode(self.text_params, ids, mask, config=self.text)


@dataclasses.dataclass(frozen=True)
class _Header:
    """What the weights' file says about itself."""

    format_version: int
    model: ModelConfig
    text: TextConfig
    grid: LatentGrid
    codec: str
    tokenizer: str
    metadata: Mapping[str, Any]


@functools.partial(jax.jit, static_argnames="config")
def _encode(params, ids, mask, *, config: TextConfig) -> jax.Array:
    return Umt5Encoder(config).apply({"params": params}, ids, mask)


def load_bundle(weights: str) -> Bundle:
    """Returns the bundle named `tiny`, or the one that `save_bundle` wrote to a path.

    Raises:
      UserError: A file is missing or broken, or its tensors are not those of the
        sizes that it states.
    """
    model_file, tokenizer_file = _files(weights)
    content = _read(model_file, weights)
    pieces = _read(tokenizer_file, weights)
    header = _header(model_file)
    if header.tokenizer != _digest(pieces):
        raise UserError(
            f"{tokenizer_file} is not the tokenizer that {model_file} was saved with;"
            " take both files from the same place"
        )
    codec = _CODECS[header.codec]
    tokenizer = _tokenizer(tokenizer_file, pieces, header.text)
    with _blaming(model_file):
        stored = safetensors.numpy.load(content)
        expected = _expected(header.model, header.text, codec)
    _check_tensors(model_file, stored, expected)
    params = _nest(
        {name: jnp.asarray(stored[name], expected[name].dtype) for name in expected}
    )
    return Bundle(
        model=header.model,
        text=header.text,
        grid=header.grid,
        codec=codec,
        tokenizer=tokenizer,
        variables={"params": params["generator"]},
        text_params=params["text"],
        codec_params=params["codec"],
        metadata=header.metadata,
        digest=_digest(content),
    )


def save_bundle(
    params: Mapping[str, Any],
    tokenizer: bytes,
    path: str | pathlib.Path,
    metadata: Mapping[str, Any],
    *,
    model: ModelConfig = TINY,
    text: TextConfig = TINY_TEXT,
    grid: LatentGrid = TINY_GRID,
) -> None:
    """Writes a bundle as float16; each file appears under its name when whole.

    Args:
      params: `generator`, `text` and `codec`, nested dicts of arrays.
      tokenizer: a SentencePiece model.
      path: `NAME.safetensors`, beside which `NAME.model` is written, or a folder that
        gets `model.safetensors` and `tokenizer.model`.
      metadata: stored as JSON: how the weights were trained, sampler defaults.
      model: sizes of the generator.
      text: sizes of the text encoder.
      grid: latent size of the videos.

    Raises:
      UserError: The tensors are not those of the sizes, one of them overflows, or the
        files cannot be written.
    """
    model_file, tokenizer_file = _files_in(pathlib.Path(path))
    header = {
        "format_version": FORMAT_VERSION,
        "model": dataclasses.asdict(model),
        "text": dataclasses.asdict(text),
        "grid": dataclasses.asdict(grid),
        "codec": "linear",
        "tokenizer": _digest(tokenizer),
        "metadata": dict(metadata),
    }
    flat = _flatten(params)
    _check_tensors(model_file, flat, _expected(model, text, _CODECS["linear"]))
    halves = {name: _half(name, value) for name, value in sorted(flat.items())}
    content = safetensors.numpy.save(halves, {_HEADER: json.dumps(header)})
    with replacing(tokenizer_file) as part:
        part.write_bytes(tokenizer)
    with replacing(model_file) as part:
        part.write_bytes(content)


def _files(weights: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the files of a bundle's name or path."""
    if weights == "tiny":
        assets = pathlib.Path(str(importlib.resources.files("anchor_jax"))) / "assets"
        return _files_in(assets / "tiny.safetensors")
    return _files_in(pathlib.Path(weights).expanduser())


def _files_in(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    if path.suffix == ".safetensors":
        return path, path.with_suffix(".model")
    return path / "model.safetensors", path / "tokenizer.model"


def _read(path: pathlib.Path, weights: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"weights={weights!r}: {path} cannot be read ({error.strerror}); expected"
            " 'tiny', or a folder with model.safetensors and tokenizer.model, as"
            " anchor-jax train-tiny writes it"
        ) from error


def _header(path: pathlib.Path) -> _Header:
    """Returns the sizes and metadata in the file's header."""
    try:
        with safetensors.safe_open(path, "np") as opened:
            stored = opened.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); copy it again"
        ) from error
    if _HEADER not in stored:
        raise UserError(
            f"{path} has no {_HEADER!r} in its header, so it is no bundle; write it"
            " with anchor_jax.bundle.save_bundle"
        )
    with _blaming(path):
        header = json.loads(stored[_HEADER])
        if not isinstance(header, dict):
            raise UserError(f"got {type(header).__name__}, expected an object")
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}, expected {FORMAT_VERSION}; use the"
            " version of anchor_jax that wrote it, or save it again"
        )
    with _blaming(path):
        read = from_config(_Header, header, "header")
        _check_header(read)
    return read


@contextlib.contextmanager
def _blaming(path: pathlib.Path) -> Iterator[None]:
    """Turns what is wrong with a file into one message that names it."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
        safetensors.SafetensorError,
    ) as error:
        raise UserError(
            f"{path} is no bundle that can be used: {error}; copy it again, or save it"
            " with anchor_jax.bundle.save_bundle"
        ) from error


def _check_header(header: _Header) -> None:
    """Raises unless the sizes are ones that networks can have, and fit together."""
    if header.codec not in _CODECS:
        known = suggest(header.codec, _CODECS, "codecs")
        raise UserError(f"unknown codec {header.codec!r}{known}")
    for name in ("model", "text", "grid"):
        for field, value in dataclasses.asdict(getattr(header, name)).items():
            _check_size(f"{name}.{field}", field, value)
    model, text = header.model, header.text
    if text.dim != model.text_dim:
        raise UserError(f"text.dim={text.dim}, expected {model.text_dim} as the model")
    header.grid.tokens(model.patch)


def _check_size(name: str, field: str, value: Any) -> None:
    if field in ("dtype", "param_dtype") and value not in _DTYPES:
        raise UserError(f"{name}={value!r}{suggest(value, _DTYPES, 'types')}")
    if isinstance(value, float) and not 0 < value < float("inf"):
        raise UserError(f"{name}={value}: expected more than 0")
    largest = _LARGEST.get(field, _LARGEST_OTHER)
    if type(value) is int and not 1 <= value <= largest:
        raise UserError(f"{name}={value}: expected from 1 to {largest}")
    if field != "patch":
        return
    right = all(type(one) is int and 1 <= one <= 64 for one in value)
    if len(value) != 3 or not right:
        raise UserError(f"{name}={value}: expected three whole numbers from 1 to 64")


def _tokenizer(path: pathlib.Path, pieces: bytes, text: TextConfig):
    """Returns the tokenizer, whose ids the text encoder all knows."""
    try:
        tokenizer = SentencePieceTokenizer(pieces, text.text_len)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no tokenizer that can be used: {error}; expected a"
            " SentencePiece model; copy it again"
        ) from error
    if tokenizer.vocab > text.vocab:
        raise UserError(
            f"{path} has {tokenizer.vocab} pieces, expected at most the"
            f" {text.vocab} of the text encoder; take both files from the same place"
        )
    return tokenizer


def _expected(model: ModelConfig, text: TextConfig, codec) -> dict[str, Any]:
    """Returns shape and type of every tensor, by name, without making any."""
    key = jax.random.key(0)
    ids = jax.ShapeDtypeStruct((1, text.text_len), jnp.int32)
    encoder = jax.eval_shape(Umt5Encoder(text).init, key, ids, ids)
    return _flatten(
        {
            "generator": jax.eval_shape(functools.partial(dit.init_params, model), key),
            "text": encoder["params"],
            "codec": _codec_shapes(codec, model.latent_channels),
        }
    )


def _codec_shapes(codec: LinearCodec, channels: int) -> dict[str, Any]:
    del codec
    shapes = {
        "mean": (BLOCK_VALUES,),
        "encode": (BLOCK_VALUES, channels),
        "decode": (channels, BLOCK_VALUES),
    }
    return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}


def _check_tensors(path, stored: Mapping[str, Any], expected: Mapping[str, Any]):
    """Raises unless there is every tensor, of its shape, and no other."""
    wrong = [f"missing {name}" for name in expected if name not in stored]
    wrong += [f"unexpected {name}" for name in stored if name not in expected]
    wrong += [
        f"{name} is {tuple(stored[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in stored and stored[name].shape != expected[name].shape
    ]
    if wrong:
        more = len(wrong) - _SHOWN
        shown = wrong[:_SHOWN] + [f"and {more} more"] * (more > 0)
        raise UserError(
            f"{path}: the tensors are not those of its sizes: {'; '.join(shown)}; save"
            " the weights together with the sizes that they have"
        )


def _half(name: str, value) -> np.ndarray:
    with np.errstate(over="ignore"):
        # The format takes a buffer as it lies: a transposed view would be garbled.
        half = np.ascontiguousarray(np.asarray(value), np.float16)
    if not np.isfinite(half).all():
        raise UserError(f"{name} does not fit into float16; its training diverged")
    return half


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by their path, joined by slashes."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{path}/")
        else:
            flat[path] = value
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, last = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
