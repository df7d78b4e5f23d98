"""Checkpoints back into published layouts, as safetensors, leaf after leaf."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from anchor_jax import bundle, checkpoint, io, ownership
from anchor_jax.errors import UserError, suggest
from anchor_jax.io import expand
from anchor_jax.porting.convert import Place, places
from anchor_jax.porting.port import TABLES, check_free
from anchor_jax.porting.rules import PEFT, UMT5_ALIAS
from anchor_jax.porting.sources import DIFFUSION, TEXT_FILE, TOKENIZER, VAE_FILE

LAYOUTS = ("wan", "diffusers", "generator")
ITEMS = ("generator", "ema", "fake_score")
LORA = ("separate", "merged")
SHARD_BYTES = 5 * 10**9

_SMALL = 2**29  # bytes
_WRITTEN = {
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
}
_TOKENIZER = {"wan": "google/umt5-xxl", "diffusers": "tokenizer"}

Read = Callable[[str], np.ndarray]  # a leaf by its path


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor to be written: where it comes from, and how it is described."""

    name: str
    place: Place
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def export(
    weights: str | pathlib.Path,
    out: str | pathlib.Path,
    layout: str,
    item: str = "generator",
    lora: str = "separate",
    progress: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint's networks under their published names.

    Bit for bit what was ported, unless adapters are merged, or alpha over their rank
    is no power of two: scaling them then rounds. Text encoder and VAE are safetensors
    in every layout: pickles are not written.

    Args:
      weights: The checkpoint, a training that began with one, or a step of it.
      out: The folder, which appears when whole.
      layout: One of `LAYOUTS`; "generator" is the transformer alone, with names as
        checkpoints of trainers have them.
      item: One of `ITEMS`, which of them is written as the transformer.
      lora: One of `LORA`; merged are adapters added to the weights, in float32.
      progress: Called with bytes written.
      shard_bytes: A file that would be larger is written in shards.

    Raises:
      UserError: The checkpoint lacks the item or says too little about it, or the
        folder is taken or in use.
    """
    _choose("layout", layout, LAYOUTS)
    _choose("item", item, ITEMS)
    _choose("lora", lora, LORA)
    with ownership.own_target(out):
        check_free(out)
        _export(weights, out, layout, item, lora, progress, shard_bytes)


def _export(weights, out, layout, item, lora, progress, shard_bytes: int) -> None:
    line = _lineage(weights)
    checkpoint.shapes(line[0], item)
    meta = _meta(line[-1], layout)
    job = _Job(line, layout, meta, progress, shard_bytes)
    job.check(item)
    with io.making_folder(expand(out).resolve()) as folder:
        job.transformer(folder, item, merged=lora == "merged")
        if layout != "generator":
            job.others(folder, item)


def default_item(weights: str | pathlib.Path) -> str:
    """Returns what is exported: of a training its running mean if there is one."""
    folder = expand(weights)
    is_run = bundle.run_folder(folder) is not None
    return "ema" if is_run and "ema" in checkpoint.items(folder) else "generator"


def _lineage(weights: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns a checkpoint, what it began with if it is a training's, and so on."""
    line = [expand(weights)]
    while (run := bundle.run_folder(line[-1])) is not None:
        line.append(expand(bundle.run_base(run)))
    return line


def _with_params(line: Sequence[pathlib.Path]) -> tuple[pathlib.Path, str]:
    """Returns the first of some checkpoints that holds whole weights, and its item."""
    for folder in line:
        if not checkpoint.is_checkpoint(folder):
            break
        item = default_item(folder)
        if "params" in checkpoint.shapes(folder, item):
            return folder, item
    raise UserError(
        f"{line[-1]}: what the training began with is no checkpoint of ported weights;"
        " a tiny model is written whole with --layout=bundle"
    )


def _meta(origin: pathlib.Path, layout: str) -> dict[str, Any]:
    """Returns what is known of ported weights; only some layouts need it."""
    if checkpoint.is_checkpoint(origin):
        return checkpoint.read_meta(origin)
    if layout == "generator":
        return {}
    raise UserError(
        f"{origin} is no checkpoint of ported weights, so there is no layout={layout}"
        " of it; a tiny model is written whole with --layout=bundle"
    )


def _choose(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"unknown {field} {value!r}{suggest(value, known, field)}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """One export: from which checkpoint, in which layout.

    `line` is the checkpoint, and if that is a training's what it began with, what that
    began with, and so on to one that was ported.
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
        """Raises unless the manifest says all that is written beside the tensors."""
        needed = {"generator": functools.partial(self._transformer_config, item)}
        if self.layout == "diffusers":
            needed |= {"text_encoder": self._text_config, "vae": self._vae_config}
        if self.layout == "generator":
            needed = {}
        present = checkpoint.items(self.origin) if needed else ()
        try:
            self._has_alias()
            alpha = self._source("lora").get("alpha")
            if alpha is not None and not 0 < float(alpha) < math.inf:
                raise ValueError(f"alpha={alpha!r} of lora")
            for item in needed.keys() & set(present):
                needed[item]()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.origin}: its meta cannot be exported ({error!r}); expected the"
                " sizes and sources that anchor-jax port writes"
            ) from error

    def transformer(self, folder: pathlib.Path, item: str, merged: bool) -> None:
        """Writes the transformer, its config, and its adapters if it has some."""
        trees, read = self._trees(item)
        adapters = trees.get("lora")
        base = _merged(read) if merged and adapters else _below("params", read)
        table = TABLES["generator", self.style]
        tensors = _tensors(trees["params"], table)
        place, stem = folder, DIFFUSION
        if self.layout == "generator":
            stem = item
            tensors = [
                dataclasses.replace(one, name=f"model.{one.name}") for one in tensors
            ]
        if self.layout == "diffusers":
            place = folder / "transformer"
        self._write(place, stem, tensors, base)
        if self.layout != "generator":
            io.write_json(place / "config.json", self._transformer_config(item))
        if adapters and not merged:
            self._adapters(folder, adapters, _below("lora", read))

    def _trees(self, item: str) -> tuple[dict[str, Any], Read]:
        """Returns the transformer's collections as shapes, and how to read leaves.

        A training of low-rank updates has them alone; the rest is what it began with.
        """
        trees, read = checkpoint.shapes(self.line[0], item), self._reader(item)
        if "params" in trees:
            return trees, read
        if item == "fake_score":
            raise UserError(
                f"{self.line[0]}: fake_score holds low-rank updates alone, of another"
                " network's weights; choose --item=generator or ema"
            )
        base, name = _with_params(self.line[1:])
        params = checkpoint.shapes(base, name)["params"]
        read_base = self._reader(name, base)

        def both(path: str) -> np.ndarray:
            return (read_base if path.startswith("params/") else read)(path)

        return {**trees, "params": params}, both

    def others(self, folder: pathlib.Path, item: str) -> None:
        """Writes text encoder, VAE and tokenizer, as far as there are some."""
        official = self.layout == "wan"
        homes = {
            "text_encoder": (folder, TEXT_FILE)
            if official
            else (folder / "text_encoder", "model"),
            "vae": (folder, VAE_FILE) if official else (folder / "vae", DIFFUSION),
        }
        configs = {"text_encoder": self._text_config, "vae": self._vae_config}
        trained = checkpoint.shapes(self.line[0], item).get("text")
        for name in homes.keys() & set(checkpoint.items(self.origin)):
            place, stem = homes[name]
            tree = checkpoint.shapes(self.origin, name)
            read = self._reader(name, self.origin)
            if name == "text_encoder" and trained is not None:
                tree, read = trained, _below("text", self._reader(item))
            tensors = _tensors(tree, TABLES[name, self.style])
            if name == "text_encoder" and self._has_alias():
                tensors = _with_alias(tensors)
            # Shards have an index, which the official names know for the transformer
            # only.
            limit = None if official else self.shard_bytes
            self._write(place, stem, tensors, read, limit)
            if not official:
                io.write_json(place / "config.json", configs[name]())
        for name in TOKENIZER:
            with contextlib.suppress(UserError):
                source = checkpoint.file(self.origin, f"tokenizer/{name}")
                home = folder / _TOKENIZER[self.layout]
                home.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, home / name)

    def _reader(self, item: str, folder: pathlib.Path | None = None) -> Read:
        """Returns how to read leaves; those of a small item are read at once."""
        folder = folder or self.line[0]
        leaves = jax.tree.leaves(checkpoint.shapes(folder, item))
        if sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) > _SMALL:
            return functools.partial(checkpoint.leaf, folder, item)
        tree = checkpoint.restore(folder, item)
        found = traverse_util.flatten_dict(tree, sep="/")
        return lambda path: np.asarray(found[path])

    def _adapters(self, folder: pathlib.Path, tree: Any, read: Read) -> None:
        """Writes adapters in the layout of PEFT, with their scale taken out of `b`."""
        entry = self._source("lora")
        tensors = _tensors(tree, TABLES["lora", self.style])
        rank = next(one.shape[0] for one in tensors if "lora_A" in one.name)
        alpha = entry.get("alpha") or rank

        def unscaled(path: str) -> np.ndarray:
            leaf = read(path)
            if not path.endswith("/b") or alpha == rank:
                return leaf
            return leaf * np.asarray(rank / alpha, leaf.dtype)

        place = folder if self.layout == "generator" else folder / "lora"
        self._write(place, "adapter_model", tensors, unscaled, None)
        modules = {
            one.name.removeprefix(PEFT).split(".", 2)[2].rsplit(".", 2)[0]
            for one in tensors
        }
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
        io.write_json(
            place / "adapter_config.json",
            {**config, "target_modules": sorted(modules), "bias": "none"},
        )

    def _source(self, item: str) -> Mapping[str, Any]:
        entries = self.meta.get("sources") or []
        return next((one for one in entries if one.get("item") == item), {})

    def _has_alias(self) -> bool:
        return self.style == "diffusers" and UMT5_ALIAS[0] in self._source(
            "text_encoder"
        ).get("aliases", ())

    def _write(
        self,
        folder: pathlib.Path,
        stem: str,
        tensors: list[_Tensor],
        read: Read,
        limit: int | None = -1,
    ) -> None:
        """Writes tensors as one file, or as shards and their index.

        Args:
          folder: Is made if need be.
          stem: The file's name before `.safetensors`.
          tensors: Those of one leaf side by side.
          read: Returns a leaf by its path.
          limit: Bytes in a file, None for no limit, -1 for that of this job.
        """
        folder.mkdir(parents=True, exist_ok=True)
        limit = self.shard_bytes if limit == -1 else limit
        shards = _split(tensors, limit)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"{stem}.safetensors"
            if len(shards) > 1:
                file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= {one.name: file for one in shard}
            with (folder / file).open("wb") as opened:
                _write_file(opened, shard, read, self.progress)
        if len(shards) > 1:
            total = sum(one.nbytes for one in tensors)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            io.write_json(folder / f"{stem}.safetensors.index.json", index)

    def _transformer_config(self, item: str) -> dict[str, Any]:
        model = self.meta["model"]
        if item == "fake_score":
            own = checkpoint.read_meta(self.line[0]).get(bundle.CRITIC, {})
            model = {**model, **own}
        shared = {name: model[name] for name in ("eps", "ffn_dim", "freq_dim")}
        shared["num_layers"] = model["num_layers"]
        channels = model["latent_channels"]
        if self.layout == "wan":
            return {
                "_class_name": "WanModel",
                "dim": model["dim"],
                "in_dim": channels,
                "model_type": "t2v",
                "num_heads": model["num_heads"],
                "out_dim": channels,
                "text_len": model["text_len"],
                **shared,
            }
        return {
            "_class_name": "WanTransformer3DModel",
            "attention_head_dim": model["dim"] // model["num_heads"],
            "cross_attn_norm": True,
            "in_channels": channels,
            "num_attention_heads": model["num_heads"],
            "out_channels": channels,
            "patch_size": list(model["patch"]),
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "text_dim": model["text_dim"],
            "text_len": model["text_len"],
            **shared,
        }

    def _text_config(self) -> dict[str, Any]:
        text = self.meta["text"]
        return {
            "architectures": ["UMT5EncoderModel"],
            "model_type": "umt5",
            "d_ff": text["ffn_dim"],
            "d_kv": text["attention_dim"] // text["num_heads"],
            "d_model": text["dim"],
            "feed_forward_proj": "gated-gelu",
            "layer_norm_epsilon": text["eps"],
            "num_heads": text["num_heads"],
            "num_layers": text["num_layers"],
            "relative_attention_max_distance": text["max_distance"],
            "relative_attention_num_buckets": text["num_buckets"],
            "vocab_size": text["vocab"],
        }

    def _vae_config(self) -> dict[str, Any]:
        vae = self.meta["vae"]
        return {
            "_class_name": "AutoencoderKLWan",
            "attn_scales": [],
            "base_dim": vae["base_dim"],
            "dim_mult": list(vae["dim_mult"]),
            "dropout": 0.0,
            "latents_mean": list(vae["latent_mean"]),
            "latents_std": list(vae["latent_std"]),
            "num_res_blocks": vae["num_res_blocks"],
            "temperal_downsample": list(vae["temporal_downsample"]),
            "z_dim": vae["z_dim"],
        }


def _below(name: str, read: Read) -> Read:
    return lambda path: read(f"{name}/{path}")


def _merged(read: Read) -> Read:
    """Returns how to read a leaf with its adapter's product added, rounded once."""

    def leaf(path: str) -> np.ndarray:
        kernel = read(f"params/{path}")
        name = path.removesuffix("/kernel")
        if name == path or not path.startswith(("blocks/", "context/")):
            return kernel
        a, b = (read(f"lora/{name}/{part}") for part in "ab")
        whole = np.empty_like(kernel)
        for layer, part in enumerate(kernel):
            product = a[layer].astype(np.float32) @ b[layer].astype(np.float32)
            whole[layer] = (part.astype(np.float32) + product).astype(kernel.dtype)
        return whole

    return leaf


def _tensors(tree: Any, table: tuple) -> list[_Tensor]:
    """Returns the tensors of a tree of shapes, those of one leaf side by side.

    The widest types come first, so that every tensor starts at a multiple of its width.
    """
    leaves = traverse_util.flatten_dict(tree, sep="/")
    wrong = sorted({str(leaf.dtype) for leaf in leaves.values()} - _names())
    if wrong:
        raise UserError(f"types {', '.join(wrong)}, expected {', '.join(_names())}")
    found = []
    for place in places(tree, table):
        leaf = leaves[place.path]
        shape = place.shape(tuple(leaf.shape))
        found.append(_Tensor(place.name, place, np.dtype(leaf.dtype), shape))
    return sorted(found, key=lambda one: -one.dtype.itemsize)


def _names() -> set[str]:
    return {dtype.name for dtype in _WRITTEN}


def _with_alias(tensors: list[_Tensor]) -> list[_Tensor]:
    alias, name = UMT5_ALIAS
    at = next(at for at, one in enumerate(tensors) if one.name == name)
    again = dataclasses.replace(tensors[at], name=alias)
    return [*tensors[: at + 1], again, *tensors[at + 1 :]]


def _split(tensors: list[_Tensor], limit: int | None) -> list[list[_Tensor]]:
    """Returns the tensors in runs of at most `limit` bytes, or one tensor."""
    runs: list[list[_Tensor]] = [[]]
    size = 0
    for one in tensors:
        if runs[-1] and limit is not None and size + one.nbytes > limit:
            runs.append([])
            size = 0
        runs[-1].append(one)
        size += one.nbytes
    return runs


def _write_file(
    file: BinaryIO, tensors: Sequence[_Tensor], read: Read, progress
) -> None:
    """Writes a safetensors file: its header, then tensor after tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in tensors:
        span = [end, end + one.nbytes]
        end = span[1]
        header[one.name] = {
            "dtype": _WRITTEN[one.dtype],
            "shape": list(one.shape),
            "data_offsets": span,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for path, group in itertools.groupby(tensors, lambda one: one.place.path):
        leaf = read(path)
        for one in group:
            part = one.place.take(leaf)
            file.write(part.reshape(-1).view(np.uint8).data)
            if progress:
                progress(one.nbytes)
        # Or else two leaves would be in memory while the next one is read.
        del leaf, part


def total_bytes(weights: str | pathlib.Path, layout: str, item: str) -> int:
    """Returns about how many bytes an export writes."""
    line = _lineage(weights)
    places = [(line[0], item)]
    if layout != "generator":
        places += [(line[-1], "text_encoder"), (line[-1], "vae")]
    leaves = [
        leaf
        for folder, name in places
        if checkpoint.is_checkpoint(folder) and name in checkpoint.items(folder)
        for leaf in jax.tree.leaves(checkpoint.shapes(folder, name))
    ]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
