"""Writes checkpoints in published layouts, as safetensors, leaf by leaf."""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from anchor_jax import io, ownership, trees
from anchor_jax.errors import UserError, suggest
from anchor_jax.io import expand
from anchor_jax.porting import companions, published
from anchor_jax.porting import safetensors_writer as writer
from anchor_jax.porting.key_tables import PEFT, UMT5_ALIAS
from anchor_jax.porting.port import TABLES, check_free
from anchor_jax.porting.safetensors_writer import Read
from anchor_jax.porting.sources import DIFFUSION, TEXT_FILE, VAE_FILE
from anchor_jax.wan.spec import WAN_2_1
from anchor_jax.weights import checkpoint, lineage
from anchor_jax.weights.trained import CRITIC

LAYOUTS = ("wan", "diffusers", "generator")
ITEMS = ("generator", "ema", "fake_score")
LORA = ("separate", "merged")
SHARD_BYTES = 5 * 10**9

_SMALL = 2**29  # bytes
_TOKENIZER = {"wan": "google/umt5-xxl", "diffusers": "tokenizer"}
_SENTINELS = 300  # sentinels `<extra_id_0>` and so on of umT5
_PARTS = ("text_encoder", "vae", "tokenizer")


def export(
    weights: str | pathlib.Path,
    out: str | pathlib.Path,
    layout: str,
    item: str = "generator",
    lora: str = "separate",
    progress: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[str, ...]:
    """Writes a checkpoint's networks under their published names.

    The values are bit-identical to the ported ones. Exceptions are merged adapters and
    adapters whose alpha / rank is not a power of two, which are rounded. Text encoder
    and VAE are safetensors in every layout: pickles are not written. The layout of
    diffusers is a folder for `WanPipeline.from_pretrained`, with a folder `lora/` for
    `load_lora_weights` and `PeftModel.from_pretrained`.

    Args:
      weights: A checkpoint, a training that started from one, or a step of a training.
      out: The folder. It appears under its name when complete.
      layout: One of `LAYOUTS`. "generator" is only the transformer, with the names of
        trainers' checkpoints.
      item: One of `ITEMS`, the item to write as the transformer.
      lora: One of `LORA`. "merged" adds the adapters to the weights in float32.
      progress: Called with the number of bytes written.
      shard_bytes: Largest size of a file; larger ones are written as shards.

    Returns:
      Notes for the user on parts that the folder lacks or needs.

    Raises:
      UserError: The checkpoint lacks the item or its settings, or the folder exists or
        is in use.
    """
    _choose("layout", layout, LAYOUTS)
    _choose("item", item, ITEMS)
    _choose("lora", lora, LORA)
    with ownership.own_target(out):
        check_free(out)
        return _export(weights, out, layout, item, lora, progress, shard_bytes)


def _export(weights, out, layout, item, lora, progress, shard_bytes) -> tuple[str, ...]:
    line = _lineage(weights)
    _check_present(line[0], item)
    checkpoint.shapes(line[0], item)
    meta = _meta(line, layout)
    _check_family(line[-1], meta)
    writing = _Export(line, layout, meta, progress, shard_bytes)
    writing.check(item)
    with io.making_folder(io.resolved(out)) as folder:
        writing.transformer(folder, item, merged=lora == "merged")
        if layout != "generator":
            writing.others(folder, item)
        if layout == "diffusers":
            return writing.pipeline(folder)
    return ()


def default_item(weights: str | pathlib.Path) -> str:
    """Returns the item to export: a training's running mean if it has one."""
    folder = expand(weights)
    is_run = lineage.run_folder(folder) is not None
    return "ema" if is_run and "ema" in checkpoint.items(folder) else "generator"


def _lineage(weights: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns a checkpoint, the weights that its training started from, and so on.

    Raises:
      UserError: The checkpoint does not exist.
    """
    line = [expand(weights)]
    while (run := lineage.run_folder(line[-1])) is not None:
        line.append(expand(lineage.run_base(run)))
    if not checkpoint.is_checkpoint(line[0]):
        remedy = (
            "a model in one file can only be exported with --layout=bundle"
            if _is_one_file(line[0])
            else "give the folder that anchor-jax port or train wrote"
        )
        exists = _is_one_file(line[0]) or line[0].exists()
        fault = " is not a checkpoint" if exists else ": no such folder"
        raise UserError(f"weights={line[0]}{fault}; {remedy}")
    return line


def _is_one_file(path: pathlib.Path) -> bool:
    return (
        str(path) == "tiny"
        or path.suffix == ".safetensors"
        or (path / "model.safetensors").is_file()
    )


def _with_params(line: Sequence[pathlib.Path]) -> tuple[pathlib.Path, str]:
    """Returns the nearest checkpoint behind a training that holds whole weights.

    Args:
      line: the training and its initial weights, from `_lineage`.

    Returns:
      The checkpoint and its item.
    """
    for folder in line[1:]:
        if not checkpoint.is_checkpoint(folder):
            break
        item = default_item(folder)
        if "params" in checkpoint.shapes(folder, item):
            return folder, item
    raise _unpublished(
        line, "low-rank updates cannot be exported without their base weights"
    )


def _meta(line: Sequence[pathlib.Path], layout: str) -> dict[str, Any]:
    """Returns the manifest of ported weights, which only some layouts need."""
    if checkpoint.is_checkpoint(line[-1]):
        return checkpoint.read_meta(line[-1])
    if layout == "generator":
        return {}
    raise _unpublished(line, f"--layout={layout} needs ported weights")


def _unpublished(line: Sequence[pathlib.Path], why: str) -> UserError:
    """Returns the error for a training whose initial weights were not ported."""
    given, origin = line[0], line[-1]
    if origin.exists() or str(origin) == "tiny":
        remedy = "export this model with --layout=bundle"
    else:
        remedy = "that is missing: restore it"
    return UserError(f"weights={given}: started from {origin}, and {why}; {remedy}")


def _check_family(origin: pathlib.Path, meta: Mapping[str, Any]) -> None:
    """Raises UserError unless the weights are of the family whose layouts are known."""
    family = meta.get("family", WAN_2_1.name)
    if family != WAN_2_1.name:
        raise UserError(
            f"{origin} has weights of the family {family!r:.60}; they cannot be"
            f" exported, because the layouts are those of {WAN_2_1.name}"
        )


def _check_present(folder: pathlib.Path, item: str) -> None:
    present = [name for name in checkpoint.items(folder) if name in ITEMS]
    if item not in present:
        raise UserError(f"{folder} has no item {item!r}{suggest(item, present, 'has')}")


def _choose(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"unknown {field} {value!r}{suggest(value, known, field)}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Export:
    """One export: its checkpoint and its layout.

    `line` is the checkpoint. For a training, the weights that it started from follow,
    back to ported weights.
    """

    line: Sequence[pathlib.Path]
    layout: str
    meta: Mapping[str, Any]
    progress: Callable[[int], None] | None
    shard_bytes: int

    @property
    def origin(self) -> pathlib.Path:
        """The folder with text encoder, VAE, tokenizer, and their sizes."""
        return self.line[-1]

    @property
    def style(self) -> str:
        return "diffusers" if self.layout == "diffusers" else "wan"

    def check(self, item: str) -> None:
        """Raises UserError unless the manifest holds all settings that are written."""
        needed = {"generator": functools.partial(self._transformer_config, item)}
        if self.layout == "diffusers":
            needed |= {
                "text_encoder": lambda: published.text_encoder(self.meta["text"]),
                "vae": lambda: published.vae(self.meta["vae"]),
            }
        if self.layout == "generator":
            needed = {}
        present = checkpoint.items(self.origin) if needed else ()
        try:
            self._has_alias()
            alpha = self._source("lora").get("alpha")
            if isinstance(alpha, int | float) and not 0 < alpha < math.inf:
                raise ValueError(f"alpha={alpha!r} of lora")
            for item in needed.keys() & set(present):
                needed[item]()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.origin}: its meta cannot be exported ({error!r}); it must hold"
                " the sizes and sources that anchor-jax port writes"
            ) from error

    def transformer(self, folder: pathlib.Path, item: str, merged: bool) -> None:
        """Writes the transformer, its config, and its adapters if it has some."""
        held, read = self._trees(item)
        adapters = held.get("lora")
        base = _below("params", read)
        if merged and adapters:
            base = _merged(read, trees.flatten(adapters))
        table = TABLES["generator", self.style]
        tensors = writer.tensors_of(held["params"], table)
        place, stem = folder, DIFFUSION
        if self.layout == "generator":
            stem = item
            tensors = [
                dataclasses.replace(one, name=f"model.{one.name}") for one in tensors
            ]
        if self.layout == "diffusers":
            place = folder / "transformer"
        writer.write(place, stem, tensors, base, self.shard_bytes, self.progress)
        if self.layout != "generator":
            io.write_json(place / "config.json", self._transformer_config(item))
        if adapters and not merged:
            self._adapters(folder, adapters, _below("lora", read))

    def _trees(self, item: str) -> tuple[dict[str, Any], Read]:
        """Returns the shapes of the transformer's collections, and a reader of leaves.

        A training of low-rank updates holds only these; the rest are its initial
        weights.
        """
        held, read = checkpoint.shapes(self.line[0], item), self._reader(item)
        if "params" in held:
            return held, read
        if item == "fake_score":
            raise UserError(
                f"{self.line[0]}: fake_score holds only low-rank updates of another"
                " network's weights; choose --item=generator or ema"
            )
        base, name = _with_params(self.line)
        params = checkpoint.shapes(base, name)["params"]
        read_base = self._reader(name, base)

        def both(path: str) -> np.ndarray:
            return (read_base if path.startswith("params/") else read)(path)

        return {**held, "params": params}, both

    def others(self, folder: pathlib.Path, item: str) -> None:
        """Writes the text encoder, the VAE and the tokenizer, if they exist."""
        official = self.layout == "wan"
        homes = {
            "text_encoder": (folder, TEXT_FILE)
            if official
            else (folder / "text_encoder", "model"),
            "vae": (folder, VAE_FILE) if official else (folder / "vae", DIFFUSION),
        }
        trained = checkpoint.shapes(self.line[0], item).get("text")
        for name in homes.keys() & set(checkpoint.items(self.origin)):
            place, stem = homes[name]
            tree = checkpoint.shapes(self.origin, name)
            read = self._reader(name, self.origin)
            if name == "text_encoder" and trained is not None:
                tree, read = trained, _below("text", self._reader(item))
            tensors = writer.tensors_of(tree, TABLES[name, self.style])
            if name == "text_encoder" and self._has_alias():
                tensors = writer.with_alias(tensors)
            # Shards have an index. The official layout has one for the transformer
            # only.
            limit = None if official else self.shard_bytes
            writer.write(place, stem, tensors, read, limit, self.progress)
            if not official:
                config = published.text_encoder(self.meta["text"])
                if name == "vae":
                    config = published.vae(self.meta["vae"])
                io.write_json(place / "config.json", config)
        self._tokenizer(folder / _TOKENIZER[self.layout])

    def _tokenizer(self, home: pathlib.Path) -> None:
        """Writes the ported tokenizer with a config for the library transformers."""
        found = {name: self._file(f"tokenizer/{name}") for name in companions.TOKENIZER}
        found = {name: path for name, path in found.items() if path is not None}
        if not found.keys() & {*companions.VOCABULARY}:
            return
        home.mkdir(parents=True, exist_ok=True)
        for name, path in found.items():
            shutil.copyfile(path, home / name)
        config = home / "tokenizer_config.json"
        if not config.exists():
            text = self.meta.get("text") or {}
            io.write_json(
                config,
                published.tokenizer(
                    ends=_ends(found.get("tokenizer.json")),
                    extra_ids=_sentinels(found.get("spiece.model"), text.get("vocab")),
                    text_len=text.get("text_len") or WAN_2_1.text_len,
                ),
            )

    def pipeline(self, folder: pathlib.Path) -> tuple[str, ...]:
        """Writes the scheduler and the list of parts if all exist; returns notes."""
        missing = [name for name in _PARTS if not (folder / name).is_dir()]
        if missing:
            return (
                f"without {', '.join(missing)} no model_index.json is written, so load"
                " transformer/ by itself; for a whole pipeline, port with"
                " --wan=FOLDER",
            )
        kept = self._file(companions.SCHEDULER)
        scheduler = io.read_json(kept) if kept else published.SCHEDULER
        io.write_json(folder / companions.SCHEDULER, scheduler)
        words = io.read_json(folder / companions.TOKENIZER_CONFIG)
        index = published.model_index(
            words.get("tokenizer_class"), scheduler.get("_class_name")
        )
        io.write_json(folder / "model_index.json", index)
        length = self.meta["model"]["text_len"]
        if length == published.TEXT_LEN:
            return ()
        return (
            f"the transformer was made for {length} text tokens: call the pipeline with"
            f" max_sequence_length={length}",
        )

    def _file(self, name: str) -> pathlib.Path | None:
        """Returns the path of a small file of the origin, or None."""
        with contextlib.suppress(UserError):
            return checkpoint.file(self.origin, name)
        return None

    def _reader(self, item: str, folder: pathlib.Path | None = None) -> Read:
        """Returns a reader of leaves; a small item is read at once."""
        folder = folder or self.line[0]
        if trees.nbytes(checkpoint.shapes(folder, item)) > _SMALL:
            return functools.partial(checkpoint.leaf, folder, item)
        tree = checkpoint.restore(folder, item)
        found = trees.flatten(tree)
        return lambda path: np.asarray(found[path])

    def _adapters(self, folder: pathlib.Path, tree: Any, read: Read) -> None:
        """Writes adapters for PEFT, and for diffusers in its layout.

        Their scale is divided out of `b`, and the config holds it as alpha / rank.
        """
        tensors = writer.tensors_of(tree, TABLES["lora", self.style])
        config, factor = _lora_config(tensors, self._source("lora"))

        def unscaled(path: str) -> np.ndarray:
            leaf = read(path)
            if not path.endswith("/b") or factor == 1:
                return leaf
            # The product is rounded once, because a narrow type may not hold the factor
            # exactly.
            return (leaf.astype(np.float32) * np.float32(factor)).astype(leaf.dtype)

        place = folder if self.layout == "generator" else folder / "lora"
        writer.write(place, "adapter_model", tensors, unscaled, progress=self.progress)
        io.write_json(
            place / "adapter_config.json",
            {"peft_type": "LORA", "base_model_name_or_path": None, **config},
        )
        if self.layout != "diffusers":
            return
        start = published.LORA_PREFIX
        named = [
            dataclasses.replace(one, name=start + one.name.removeprefix(PEFT))
            for one in tensors
        ]
        settings = {start + name: value for name, value in config.items()}
        metadata = {published.LORA_METADATA: json.dumps(settings, sort_keys=True)}
        with (place / published.LORA_FILE).open("wb") as file:
            writer.write_file(file, named, unscaled, None, metadata)

    def _source(self, item: str) -> Mapping[str, Any]:
        entries = self.meta.get("sources") or []
        return next((one for one in entries if one.get("item") == item), {})

    def _has_alias(self) -> bool:
        return self.style == "diffusers" and UMT5_ALIAS[0] in self._source(
            "text_encoder"
        ).get("aliases", ())

    def _transformer_config(self, item: str) -> dict[str, Any]:
        model = self.meta["model"]
        if item == "fake_score":
            own = checkpoint.read_meta(self.line[0]).get(CRITIC, {})
            model = {**model, **own}
        if self.layout == "wan":
            return published.official_transformer(model)
        return published.transformer(model)


def _lora_config(
    tensors: Sequence[writer.Tensor], source: Mapping[str, Any]
) -> tuple[dict[str, Any], float]:
    """Returns the settings of adapters for PEFT, and the factor of their `b`.

    Alpha is the source's if all adapters have its rank. Otherwise alpha is each
    adapter's rank, and the scale stays in `b`.
    """
    ranks = {}
    for one in tensors:
        module, part, _ = one.name.removeprefix(PEFT).split(".", 2)[2].rsplit(".", 2)
        if part == "lora_A":
            ranks[module] = one.shape[0]
    rank, _ = collections.Counter(ranks.values()).most_common(1)[0]
    others = {module: own for module, own in sorted(ranks.items()) if own != rank}
    alpha = source.get("alpha")
    stated = isinstance(alpha, int | float) and source.get("rank", rank) == rank
    if others or not stated:
        alpha = rank
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
    }
    return config, rank / alpha


def _ends(path: pathlib.Path | None) -> bool:
    """Returns whether a `tokenizer.json` exists that adds tokens such as `</s>`."""
    with contextlib.suppress(UserError):
        return path is not None and bool(io.read_json(path).get("post_processor"))
    return False


def _sentinels(path: pathlib.Path | None, vocab: Any) -> int:
    """Returns the number of sentinels of an encoder with `vocab` ids."""
    if path is None or type(vocab) is not int:
        return 0
    import sentencepiece

    # A model that cannot be read is exported unchanged.
    with contextlib.suppress(OSError, RuntimeError):
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return max(0, min(_SENTINELS, vocab - pieces.get_piece_size()))
    return 0


def _below(name: str, read: Read) -> Read:
    return lambda path: read(f"{name}/{path}")


def _merged(read: Read, adapters: Mapping[str, Any]) -> Read:
    """Returns a reader of leaves that adds their adapters' products, rounded once."""

    def leaf(path: str) -> np.ndarray:
        kernel = read(f"params/{path}")
        name = path.removesuffix("/kernel")
        if name == path or f"{name}/a" not in adapters:
            return kernel
        a, b = (read(f"lora/{name}/{part}") for part in "ab")
        whole = np.empty_like(kernel)
        for layer, part in enumerate(kernel):
            product = a[layer].astype(np.float32) @ b[layer].astype(np.float32)
            whole[layer] = (part.astype(np.float32) + product).astype(kernel.dtype)
        return whole

    return leaf


def total_bytes(weights: str | pathlib.Path, layout: str, item: str) -> int:
    """Returns the approximate number of bytes that an export writes."""
    line = _lineage(weights)
    places = [(line[0], item)]
    if layout != "generator":
        places += [(line[-1], "text_encoder"), (line[-1], "vae")]
    return sum(
        trees.nbytes(checkpoint.shapes(folder, name))
        for folder, name in places
        if checkpoint.is_checkpoint(folder) and name in checkpoint.items(folder)
    )
