"""A bundle: the weights of generator, text encoder and codec, and the tokenizer."""

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib.resources
import json
import os
import pathlib
import re
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from anchor_jax import finite, sharding
from anchor_jax.config import from_config
from anchor_jax.errors import UserError, damaged, reason, shown, some, suggest
from anchor_jax.filetypes import check_start
from anchor_jax.io import expand, parse_json, read_json, replacing, write_json
from anchor_jax.limits import DTYPES, check_sizes
from anchor_jax.wan import dit, lora
from anchor_jax.wan.spec import TINY, LatentGrid, ModelConfig
from anchor_jax.wan.text import TextConfig, Umt5Encoder
from anchor_jax.wan.tokenizer import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from anchor_jax.wan.vae import VaeCodec, VaeConfig, WanVae
from anchor_jax.world.codec import BLOCK_VALUES, LinearCodec

FORMAT_VERSION = 1
CRITIC = "critic"
"""Of a training's checkpoint: where `meta` has the sizes of its critic."""
RUN = "run.json"
"""File that marks the folder of a training."""
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
TEXT_ENCODERS = ("device", "free", "sharded")
ADAPTERS = ("separate", "merged", "none")
NETWORKS = ("generator", "critic")

_HEADER = "anchor_jax"
_CODECS = {"linear": LinearCodec()}
_REMEMBERED = 8 * 2**30  # bytes of trimmed prompts
_DIGEST = re.compile(r"[0-9a-f]{64}")
_damaged = functools.partial(
    damaged,
    remedy="copy it again, or write it again as it was written",
    fault="is no bundle that can be used",
    wraps=True,
)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptEncoder:
    """Prompts to conditioning, with the text encoder's weights where there is room.

    Attributes:
      config: sizes of the text encoder.
      tokenizer: makes its ids.
      load: returns its parameters.
      frees: whether the parameters leave the device after each use. Embeddings of the
        last prompts are then remembered on the host, up to 8 GiB, and a prompt is
        encoded by itself, so that one program serves all calls.
      place: where results are put; None: where they are made.
    """

    config: TextConfig
    tokenizer: Tokenizer
    load: Callable[[], Mapping[str, Any]]
    frees: bool = False
    place: jax.sharding.Sharding | None = None
    _known: collections.OrderedDict[str, np.ndarray] = dataclasses.field(
        default_factory=collections.OrderedDict
    )
    _turn: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @functools.cached_property
    def params(self) -> Mapping[str, Any]:
        """The parameters, which stay where they are once they are loaded."""
        return self.load()

    def __call__(self, texts: Sequence[str]) -> jax.Array:
        """Returns conditioning [batch, text, dim]; rows past a prompt's end are zero.

        Unless parameters are freed, compiles once per batch size.

        Raises:
          UserError: The texts are one text, whose letters would be taken as prompts.
        """
        if isinstance(texts, str):
            raise UserError(f"texts is one text, {shown(texts)}; give a list of them")
        if self.frees:
            with self._turn:
                encoded = jnp.asarray(self._remembered(texts))
        else:
            encoded = self._encode(self.params, texts)
        return encoded if self.place is None else jax.device_put(encoded, self.place)

    def encode_ids(self, ids, mask) -> jax.Array:
        """Returns conditioning of token ids [batch, text]; the parameters stay."""
        return self._run(self.params, ids, mask)

    def _encode(self, params, texts: Sequence[str]) -> jax.Array:
        return self._run(params, *self.tokenizer.encode(texts))

    def _run(self, params, ids, mask) -> jax.Array:
        # A generator's mesh may be set; the encoder need not be on it.
        with sharding.no_mesh():
            return _encode(params, ids, mask, config=self.config)

    def prepare(self, texts: Sequence[str]) -> None:
        """Loads the parameters; if they are freed, encodes the texts first.

        The texts are remembered as far as there is room for them.
        """
        if not self.frees:
            jax.block_until_ready(self.params)
            return
        with self._turn:
            self._encode_new(texts)

    def _encode_new(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the trimmed embeddings of texts, and remembers the last of them."""
        found = {text: self._known[text] for text in texts if text in self._known}
        fresh = [text for text in dict.fromkeys(texts) if text not in found]
        if fresh:
            params = self.load()
            for text in fresh:
                found[text] = _trim(np.asarray(self._encode(params, [text]))[0])
        for text in found:
            self._known[text] = found[text]
            self._known.move_to_end(text)
        size = sum(rows.nbytes for rows in self._known.values())
        while size > _REMEMBERED:
            size -= self._known.popitem(last=False)[1].nbytes
        return found

    def _remembered(self, texts: Sequence[str]) -> np.ndarray:
        found = self._encode_new(texts)
        shape = (len(texts), self.config.text_len, self.config.dim)
        whole = np.zeros(shape, np.dtype(jnp.dtype(self.config.dtype)))
        for row, text in zip(whole, texts, strict=True):
            row[: len(found[text])] = found[text]
        return whole


def _trim(encoded: np.ndarray) -> np.ndarray:
    """Returns a prompt's rows [text, dim] without the zeros at their end."""
    used = np.flatnonzero(encoded.any(axis=-1))
    return encoded[: used[-1] + 1 if used.size else 0].copy()


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """All that a stream takes from files.

    Attributes:
      model: sizes of the generator.
      text: sizes of the text encoder.
      codec: the codec as a streaming decoder; hashable.
      grid: latent size of the videos.
      tokenizer: for the text encoder.
      encode_prompts: makes conditioning [batch, text, dim] of a sequence of prompts.
      load_variables: returns the generator's collections.
      load_codec: returns the codec's parameters.
      metadata: what was stored with the weights, such as how they were trained.
      digest: SHA-256 of the weights' file, or over those that were ported.
    """

    model: ModelConfig
    text: TextConfig
    codec: LinearCodec | VaeCodec
    grid: LatentGrid
    tokenizer: Tokenizer
    encode_prompts: PromptEncoder
    load_variables: Callable[[], Mapping[str, Any]]
    load_codec: Callable[[], Mapping[str, Any]]
    metadata: Mapping[str, Any]
    digest: str

    # Loaded at their first use, so that prompts can be encoded before they take room.
    @functools.cached_property
    def variables(self) -> Mapping[str, Any]:
        """The generator's collections: `params` and perhaps `lora`."""
        return self.load_variables()

    @functools.cached_property
    def codec_params(self) -> Mapping[str, Any]:
        """The codec's parameters."""
        return self.load_codec()


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


@dataclasses.dataclass(frozen=True)
class _Options:
    """How `load_bundle` was asked to load."""

    grid: LatentGrid | None
    dtype: str | None
    text_encoder: str
    mesh: Mesh | None
    lora: str
    param_dtype: str | None
    network: str

    def __post_init__(self):
        for name, known in (
            ("text_encoder", TEXT_ENCODERS),
            ("lora", ADAPTERS),
            ("network", NETWORKS),
        ):
            value = getattr(self, name)
            if value not in known:
                found = suggest(str(value), known, name)
                raise UserError(f"{name}={shown(value)}{found}")
        for name in ("dtype", "param_dtype"):
            value = getattr(self, name)
            if value is not None and value not in DTYPES:
                found = suggest(str(value), DTYPES, "types")
                raise UserError(f"{name}={shown(value)}{found}")

    @property
    def text_mesh(self) -> Mesh | None:
        """The mesh that the text encoder is split over; None: it is not split."""
        if self.text_encoder != "sharded":
            return None
        return self.mesh or sharding.make_mesh()

    def item(self, present: Sequence[str]) -> str:
        """Returns the item of a checkpoint that holds the asked-for network."""
        is_critic = self.network == "critic" and "fake_score" in present
        return "fake_score" if is_critic else "generator"

    def encoder(self, text: TextConfig, tokenizer: Tokenizer, load) -> PromptEncoder:
        """Returns the encoder whose parameters `load` puts onto `text_mesh`."""
        place = None
        if self.mesh is not None:
            place = NamedSharding(self.mesh, PartitionSpec())
        elif self.text_encoder == "sharded":
            place = SingleDeviceSharding(jax.local_devices()[0])
        return PromptEncoder(text, tokenizer, load, self.text_encoder == "free", place)

    def typed(self, config):
        """Returns a network's config with the asked-for type of numbers."""
        if self.dtype is None:
            return config
        return dataclasses.replace(config, dtype=self.dtype, param_dtype=self.dtype)

    def mastered(self, model: ModelConfig) -> ModelConfig:
        """Returns the generator's config with the asked-for type of its weights."""
        if self.param_dtype is None:
            return model
        return dataclasses.replace(model, param_dtype=self.param_dtype)

    def fitting_grid(self, model: ModelConfig, default: LatentGrid) -> LatentGrid:
        """Returns the latent size of the videos.

        Raises:
          UserError: The patch does not divide it.
        """
        grid = self.grid or default
        try:
            grid.tokens(model.patch)
        except ValueError as error:
            raise UserError(f"grid: {error}") from error
        return grid


def load_bundle(
    weights: str,
    *,
    grid: LatentGrid | None = None,
    dtype: str | None = None,
    text_encoder: str = "device",
    mesh: Mesh | None = None,
    lora: str = "separate",
    param_dtype: str | None = None,
    network: str = "generator",
) -> Bundle:
    """Returns the bundle named `tiny`, a saved one, or one of ported weights.

    Args:
      weights: `tiny`, the path that `save_bundle` wrote to, the folder of a
        checkpoint with ported weights, or that of a training; of a training,
        `FOLDER/400` takes the checkpoint of step 400, not the last one.
      grid: latent size of the videos; None: as stored, and 60 x 104 for ported ones.
      dtype: of weights and activations; None: as stored, and bfloat16 for ported ones.
      text_encoder: "device" keeps it on the device, "free" only while there are new
        prompts, and "sharded" splits it over all devices.
      mesh: splits the generator; None: all is on the default device.
      lora: "separate" keeps low-rank updates beside the weights they change, "merged"
        adds them, "none" leaves them out.
      param_dtype: of the generator's weights, where it is not that of activations.
      network: "generator", or "critic" for the one that was distilled or ported with
        it, in the generator's place; where there is none it is the generator.

    Raises:
      UserError: A file is missing or broken, or its tensors are not those of the
        sizes that it states; or an argument is none of its choices.
    """
    options = _Options(grid, dtype, text_encoder, mesh, lora, param_dtype, network)
    folder = expand(weights)
    if weights != "tiny" and run_folder(folder) is not None:
        return _watched(weights, _load_trained(folder, options))
    if weights != "tiny" and _is_checkpoint(folder):
        return _watched(weights, _load_ported(folder, options))
    return _watched(weights, _load_saved(weights, options))


def _watched(weights: str, bundle: Bundle) -> Bundle:
    """Returns the bundle such that loading weights that are not finite is refused."""

    def watched(network: str, load: Callable[[], Any]) -> Callable[[], Any]:
        def checked():
            tree = load()
            finite.check(tree, f"weights={weights!r}, {network}", _remedy(weights))
            return tree

        return checked

    encoder = bundle.encode_prompts
    return dataclasses.replace(
        bundle,
        encode_prompts=dataclasses.replace(
            encoder, load=watched("text encoder", encoder.load)
        ),
        load_variables=watched("generator", bundle.load_variables),
        load_codec=watched("codec", bundle.load_codec),
    )


def _remedy(weights: str) -> str:
    """Says what to do about weights that are not finite."""
    from anchor_jax import checkpoint

    run = run_folder(expand(weights))
    if run is None:
        return "take an undamaged copy; float16 cannot hold values above 65504"
    kept = ", ".join(str(run / str(step)) for step in checkpoint.steps(run))
    return (
        f"the training diverged; take a checkpoint before that: {kept or 'none kept'}"
    )


def write_run(folder: pathlib.Path, base: str) -> None:
    """Marks a folder as a training's.

    Args:
      folder: in which its checkpoints are.
      base: the weights that it began with, as for `load_bundle`; a name that begins
        with "./" is relative to the folder.
    """
    write_json(folder / RUN, {"format_version": FORMAT_VERSION, "base": base})


def run_folder(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the training that weights are of: its folder, or a step in it."""
    folder = folder.absolute()
    places = [folder, folder.parent] if folder.name.isdecimal() else [folder]
    return next((one for one in places if os.path.isfile(one / RUN)), None)


def run_base(folder: pathlib.Path) -> str:
    """Returns the name of the weights that a training began with.

    Raises:
      UserError: The folder does not say it, or leads back to itself.
    """
    _check_bases(folder)
    return _read_run(folder)


def _read_run(folder: pathlib.Path) -> str:
    path = folder / RUN
    remedy = "start its training once more: the same command writes the file again"
    try:
        run = read_json(path, remedy=remedy)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {remedy}") from error
    base, version = run.get("base"), run.get("format_version")
    is_known = type(version) is int and version == FORMAT_VERSION
    if not is_known or not isinstance(base, str) or not _is_path(base):
        raise UserError(
            f"{path}: format_version={shown(version)} and base={shown(base)}, expected"
            f" {FORMAT_VERSION} and the name of weights; {remedy}"
        )
    return str(folder / base) if base.startswith("./") else base


def _is_path(text: str) -> bool:
    """Returns whether a text can be a path: not empty, no zero, no half character."""
    with contextlib.suppress(UnicodeEncodeError):
        return bool(text.encode()) and "\0" not in text
    return False


def _check_bases(folder: pathlib.Path) -> None:
    """Raises if trainings that began with one another lead in a circle."""
    seen, run = [], run_folder(folder)
    while run is not None:
        run = run.resolve()
        if run in seen:
            raise UserError(f"{run / RUN} leads back to itself by its base")
        seen.append(run)
        run = run_folder(expand(_read_run(run)))


def _load_trained(folder: pathlib.Path, options: "_Options") -> Bundle:
    """Returns the bundle that a training began with, its own weights in place.

    Of the last checkpoint, or of the step that the folder is. The mean of the
    generator is taken where there is one.
    """
    from anchor_jax import checkpoint

    name = run_base(run_folder(folder))
    if not checkpoint.is_checkpoint(folder):
        raise UserError(_why_not(folder, name))
    present = checkpoint.items(folder)
    item = options.item(present)
    if item == "generator" and "ema" in present:
        item = "ema"
    stored = checkpoint.shapes(folder, item)
    if item == "fake_score" and "lora" in stored:
        raise UserError(
            f"{folder} holds updates of a critic, not the whole of it; begin with the"
            " weights that its own config.critic or config.teacher names, or go on with"
            " that training"
        )
    fields = (field.name for field in dataclasses.fields(options))
    given = {field: getattr(options, field) for field in fields}
    given["network"] = "generator"
    if "lora" in stored:
        # A training goes on with the updates that it finds: they hold these.
        given["lora"] = "none"
    base = load_bundle(name, **given)
    if item == "fake_score":
        base = dataclasses.replace(base, model=_critic_model(folder, base.model))
    base = _with_variables(folder, item, stored, base, options)
    if "text" not in stored:
        return base

    def load_text():
        return checkpoint.restore(folder, item, base.text.dtype)["text"]

    encoder = options.encoder(base.text, base.tokenizer, load_text)
    return dataclasses.replace(base, encode_prompts=encoder)


def _critic_model(folder: pathlib.Path, generator: ModelConfig) -> ModelConfig:
    """Returns the sizes of a distillation's critic, which may be those of a teacher."""
    from anchor_jax import checkpoint

    sizes = checkpoint.read_meta(folder).get(CRITIC, {})
    types = {name: getattr(generator, name) for name in ("dtype", "param_dtype")}
    with _damaged(folder):
        whole = dataclasses.asdict(generator) | dict(sizes) | types
        model = from_config(ModelConfig, whole, f"meta.{CRITIC}")
        check_sizes(f"meta.{CRITIC}", model)
    return model


def _why_not(folder: pathlib.Path, base: str) -> str:
    """Says why there are no weights of a training, or of a step of it."""
    from anchor_jax import checkpoint

    run = run_folder(folder)
    kept = ", ".join(map(str, checkpoint.steps(run)))
    if kept:
        return (
            f"{run} has no checkpoint of step {folder.name}, only of {kept}; trainings"
            " that begin with a step need it later too: keep more with config.keep"
        )
    return (
        f"{folder} is a training without a checkpoint yet; wait for its first, or use"
        f" the weights that it began with: {base}"
    )


def _with_variables(folder, item: str, stored, base: Bundle, options: "_Options"):
    """Returns the bundle with the collections of a training's checkpoint."""
    from anchor_jax import checkpoint

    init = functools.partial(dit.init_params, base.model)
    shapes = jax.eval_shape(init, jax.random.key(0))
    with _damaged(folder):
        expected = {"params": shapes}
        if "lora" in stored:
            expected = {"lora": _expected_lora(shapes, stored["lora"])}
        found = {name: tree for name, tree in stored.items() if name in expected}
        _check_tensors(folder / item, _flatten(found), _flatten(expected))
    dtype = base.model.param_dtype

    def load():
        if "lora" in expected and options.lora == "none":
            return base.load_variables()
        trained = checkpoint.restore(folder, item)
        trained = {name: trained[name] for name in expected}
        if "lora" not in trained:
            return jax.tree.map(lambda x: x.astype(dtype), trained)
        params = base.load_variables()["params"]
        if options.lora == "merged":
            return {"params": _merge(params, trained["lora"], dtype)}
        return {"params": params, **trained}

    meta = checkpoint.read_meta(folder)
    training = meta.get("training")
    step = checkpoint.last_step(folder)
    parts = [base.digest, step, training, *([item] if item == "fake_score" else [])]
    digest = json.dumps(parts, sort_keys=True)
    return dataclasses.replace(
        base,
        load_variables=load,
        metadata={**base.metadata, "training": training, "step": step},
        digest=_digest(digest.encode()),
    )


def _is_checkpoint(folder: pathlib.Path) -> bool:
    if not os.path.isdir(folder) or os.path.exists(folder / "model.safetensors"):
        return False
    from anchor_jax import checkpoint

    return checkpoint.is_checkpoint(folder)


def _load_saved(weights: str, options: _Options) -> Bundle:
    """Returns the bundle in a safetensors file."""
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
    model = options.mastered(options.typed(header.model))
    text = options.typed(header.text)
    with _damaged(model_file):
        stored = safetensors.numpy.load(content)
        expected = _expected(model, text, codec)
    _check_tensors(model_file, stored, expected)

    def load(part: str, rules, mesh: Mesh | None):
        names = [name for name in expected if name.startswith(f"{part}/")]
        leaves = {
            name: jnp.asarray(stored[name], expected[name].dtype) for name in names
        }
        params = _nest(leaves)[part]
        if mesh is None:
            return params
        return jax.device_put(params, sharding.shardings(params, rules, mesh))

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
        load_codec=lambda: load("codec", sharding.VAE, options.mesh),
        metadata=header.metadata,
        digest=_digest(content),
    )


@dataclasses.dataclass(frozen=True)
class _Ported:
    """What the item `meta` of ported weights says about them."""

    model: ModelConfig
    text: TextConfig
    vae: VaeConfig
    digest: str


def _load_ported(folder: pathlib.Path, options: _Options) -> Bundle:
    """Returns the bundle in a checkpoint."""
    from anchor_jax import checkpoint

    meta = checkpoint.read_meta(folder)
    _check_items(folder, checkpoint.items(folder))
    with _damaged(folder):
        ported = _read_ported(meta, options.dtype or "bfloat16")
        _check_ported(ported)
    model, text = options.mastered(ported.model), ported.text
    expected = _expected_ported(folder, ported)
    network = options.item(checkpoint.items(folder))
    if network == "fake_score":
        expected[network] = {"params": expected["generator"]["params"]}
    for item in expected:
        stored = _flatten(checkpoint.shapes(folder, item))
        with _damaged(folder):
            _check_tensors(item, stored, _flatten(expected[item]))
    tokenizer = _ported_tokenizer(folder, text)

    def load(item: str, rules, mesh: Mesh | None):
        places = None
        if mesh is not None:
            places = sharding.shardings(expected[item], rules, mesh)
        return checkpoint.restore(folder, item, text.dtype, places)

    return Bundle(
        model=model,
        text=text,
        grid=options.fitting_grid(model, LatentGrid()),
        codec=VaeCodec(ported.vae),
        tokenizer=tokenizer,
        encode_prompts=options.encoder(
            text,
            tokenizer,
            lambda: load("text_encoder", sharding.TEXT, options.text_mesh),
        ),
        load_variables=lambda: _load_network(folder, network, expected, options),
        load_codec=lambda: load("vae", sharding.VAE, options.mesh),
        metadata=meta,
        digest=ported.digest
        if network == "generator"
        else _digest(f"{network} {ported.digest}".encode()),
    )


def _check_items(folder: pathlib.Path, present: Sequence[str]) -> None:
    """Raises unless there is every network that a bundle needs."""
    for item in ("generator", "text_encoder", "vae"):
        if item not in present:
            raise UserError(
                f"{folder} has no {item}, it has {', '.join(present)}; port all parts"
                " at once into a new folder, with anchor-jax port --wan=FOLDER"
                " [--generator=FILE --lora=FILE --method=METHOD] --out=NEW; FOLDER is"
                " one of the published Wan2.1 files"
            )


def _read_ported(meta: Mapping[str, Any], dtype: str) -> _Ported:
    def read(kind, name: str):
        section = meta.get(name)
        if not isinstance(section, Mapping):
            raise UserError(
                f"meta.{name} is {shown(section)}, expected an object of sizes"
            )
        types = {"dtype": dtype, "param_dtype": dtype}
        whole = dataclasses.asdict(kind()) | dict(section) | types
        return from_config(kind, whole, f"meta.{name}")

    return _Ported(
        read(ModelConfig, "model"),
        read(TextConfig, "text"),
        read(VaeConfig, "vae"),
        _source_digest(meta.get("sources")),
    )


def _source_digest(sources: Any) -> str:
    """Returns SHA-256 over those of the files that were ported, whatever their names.

    What was taken from a file and how it was scaled are part of it.
    """
    if not isinstance(sources, list) or not sources:
        raise UserError("meta.sources is missing, expected the files that were ported")
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
                raise UserError(f"meta.sources: {shown(one)} is no SHA-256")
        parts.append([*taken, sorted(hashes)])
    ordered = sorted(json.dumps(part) for part in parts)
    return _digest("\n".join(ordered).encode())


def _check_ported(ported: _Ported) -> None:
    """Raises unless the sizes are ones that networks can have, and fit together."""
    model, text, vae = ported.model, ported.text, ported.vae
    for name in ("model", "text", "vae"):
        check_sizes(f"meta.{name}", getattr(ported, name))
    for name, value, wanted in (
        ("text.dim", text.dim, model.text_dim),
        ("text.text_len", text.text_len, model.text_len),
        ("vae.z_dim", vae.z_dim, model.latent_channels),
    ):
        if value != wanted:
            raise UserError(f"meta.{name}={value}, expected {wanted} as the model")


def _expected_ported(folder: pathlib.Path, ported: _Ported) -> dict[str, Any]:
    """Returns the shapes of every item, by its name."""
    from anchor_jax import checkpoint

    stored = checkpoint.shapes(folder, "generator")
    frame = 2 ** len(ported.vae.temporal_downsample)
    pixels = jax.ShapeDtypeStruct((1, 1, frame, frame, 3), jnp.float32)
    with _damaged(folder):
        tensors = _nest(_expected(ported.model, ported.text, None))
        init = WanVae(ported.vae).init
        codec = jax.eval_shape(init, jax.random.key(0), pixels)["params"]
        generator = {"params": tensors["generator"]}
        if "lora" in stored:
            generator["lora"] = _expected_lora(generator["params"], stored["lora"])
    return {"generator": generator, "text_encoder": tensors["text"], "vae": codec}


def _expected_lora(params, stored) -> dict[str, Any]:
    """Returns the shapes of updates of the stored rank, for layers that have one."""
    flat = traverse_util.flatten_dict(stored)
    ranks = {leaf.shape[-1] for path, leaf in flat.items() if path[-1] == "a"}
    if len(ranks) != 1:
        raise UserError(
            f"lora: the updates have the ranks {sorted(ranks)}, expected one"
        )
    init = functools.partial(lora.init, rank=ranks.pop(), rng=jax.random.key(0))
    every = traverse_util.flatten_dict(jax.eval_shape(init, params))
    changed = {path[:-1] for path in flat}
    return traverse_util.unflatten_dict(
        {path: leaf for path, leaf in every.items() if path[:-1] in changed}
    )


def _load_network(folder: pathlib.Path, item: str, expected, options: _Options):
    """Returns a network's collections, its low-rank updates as asked for."""
    from anchor_jax import checkpoint

    expected = expected[item]
    places, dtype = None, options.param_dtype or options.dtype or "bfloat16"
    if options.mesh is not None:
        tables = {"params": sharding.GENERATOR, "lora": sharding.LORA}
        places = {
            name: sharding.shardings(shapes, tables[name], options.mesh)
            for name, shapes in expected.items()
        }
    # Merged before they are rounded, where they are stored wider.
    merges = options.lora == "merged" and "lora" in expected
    kept = None if merges else {"params": dtype}
    variables = checkpoint.restore(folder, item, kept, places)
    if merges:
        return {"params": _merge(variables.pop("params"), variables.pop("lora"), dtype)}
    if options.lora == "none":
        variables.pop("lora", None)
    return variables


def _merge(params, adapters, dtype: str):
    """Returns the parameters plus their low-rank updates, a layer's kind at a time."""
    leaves, updates = map(traverse_util.flatten_dict, (params, adapters))
    del params, adapters
    for path in list(leaves):
        names = [(*path[:-1], name) for name in ("a", "b")]
        one = {path[-1]: leaves.pop(path)}
        if path[-1] == "kernel" and names[0] in updates:
            update = {name[-1]: updates.pop(name) for name in names}
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (one, update))
            one = lora.merge(*wide)
        leaves[path] = one[path[-1]].astype(dtype)
    return traverse_util.unflatten_dict(leaves)


def _ported_tokenizer(folder: pathlib.Path, text: TextConfig) -> Tokenizer:
    """Returns the tokenizer that was ported, whose ids the text encoder all knows."""
    from anchor_jax import checkpoint

    names = ("tokenizer.json", "spiece.model")
    found = [name for name in names if (folder / "tokenizer" / name).exists()]
    for name in found:
        checkpoint.file(folder, f"tokenizer/{name}")
    place = folder / "tokenizer"
    try:
        tokenizer = load_tokenizer(place, text.text_len)
    # The package `tokenizers` raises plain exceptions for files it cannot read.
    except Exception as error:
        raise UserError(
            f"{place} holds no tokenizer that can be used: {error}; port the weights"
            " again"
        ) from error
    _check_vocab(place, tokenizer, text)
    return tokenizer


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


def save_loaded(bundle: Bundle, path: str | pathlib.Path) -> None:
    """Writes what was loaded, for instance of a training, by `save_bundle`.

    Args:
      bundle: with the linear codec; low-rank updates are merged.
      path: as for `save_bundle`.

    Raises:
      UserError: The bundle is not of the kind that has this layout.
    """
    if not isinstance(bundle.codec, LinearCodec):
        raise UserError(
            "layout=bundle holds models with the linear codec only, such as the tiny"
            f" one; got {type(bundle.codec).__name__}: choose layout wan or diffusers"
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
    """Returns metadata in which paths are cut to their last part: it is given away."""
    if isinstance(value, Mapping):
        return {name: _without_places(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(one) for one in value]
    is_path = isinstance(value, str) and "/" in value and " " not in value
    return pathlib.PurePath(value).name if is_path else value


def _files(weights: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the files of a bundle's name or path."""
    if weights == "tiny":
        assets = pathlib.Path(str(importlib.resources.files("anchor_jax"))) / "assets"
        return _files_in(assets / "tiny.safetensors")
    return _files_in(expand(weights))


def _files_in(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    if path.suffix == ".safetensors":
        return path, path.with_suffix(".model")
    return path / "model.safetensors", path / "tokenizer.model"


def _read(path: pathlib.Path, weights: str) -> bytes:
    name = shown(weights, 200)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        check_start(path)
        return path.read_bytes()
    except OSError as error:
        if not os.path.exists(expand(weights)):
            raise UserError(
                f"weights={name}: there is no such folder; run the stage that"
                " writes it, or give the folder of a training, of anchor-jax port or of"
                " anchor-jax export, or 'tiny'"
            ) from error
        if not os.path.exists(path) and any(path.parent.iterdir()):
            raise UserError(
                f"weights={name} holds no {path.name}, nor a checkpoint; published"
                " weights are first ported: anchor-jax port --help"
            ) from error
        raise UserError(
            f"weights={name}: {path} cannot be read ({error.strerror}); expected"
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
            f"{path} is not a whole safetensors file ({error}); copy it again"
        ) from error
    if _HEADER not in stored:
        raise UserError(
            f"{path} has no {_HEADER!r} in its header, so it is no bundle; write it"
            " with anchor_jax.bundle.save_bundle"
        )
    with _damaged(path):
        header = parse_json(stored[_HEADER], "its header")
    version = header.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {shown(version)}, expected {FORMAT_VERSION};"
            " use the version of anchor_jax that wrote it, or save it again"
        )
    with _damaged(path):
        read = from_config(_Header, header, "header")
        _check_header(read)
    return read


def _check_header(header: _Header) -> None:
    """Raises unless the sizes are ones that networks can have, and fit together."""
    if header.codec not in _CODECS:
        known = suggest(header.codec, _CODECS, "codecs")
        raise UserError(f"unknown codec {shown(header.codec)}{known}")
    for name in ("model", "text", "grid"):
        check_sizes(name, getattr(header, name))
    model, text = header.model, header.text
    if text.dim != model.text_dim:
        raise UserError(f"text.dim={text.dim}, expected {model.text_dim} as the model")
    header.grid.tokens(model.patch)


def _tokenizer(path: pathlib.Path, pieces: bytes, text: TextConfig):
    """Returns the tokenizer, whose ids the text encoder all knows."""
    try:
        tokenizer = SentencePieceTokenizer(pieces, text.text_len)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no tokenizer that can be used: {error}; expected a"
            " SentencePiece model; copy it again"
        ) from error
    _check_vocab(path, tokenizer, text)
    return tokenizer


def _check_vocab(path: pathlib.Path, tokenizer, text: TextConfig) -> None:
    if tokenizer.vocab > text.vocab:
        raise UserError(
            f"{path} has {tokenizer.vocab} pieces, expected at most the"
            f" {text.vocab} of the text encoder; take both files from the same place"
        )


def _expected(
    model: ModelConfig, text: TextConfig, codec: LinearCodec | None
) -> dict[str, Any]:
    """Returns shape and type of every tensor, by name, without making any."""
    key = jax.random.key(0)
    ids = jax.ShapeDtypeStruct((1, text.text_len), jnp.int32)
    encoder = jax.eval_shape(Umt5Encoder(text).init, key, ids, ids)
    return _flatten(
        {
            "generator": jax.eval_shape(functools.partial(dit.init_params, model), key),
            "text": encoder["params"],
            "codec": _codec_shapes(model.latent_channels) if codec else {},
        }
    )


def _codec_shapes(channels: int) -> dict[str, Any]:
    shapes = {
        "mean": (BLOCK_VALUES,),
        "encode": (BLOCK_VALUES, channels),
        "decode": (channels, BLOCK_VALUES),
    }
    return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}


def _check_tensors(path, stored: Mapping[str, Any], expected: Mapping[str, Any]):
    """Raises unless there is every tensor, of its shape, and no other."""
    wrong = [f"missing {name}" for name in expected if name not in stored]
    wrong += [
        f"unexpected {shown(name)[1:-1]}" for name in stored if name not in expected
    ]
    wrong += [
        f"{name} is {tuple(stored[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in stored and stored[name].shape != expected[name].shape
    ]
    wrong += [
        f"{name} holds {stored[name].dtype}, expected floating-point numbers"
        for name in expected
        if name in stored and not jnp.issubdtype(stored[name].dtype, jnp.floating)
    ]
    if wrong:
        raise UserError(
            f"{path}: the tensors are not those of its sizes: {'; '.join(some(wrong))};"
            " save the weights together with the sizes that they have"
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
