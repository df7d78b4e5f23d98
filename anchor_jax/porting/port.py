"""Published weights into a checkpoint of ours; all is checked before it is written."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from anchor_jax import checkpoint
from anchor_jax.checkpoint import Lazy
from anchor_jax.errors import UserError, suggest
from anchor_jax.io import expand
from anchor_jax.porting import rules, sources
from anchor_jax.porting.convert import (
    Mismatch,
    convert_lazily,
    convert_lora_lazily,
    num_layers,
    shape_of,
)
from anchor_jax.porting.sources import Source
from anchor_jax.wan import dit, lora
from anchor_jax.wan.spec import ModelConfig
from anchor_jax.wan.text import TextConfig, Umt5Encoder
from anchor_jax.wan.vae import VaeConfig, WanVae

METHODS = (
    "wan",
    "self_forcing",
    "causvid",
    "longlive",
    "memflow",
    "anchor_forcing",
)
TABLES = {
    ("generator", "wan"): rules.DIT,
    ("generator", "diffusers"): rules.DIT_DIFFUSERS,
    ("lora", "wan"): rules.LORA,
    ("lora", "diffusers"): rules.LORA_DIFFUSERS,
    ("text_encoder", "wan"): rules.UMT5,
    ("text_encoder", "diffusers"): rules.UMT5_TRANSFORMERS,
    ("vae", "wan"): rules.VAE,
    ("vae", "diffusers"): rules.VAE_DIFFUSERS,
}

_HEAD_DIM = 128
_NOT_SIZES = ("dtype", "param_dtype", "remat", "unroll", "conv")
_MISSING = {
    "generator": "--wan=FOLDER or --generator=FILE.pt",
    "text_encoder": "--wan=FOLDER, with the text encoder in it",
    "vae": "--wan=FOLDER, with the VAE in it",
    "tokenizer/spiece.model": "--wan=FOLDER, with google/umt5-xxl/ or tokenizer/ in it",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What is to be written, checked.

    Attributes:
      items: Trees of `Lazy` by the item's name.
      meta: What the item `meta` will say, but for the digests of the sources.
      sources: Where it comes from.
      files: Small files by their place in the checkpoint.
    """

    items: Mapping[str, Any]
    meta: Mapping[str, Any]
    sources: tuple[Source, ...]
    files: Mapping[str, pathlib.Path]

    @property
    def read_bytes(self) -> int:
        """Bytes of the source files, each read once for its digest."""
        return sum(path.stat().st_size for path in self.paths())

    @property
    def write_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(dict(self.items)))

    @property
    def peak_bytes(self) -> int:
        """Bytes in memory at once: the largest leaf, and as much to encode it."""
        leaves = jax.tree.leaves(dict(self.items))
        return 2 * max((leaf.nbytes for leaf in leaves), default=0)

    def missing(self) -> dict[str, str]:
        """Returns what sampling needs beyond this, and how to add it."""
        present = {*self.items, *self.files}
        return {name: how for name, how in _MISSING.items() if name not in present}

    def paths(self) -> list[pathlib.Path]:
        """Returns the source files, each once."""
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
) -> Plan:
    """Returns what porting would write, after all checks; nothing is written.

    Args:
      wan: A folder of Wan2.1, official or of diffusers.
      generator: A checkpoint whose generator takes the place of that folder's.
      lora: Adapters for the generator.
      key: The entry of the checkpoint that holds the generator.
      critic: Port the checkpoint's critic too, as `fake_score`.
      alpha: Of the adapters; as their config says, or else their rank.
      method: One of `METHODS`, how the generator was trained.

    Raises:
      UserError: Files are broken, or do not fit their networks or one another.
    """
    method = _method(method, generator or lora)
    found = _gather(wan, generator, lora, key, critic)
    if not found:
        raise UserError("nothing to port: give --wan=FOLDER, --generator=FILE or both")
    problems: list[str] = []
    networks = _configs(found, problems)
    trees = {}
    for item, source in found.items():
        try:
            trees[item] = _tree(source, networks, alpha)
        except Mismatch as mismatch:
            problems += mismatch.problems
    if problems:
        raise Mismatch(problems)
    return Plan(
        items=_items(trees),
        meta=_meta(method, found, networks, trees, alpha),
        sources=tuple(found.values()),
        files=_tokenizer(wan),
    )


def run(
    plan: Plan,
    out: str | pathlib.Path,
    progress: Callable[[int], None] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the checkpoint and returns its manifest, the item `meta`.

    Args:
      plan: Of `plan`.
      out: The folder; it appears when whole.
      progress: Called with bytes as they are read for digests, and then written; in
        all `read_bytes` + `write_bytes`.
      overwrite: Replace a checkpoint that is there.

    Raises:
      UserError: The folder is taken, or cannot be written.
    """
    if not overwrite:
        check_free(out)
    files = {path: _file(path, progress) for path in plan.paths()}
    described = [
        {**entry, "files": [files[path] for path in source.files]}
        for entry, source in zip(plan.meta["sources"], plan.sources, strict=True)
    ]
    meta = {**plan.meta, "sources": described}
    checkpoint.write(out, plan.items, meta, plan.files, progress, overwrite)
    return meta


def check_free(out: str | pathlib.Path) -> None:
    """Raises `UserError` if a folder holds anything."""
    out = expand(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(
            f"out={str(out)!r} is there already; choose another folder, or remove it"
            " (port can also --overwrite)"
        )


def _file(path: pathlib.Path, progress) -> dict[str, Any]:
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "sha256": sources.digest(path, progress),
    }


def _method(method: str | None, trained: Any) -> str:
    """Returns the method, which a generator or LoRA needs to be named."""
    if method is None and trained:
        raise UserError(
            "method is missing: --generator and --lora need --method, one of"
            f" {', '.join(METHODS)}"
        )
    method = method or "wan"
    if method not in METHODS:
        raise UserError(
            f"unknown method {method!r}{suggest(method, METHODS, 'methods')}"
        )
    return method


def _gather(wan, generator, lora, key, critic) -> dict[str, Source]:
    """Returns the sources by item; a checkpoint's generator replaces the folder's."""
    found = {source.item: source for source in sources.open_wan(wan)} if wan else {}
    if (key or critic) and not generator:
        raise UserError("--key and --critic need --generator=FILE to take them from")
    if generator:
        source = sources.open_generator(generator, key)
        base = found.get("generator")
        if base and _width(base) == _width(source):
            source = dataclasses.replace(source, settings=base.settings)
        found["generator"] = source
    if critic:
        found["fake_score"] = sources.open_generator(generator, "critic", "fake_score")
    if lora:
        if "generator" not in found:
            raise UserError(
                f"lora={str(lora)!r} needs the generator that it was trained on; give"
                " it with --generator or --wan"
            )
        found["lora"] = sources.open_lora(lora)
    return found


def _width(source: Source) -> tuple[int, ...] | None:
    bias = source.arrays.get("patch_embedding.bias")
    return None if bias is None else bias.shape


def _table(source: Source):
    item = "generator" if source.item == "fake_score" else source.item
    return TABLES[item, source.layout]


def _configs(found: Mapping[str, Source], problems: list[str]) -> dict[str, Any]:
    """Returns the networks' configs by item; adds to `problems` what does not fit."""
    read = {"generator": model_config, "text_encoder": text_config, "vae": vae_config}
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
        problems.append(f"text encoder of width {text.dim}, expected {model.text_dim}")
    if model and text:
        configs["text_encoder"] = dataclasses.replace(text, text_len=model.text_len)
    if model and vae and vae.z_dim != model.latent_channels:
        problems.append(
            f"VAE of {vae.z_dim} channels, expected {model.latent_channels}"
        )
    return configs


def _tree(source: Source, configs: Mapping[str, Any], alpha: float | None) -> Any:
    """Returns a network's tree of `Lazy`; of lone names if its config is not known.

    Raises:
      Mismatch: Names, shapes or types are not right.
    """
    table = _table(source)
    item = "generator" if source.item in ("fake_score", "lora") else source.item
    expected = _expected(configs[item]) if item in configs else None
    if source.item != "lora":
        return convert_lazily(source.arrays, table, expected)
    if expected is not None:
        start = functools.partial(lora.init, rank=_rank(source), rng=jax.random.key(0))
        expected = jax.eval_shape(start, expected)
    return convert_lora_lazily(source.arrays, table, _alpha(source, alpha), expected)


def _rank(source: Source) -> int:
    return shape_of(source.arrays, _table(source), "blocks/self_attn/q/a")[-1]


_NEUTRAL = {
    "use_rslora": False,
    "use_dora": False,
    "alpha_pattern": {},
    "rank_pattern": {},
    "fan_in_fan_out": False,
    "bias": "none",
}
"""Settings of PEFT that change what adapters do, where they do not."""


def _alpha(source: Source, alpha: float | None) -> float:
    """Returns alpha as given, as in the file of settings, or the rank."""
    others = [
        f"adapter_config.json: {name}={source.settings[name]!r} changes what tensors"
        f" mean, expected {neutral!r}; merge the adapter with its own library first"
        for name, neutral in _NEUTRAL.items()
        if source.settings.get(name, neutral) not in (neutral, None)
    ]
    if others:
        raise Mismatch(others)
    given = source.settings.get("lora_alpha") if alpha is None else alpha
    rank = _rank(source)
    given = rank if given is None else given
    if type(given) not in (int, float) or not 0 < given < math.inf or rank < 1:
        raise UserError(f"alpha={given!r} of a LoRA of rank {rank}: expected above 0")
    stated = source.settings.get("r", rank)
    if stated != rank:
        raise Mismatch([f"adapter_config.json: r={stated}, the tensors have {rank}"])
    return given


@functools.cache
def _expected(config: Any) -> Any:
    """Returns the shapes of a network's parameters."""
    rng = jax.random.key(0)
    if isinstance(config, ModelConfig):
        return jax.eval_shape(functools.partial(dit.init_params, config), rng)
    if isinstance(config, TextConfig):
        ids = jnp.zeros((1, 2), jnp.int32)
        return jax.eval_shape(Umt5Encoder(config).init, rng, ids, ids)["params"]
    size = 2 * config.spatial_stride
    pixels = jnp.zeros((1, 1 + config.temporal_stride, size, size, 3))
    return jax.eval_shape(WanVae(config).init, rng, pixels)["params"]


def model_config(source: Source) -> ModelConfig:
    """Returns a transformer's sizes, of its tensors and its file of settings.

    Raises:
      Mismatch: A tensor that tells a size is missing, or the settings say otherwise.
      ValueError: The sizes are not those of a transformer.
    """
    table, settings = _table(source), source.settings
    shape = functools.partial(shape_of, source.arrays, table)
    features, dim = shape("patch_embed/kernel")
    sizes = {
        "dim": dim,
        "ffn_dim": shape("blocks/ffn_in/kernel")[-1],
        "num_layers": num_layers(source.arrays, table),
        "freq_dim": shape("time_in/kernel")[0],
        "text_dim": shape("text_in/kernel")[0],
        "latent_channels": features // 4,
    }
    heads = settings.get("num_heads", settings.get("num_attention_heads"))
    if heads is None:
        heads = max(1, dim // _HEAD_DIM)
    per_head = settings.get("attention_head_dim", _divided(dim, heads))
    said = {
        "dim": settings.get("dim", _product(heads, per_head)),
        "latent_channels": settings.get("in_dim", settings.get("in_channels")),
        **{name: settings.get(name) for name in ("ffn_dim", "num_layers", "freq_dim")},
        "text_dim": settings.get("text_dim"),
    }
    _agree(source, sizes, said)
    return ModelConfig(
        **sizes,
        num_heads=heads,
        text_len=_whole(settings, "text_len", 512),
        eps=_positive(settings, "eps", 1e-6),
    )


def text_config(source: Source) -> TextConfig:
    """Returns a text encoder's sizes; raises as `model_config`."""
    table, settings = _table(source), source.settings
    shape = functools.partial(shape_of, source.arrays, table)
    vocab, dim = shape("token_embedding/embedding")
    buckets, heads = shape("blocks/position_bias/embedding")
    sizes = {
        "vocab": vocab,
        "dim": dim,
        "attention_dim": shape("blocks/attn/q/kernel")[-1],
        "ffn_dim": shape("blocks/ffn/gate/kernel")[-1],
        "num_heads": heads,
        "num_layers": num_layers(source.arrays, table),
        "num_buckets": buckets,
    }
    names = {
        "vocab": "vocab_size",
        "dim": "d_model",
        "ffn_dim": "d_ff",
        "num_heads": "num_heads",
        "num_layers": "num_layers",
        "num_buckets": "relative_attention_num_buckets",
    }
    _agree(source, sizes, {ours: settings.get(name) for ours, name in names.items()})
    return TextConfig(
        **sizes,
        max_distance=_whole(settings, "relative_attention_max_distance", 128),
        eps=_positive(settings, "layer_norm_epsilon", 1e-6),
    )


def vae_config(source: Source) -> VaeConfig:
    """Returns a VAE's sizes; raises as `model_config`.

    Its stages are those of Wan2.1: only widths differ.
    """
    shape = functools.partial(shape_of, source.arrays, _table(source))
    standard = VaeConfig()
    sizes = {
        "base_dim": shape("encoder/conv1/kernel")[-1],
        "z_dim": shape("conv2/kernel")[-1],
    }
    said = {
        **{name: source.settings.get(name) for name in ("base_dim", "z_dim")},
        "dim_mult": source.settings.get("dim_mult"),
        "num_res_blocks": source.settings.get("num_res_blocks"),
        # Spelt so in the files of diffusers.
        "temporal_downsample": source.settings.get("temperal_downsample"),
    }
    stages = {
        "dim_mult": list(standard.dim_mult),
        "num_res_blocks": standard.num_res_blocks,
        "temporal_downsample": list(standard.temporal_downsample),
    }
    _agree(source, {**sizes, **stages}, said)
    return VaeConfig(
        **sizes,
        latent_mean=_numbers(source, "latents_mean", standard.latent_mean),
        latent_std=_numbers(source, "latents_std", standard.latent_std),
    )


def _agree(source: Source, sizes: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Raises `Mismatch` where settings say something else than the tensors."""
    problems = [
        f"{source.item}, config.json: {name}={value!r:.60}, the tensors have"
        f" {sizes[name]}"
        for name, value in said.items()
        if value is not None and value != sizes[name]
    ]
    if problems:
        raise Mismatch(problems)


def _divided(dim: int, heads: Any) -> int:
    if type(heads) is not int or heads < 1:
        raise Mismatch([f"config.json: num_heads={heads!r:.60}, expected at least 1"])
    return dim // heads


def _product(heads: Any, per_head: Any) -> Any:
    return heads * per_head if type(per_head) is int else per_head


def _whole(settings: Mapping[str, Any], name: str, default: int) -> int:
    value = settings.get(name, default)
    if type(value) is not int or not 1 <= value <= 2**20:
        raise Mismatch([f"config.json: {name}={value!r:.60}, expected at least 1"])
    return value


def _positive(settings: Mapping[str, Any], name: str, default: float) -> float:
    value = settings.get(name, default)
    if type(value) is not float or not 0 < value < 1:
        raise Mismatch([f"config.json: {name}={value!r:.60}, expected from 0 to 1"])
    return value


def _numbers(
    source: Source, name: str, default: tuple[float, ...]
) -> tuple[float, ...]:
    value = source.settings.get(name, default)
    if not isinstance(value, list | tuple) or not all(
        type(one) in (int, float) and math.isfinite(one) for one in value
    ):
        raise Mismatch([f"config.json: {name}={value!r:.60}, expected numbers"])
    return tuple(map(float, value))


def _items(trees: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the trees as the checkpoint's items have them."""
    items = dict(trees)
    adapters = items.pop("lora", None)
    for name in ("generator", "fake_score"):
        if name in items:
            items[name] = {"params": items[name]}
    if adapters is not None:
        items["generator"]["lora"] = adapters
    return items


def _meta(method, found, configs, trees, alpha) -> dict[str, Any]:
    entries = [
        {
            "item": item,
            "layout": source.layout,
            "key": source.key,
            "prefixes": list(source.prefixes),
            "aliases": list(source.aliases),
            "alpha": _alpha(source, alpha) if item == "lora" else None,
            "rank": _rank(source) if item == "lora" else None,
        }
        for item, source in found.items()
    ]
    totals = {
        item: {
            "tensors": len(found[item].arrays),
            "parameters": _parameters(tree),
        }
        for item, tree in trees.items()
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
    """Returns the fields of a config that its weights fix, for JSON."""
    if config is None:
        return None
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in _NOT_SIZES}


def _parameters(tree: Any) -> int:
    leaves: list[Lazy] = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _tokenizer(wan: Any) -> dict[str, pathlib.Path]:
    found = sources.tokenizer_files(wan) if wan else {}
    return {f"tokenizer/{name}": path for name, path in found.items()}
