"""Recorded passes of the networks: transformer, adapters, VAE and text encoder."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
from einops import rearrange
from flax import traverse_util

from anchor_jax.porting import key_tables
from anchor_jax.porting.convert import KeyRule, convert, convert_lora, fill
from anchor_jax.verify.case import Case, CaseError, Checks
from anchor_jax.wan import lora, shapes, text, vae
from anchor_jax.wan.attention import (
    Spans,
    bidirectional,
    block_causal,
    teacher_forcing,
)
from anchor_jax.wan.dit import WanDit
from anchor_jax.wan.layers import Dense
from anchor_jax.wan.spec import WAN_2_1, LatentGrid, ModelConfig

CLOSE = 1e-4  # absolute: latents, flows and intermediates of the transformer
NEAR = 5e-5  # relative: text encoder and VAE
_MANY = 4096


def model_config(case: Case, *section: str) -> ModelConfig:
    """Returns the sizes of a transformer named in `model` (or another section)."""
    at = section or ("model",)
    read = functools.partial(case.size, *at)
    if read("in_dim") != read("out_dim"):
        raise CaseError("config.json: model.in_dim and model.out_dim must be equal")
    for flag in ("qk_norm", "cross_attn_norm"):
        if case.setting(*at, flag, default=True) is not True:
            raise CaseError(f"config.json: model.{flag} can only be true")
    try:
        return ModelConfig(
            dim=read("dim"),
            ffn_dim=read("ffn_dim"),
            num_heads=read("num_heads"),
            num_layers=read("num_layers", high=_MANY),
            freq_dim=read("freq_dim"),
            text_dim=read("text_dim"),
            text_len=read("text_len"),
            latent_channels=read("in_dim"),
            patch=case.sizes(*at, "patch_size", low=1, high=64, default=WAN_2_1.patch),
            eps=case.number(*at, "eps", default=1e-6),
            dtype=case.dtype,
        )
    except CaseError:
        raise
    except (IndexError, ValueError) as error:
        raise CaseError(f"config.json: {error}") from error


def dit_params(case: Case, config: ModelConfig, prefix: str = ""):
    """Returns the transformer's parameters; every official name is accounted for."""
    return convert(case.weights(prefix), dit_table(config), shapes.of(config))


def dit_table(config: ModelConfig) -> tuple[KeyRule, ...]:
    """Returns the transformer's table for a model of any patch."""
    sizes = tuple(zip("thw", config.patch, strict=True))
    return tuple(
        dataclasses.replace(rule, sizes=sizes) if rule.sizes else rule
        for rule in key_tables.DIT
    )


def text_rows(case: Case, config: ModelConfig) -> np.ndarray:
    """Returns the prompts [batch, text_len, text_dim], short ones padded with zeros."""
    if "context" in case.inputs:
        prompts = list(case.inputs["context"])
    else:
        count = sum(bool(re.fullmatch(r"context\.\d+", name)) for name in case.inputs)
        prompts = [case.inputs[f"context.{index}"] for index in range(max(count, 1))]
    rows = np.zeros((len(prompts), config.text_len, config.text_dim), np.float32)
    for row, prompt in zip(rows, prompts, strict=True):
        if prompt.ndim != 2 or prompt.shape[1] != config.text_dim:
            raise CaseError(f"inputs: a context has shape {prompt.shape}")
        if len(prompt) > config.text_len:
            raise CaseError(
                f"inputs: a context has {len(prompt)} rows, more than text_len"
            )
        row[: len(prompt)] = prompt
    return rows


def video(array: np.ndarray, name: str, channels: int) -> np.ndarray:
    """Returns [B, F, H, W, C] of a recorded [B, C, F, H, W]."""
    if array.ndim != 5 or array.shape[1] != channels or not array.size:
        raise CaseError(
            f"inputs: {name} has shape {array.shape}, expected"
            f" [batch, {channels}, frame, height, width]"
        )
    return rearrange(array, "b c f h w -> b f h w c")


@functools.partial(jax.jit, static_argnames="config")
def run_dit(variables, latents, timestep, text, position, spans: Spans, *, config):
    """Returns the flow and the transformer's intermediates, in one compiled program."""

    def both(module, latents, timestep, text, position):
        context = module.project(text)
        return module(latents, timestep, context, spans, position)[0]

    flow, other = WanDit(config).apply(
        variables,
        latents,
        timestep,
        text,
        position,
        method=both,
        mutable=["intermediates"],
    )
    return flow, other["intermediates"]


@dataclasses.dataclass(frozen=True)
class _Pass:
    """The inputs of a whole-sequence pass; `clean` frames precede the noisy ones."""

    latents: np.ndarray
    timestep: np.ndarray
    position: np.ndarray
    spans: Spans
    clean: int = 0

    def run(self, variables, rows: np.ndarray, config: ModelConfig):
        """Returns the flow of the noisy frames, as recorded, and intermediates."""
        if len(rows) != len(self.latents):
            raise CaseError(
                f"inputs: {len(rows)} contexts for a batch of {len(self.latents)}"
            )
        LatentGrid(*self.latents.shape[2:4]).tokens(config.patch)
        flow, inner = run_dit(
            variables,
            self.latents,
            self.timestep.astype(np.float32),
            rows,
            self.position.astype(np.int32),
            self.spans,
            config=config,
        )
        flow = np.asarray(flow)[:, self.clean :]
        return rearrange(flow, "b f h w c -> b c f h w"), inner


def verify_dit_bidirectional(case: Case, checks: Checks) -> None:
    """Compares a pass of the bidirectional transformer with its intermediates."""
    config = model_config(case)
    latents = video(case.inputs["x"], "x", config.latent_channels)
    batch, frames = latents.shape[:2]
    time = _timesteps(case, "t", (batch,))
    given = _Pass(
        latents=latents,
        timestep=np.repeat(time[:, None], frames, axis=1),
        position=np.arange(frames),
        spans=bidirectional(frames),
    )
    variables = {"params": dit_params(case, config)}
    flow, inner = given.run(variables, text_rows(case, config), config)
    checks.compare("flow", flow, absolute=CLOSE)
    inner = _named_inner(inner)
    for name in ("time_embedding", "time_projection"):
        inner[name] = inner[name][:, :1]
    _compare_inner(checks, inner, config)


def verify_dit_causal(case: Case, checks: Checks) -> None:
    """Compares a block-causal or teacher-forced training pass, and its mask."""
    config = model_config(case)
    given = causal_pass(case, config)
    variables = {"params": dit_params(case, config)}
    flow, inner = given.run(variables, text_rows(case, config), config)
    checks.compare("flow", flow, absolute=CLOSE)
    inner = _named_inner(inner)
    for name in ("time_embedding", "time_projection", "head"):
        inner[name] = inner[name][:, given.clean :]
    _compare_inner(checks, inner, config)
    if "mask" in checks.outputs:
        rows, columns = LatentGrid(*given.latents.shape[2:4]).tokens(config.patch)
        mask = dense_mask(given.spans, rows * columns, checks.outputs["mask"])
        checks.equal("mask", mask, checks.outputs["mask"].astype(bool))


def causal_pass(case: Case, config: ModelConfig) -> _Pass:
    """Returns the causal pass that a case describes."""
    latents = video(case.inputs["x"], "x", config.latent_channels)
    batch, frames = latents.shape[:2]
    time = _timesteps(case, "t", (batch, frames))
    blocks = block_sizes(case, frames)
    position = np.arange(frames)
    if not case.is_set("teacher_forcing"):
        return _Pass(latents, time, position, _causal_spans(case, blocks, frames))
    if sum(blocks) != frames:
        raise CaseError(f"config.json: {frames} frames do not divide into blocks")
    clean = video(case.inputs["clean_x"], "clean_x", config.latent_channels)
    if clean.shape != latents.shape:
        raise CaseError(f"inputs: clean_x {clean.shape} and x {latents.shape} differ")
    clean_time = np.zeros_like(time)
    if case.is_set("aug_t") or "aug_t" in case.inputs:
        clean_time = _timesteps(case, "aug_t", (batch, frames))
    return _Pass(
        latents=np.concatenate([clean, latents], axis=1),
        timestep=np.concatenate([clean_time, time], axis=1),
        position=np.concatenate([position, position]),
        spans=teacher_forcing(blocks),
        clean=frames,
    )


def block_sizes(case: Case, frames: int) -> tuple[int, ...]:
    """Returns the blocks that cover the frames; the last may reach past them."""
    size = case.size("num_frame_per_block", default=1)
    first = (1,) if case.is_set("independent_first_frame") else ()
    return (*first, *[size] * math.ceil((frames - len(first)) / size))


def _causal_spans(case: Case, blocks: tuple[int, ...], frames: int) -> Spans:
    """Returns the block-causal spans, cut to the existing frames."""
    window = case.setting("model", "local_attn_size", default=-1)
    if window != -1:
        window = case.size("model", "local_attn_size")
    whole = block_causal(blocks, None if window == -1 else window).spans
    return Spans(
        tuple(
            (first, min(end, frames), tuple((a, min(b, frames)) for a, b in keys))
            for first, end, keys in whole
        )
    )


def dense_mask(spans: Spans, tokens: int, like: np.ndarray) -> np.ndarray:
    """Returns the mask of visible key tokens, [query, key]."""
    frames = spans.spans[-1][1]
    if like.shape != (frames * tokens, frames * tokens):
        raise CaseError(f"outputs: mask has shape {like.shape}")
    mask = np.zeros(like.shape, bool)
    for first, end, keys in spans.spans:
        for start, stop in keys:
            mask[first * tokens : end * tokens, start * tokens : stop * tokens] = True
    return mask


def _timesteps(case: Case, name: str, shape: tuple[int, ...]) -> np.ndarray:
    time = case.inputs[name]
    if time.shape != shape:
        raise CaseError(f"inputs: {name} has shape {time.shape}, expected {shape}")
    if not ((time >= 0) & (time <= 1000)).all():
        raise CaseError(f"inputs: {name} must lie from 0 to 1000")
    return time.astype(np.float32)


def _named_inner(inner) -> dict[str, np.ndarray]:
    """Returns the intermediates under their recorded names.

    A sown name cannot be that of a layer, so some of ours end in `_out`.
    """
    named = {
        ours.removesuffix("_out"): np.asarray(value[0])
        for ours, value in inner.items()
        if ours != "blocks"
    }
    for part, value in inner["blocks"].items():
        for layer, array in enumerate(np.asarray(value[0])):
            named[f"block.{layer}.{part.removesuffix('_out')}"] = array
    return named


def _compare_inner(checks: Checks, inner: dict, config: ModelConfig) -> None:
    """Compares the recorded intermediates, and requires those of every case."""
    demanded = {"head", "text_embedding", "time_embedding", "time_projection"}
    demanded |= {f"block.{layer}.out" for layer in range(config.num_layers)}
    for name in sorted(demanded | (set(checks.outputs) & set(inner))):
        ours, theirs = inner[name], checks.outputs.get(name)
        checks.compare(name, _merged(ours, theirs), absolute=CLOSE)


def _merged(ours: np.ndarray, theirs: np.ndarray | None) -> np.ndarray:
    """Returns `ours` with leading axes merged as recorded, if possible."""
    if theirs is None or not theirs.size or ours.size != theirs.size:
        return ours
    return ours.reshape(theirs.shape) if ours.shape[-1] == theirs.shape[-1] else ours


def verify_lora(case: Case, checks: Checks) -> None:
    """Compares a model with adapters beside the weights, merged, and without."""
    config = model_config(case)
    params = dit_params(case, config, "base.")
    alpha = case.number("alpha")
    adapters = convert_lora(case.weights("lora."), key_tables.LORA, alpha)
    given, rows = causal_pass(case, config), text_rows(case, config)
    _check_rank(adapters, case.size("rank"))

    def flow(**variables):
        return given.run(variables, rows, config)[0]

    merged = lora.merge(params, adapters)
    checks.compare("flow_adapter", flow(params=params, lora=adapters), absolute=CLOSE)
    checks.compare("flow_merged", flow(params=merged), absolute=CLOSE)
    checks.compare("flow_lora_B_zero", flow(params=params), absolute=CLOSE)
    probes = case.setting("probe", default=[])
    if not isinstance(probes, list):
        raise CaseError("config.json: probe must be a list")
    recorded = [name.split(".", 1)[1] for name in checks.outputs if "." in name]
    for probe in sorted({*map(str, probes), *recorded}):
        _compare_layer(case, checks, probe, (params, adapters, merged))


def _check_rank(adapters, rank: int) -> None:
    for path, leaf in traverse_util.flatten_dict(adapters).items():
        held = leaf.shape[-1] if path[-1] == "a" else leaf.shape[-2]
        if held != rank:
            raise CaseError(f"an adapter has rank {held}, config.json says {rank}")


def _compare_layer(case: Case, checks: Checks, module: str, trees) -> None:
    """Compares one adapted linear layer, alone and merged."""
    names = f"linear.{module}", f"merged_weight.{module}"
    if not set(names) & set(checks.outputs) and module not in case.config["probe"]:
        return
    params, adapters, merged = (_layer(tree, module) for tree in trees)
    wide, features = params["kernel"].shape
    x = case.inputs["linear_in"]
    if x.ndim != 2 or x.shape[1] < wide:
        raise CaseError(f"inputs: linear_in {x.shape} is narrower than {module}")
    layer = Dense(features, "float32", "float32")
    variables = {"params": params, "lora": adapters}
    checks.compare(names[0], layer.apply(variables, x[:, :wide]), absolute=CLOSE)
    checks.compare(names[1], merged["kernel"].T, absolute=CLOSE)


def _layer(tree, module: str) -> dict[str, np.ndarray]:
    """Returns the arrays of one official linear layer in one of our trees."""
    for rule in key_tables.DIT:
        fields = rule.match_source(f"{module}.weight")
        if fields is not None and rule.target.endswith("/kernel") and rule.is_stacked:
            number = int(fields.pop("layer"))
            for part in fill(rule.target, fields).split("/")[:-1]:
                tree = tree.get(part, {})
            if any(number >= len(array) for array in tree.values()):
                break
            return {name: array[number] for name, array in tree.items()}
    raise CaseError(f"{short_name(module)} names no linear layer of the transformer")


def short_name(name: str) -> str:
    """Returns a name shortened for a message."""
    return ascii(name)[:80]


def verify_umt5(case: Case, checks: Checks) -> None:
    """Compares the text encoder, its layers, and the buckets of distances."""
    config = _text_config(case)
    ids, mask = _token_ids(case, config)
    params = convert(case.weights(), key_tables.UMT5, shapes.of(config))
    output, inner = _run_text(params, ids, mask, config=config)
    checks.compare("prompt_embeds", output, relative=NEAR)
    checks.compare("encoder", inner["encoded"][0], relative=NEAR)
    checks.compare("token_embedding", inner["embedded"][0], relative=NEAR)
    for layer in range(config.num_layers):
        for recorded, ours in (("pos_bias", "bias"), ("block", "output")):
            value = inner["blocks"][ours][0][layer]
            checks.compare(f"{recorded}.{layer}", value, relative=NEAR)
    if "bucket_probe" in case.config or "relative_buckets" in checks.outputs:
        far = case.size("bucket_probe", high=100_000)
        distance = np.arange(-far, far + 1)
        ours = text.relative_bucket(distance, config.num_buckets, config.max_distance)
        checks.equal("relative_buckets", ours)


@functools.partial(jax.jit, static_argnames="config")
def _run_text(params, ids, mask, *, config):
    encoder = text.Umt5Encoder(config)
    output, other = encoder.apply(
        {"params": params}, ids, mask, mutable=["intermediates"]
    )
    return output, other["intermediates"]


def _text_config(case: Case) -> text.TextConfig:
    read = functools.partial(case.size, "model")
    if case.is_set("model", "shared_pos"):
        raise CaseError("config.json: model.shared_pos can only be false")
    return text.TextConfig(
        vocab=read("vocab"),
        dim=read("dim"),
        attention_dim=read("dim_attn"),
        ffn_dim=read("dim_ffn"),
        num_heads=read("num_heads"),
        num_layers=read("num_layers", high=_MANY),
        num_buckets=read("num_buckets", low=4),
        max_distance=read("max_distance", default=128),
        dtype=case.dtype,
    )


def _token_ids(case: Case, config: text.TextConfig) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = case.inputs["ids"], case.inputs["mask"]
    if ids.ndim != 2 or ids.shape != mask.shape or ids.dtype.kind not in "iu":
        raise CaseError(f"inputs: ids {ids.shape} and mask {mask.shape}")
    if not ids.size or ids.min() < 0 or ids.max() >= config.vocab:
        raise CaseError(f"inputs: ids must lie from 0 to {config.vocab - 1}")
    return ids.astype(np.int32), mask.astype(np.int32)


def verify_vae(case: Case, checks: Checks) -> None:
    """Compares encoding, decoding whole and in pieces, and the state of a stream."""
    config = _vae_config(case, checks)
    run = functools.partial(_run_vae, vae_params(case, config), config=config)
    movie = video(case.inputs["video"], "video", 3)
    for name, part in (("", movie), ("_single_frame", movie[:, :1])):
        (latents, mean), _ = run(part, None, method="encode")
        checks.compare(f"encoded{name}", _first(latents), relative=NEAR)
        if not name:
            checks.compare("encoded_raw_mu", _first(mean), relative=NEAR)
    latent = video(case.inputs["latent"], "latent", config.z_dim)
    (pixels, _), _ = run(latent, None, method="decode")
    checks.compare("decoded", _first(pixels), relative=NEAR)
    _compare_stream(case, checks, latent, run)
    if any(name.startswith("decode.first_latent.") for name in checks.outputs):
        _compare_first_latent(checks, run(latent[:, :1], None, method="decode")[1])


@functools.partial(jax.jit, static_argnames=("method", "config"))
def _run_vae(params, x, state, *, method: str, config: vae.VaeConfig):
    """Returns two results of one method, and the decoder's intermediates."""

    def encode(module, x, state):
        del state
        return module.encode(x), module.encode_mean(_whole(x, config))[0]

    def decode(module, x, state):
        return module.decode_raw(x, state)

    chosen = {"encode": encode, "decode": decode}[method]
    result, other = vae.WanVae(config).apply(
        {"params": params}, x, state, method=chosen, mutable=["intermediates"]
    )
    return result, other.get("intermediates", {}).get("decoder", {})


def _whole(x: jax.Array, config: vae.VaeConfig) -> jax.Array:
    stride = config.temporal_stride
    return x[:, : 1 + (x.shape[1] - 1) // stride * stride]


def _first(x: jax.Array) -> np.ndarray:
    return rearrange(np.asarray(x), "b f h w c -> b c f h w")


def _vae_config(case: Case, checks: Checks) -> vae.VaeConfig:
    """Returns the VAE's sizes; 16 channels need the published mean and deviation."""
    names = ("latent_mean", "latent_std")
    scale = {name: np.ravel(case.inputs[name]) for name in names}
    if case.size("model", "z_dim") == WAN_2_1.latent_channels:
        ours = WAN_2_1.latent_mean, WAN_2_1.latent_std
        for name, value in zip(names, ours, strict=True):
            checks.compare(name, np.float32(value), scale[name], absolute=1e-6)
    scale = {name: tuple(map(float, value)) for name, value in scale.items()}
    return dataclasses.replace(vae_sizes(case, "model"), **scale)


def vae_sizes(case: Case, section: str) -> vae.VaeConfig:
    """Returns the VAE that a section of the config names."""
    flags = case.setting(section, "temperal_downsample")
    if not isinstance(flags, list) or not all(isinstance(x, bool) for x in flags):
        raise CaseError(f"config.json: {section}.temperal_downsample must list flags")
    if case.setting(section, "attn_scales", default=[]) != []:
        raise CaseError(f"config.json: {section}.attn_scales can only be empty")
    return vae.VaeConfig(
        base_dim=case.size(section, "dim"),
        z_dim=case.size(section, "z_dim"),
        dim_mult=case.sizes(section, "dim_mult", low=1, high=64),
        num_res_blocks=case.size(section, "num_res_blocks", high=64),
        temporal_downsample=tuple(flags),
        dtype=case.dtype,
    )


def vae_params(case: Case, config: vae.VaeConfig, prefix: str = ""):
    """Returns the VAE's parameters; every official name is accounted for."""
    return convert(case.weights(prefix), key_tables.VAE, shapes.of(config))


def _compare_stream(case: Case, checks: Checks, latent: np.ndarray, run) -> None:
    """Compares a decode in pieces, and the layers' states at its end."""
    pieces = case.setting("stream_blocks", default=[])
    state, reached = None, 0
    for number in range(len(pieces)):
        first, end = _piece(case, number)
        if first != reached or not first < end <= latent.shape[1]:
            raise CaseError(f"config.json: stream_blocks[{number}] is {first}..{end}")
        (pixels, state), _ = run(latent[:, first:end], state, method="decode")
        checks.compare(f"stream.{first}_{end}", _first(pixels), relative=NEAR)
        reached = end
    kept = kept_frames(state) if state is not None else []
    asked = case.sizes("cache_slots", default=[])
    found = [re.fullmatch(r"stream\.feat_cache\.(\d+)", x) for x in checks.outputs]
    for slot in sorted({*asked, *(int(match[1]) for match in found if match)}):
        name = f"stream.feat_cache.{slot}"
        if slot >= len(kept):
            raise CaseError(f"{name}: the decoder has {len(kept)} causal convolutions")
        ours, theirs = _first(kept[slot]), checks.outputs.get(name)
        # Our states start with frames of zeros; the recording may have fewer at first.
        if theirs is not None and theirs.ndim == 5 and 0 < theirs.shape[2] < 2:
            ours = ours[:, :, -theirs.shape[2] :]
        checks.compare(name, ours, relative=NEAR)


def _piece(case: Case, number: int) -> tuple[int, int]:
    piece = case.setting("stream_blocks")[number]
    section = Case(case.folder, {"stream_blocks": piece}, case.inputs, case.outputs)
    bounds = section.sizes("stream_blocks")
    if len(bounds) != 2:
        raise CaseError("config.json: stream_blocks must list pairs")
    return bounds


def kept_frames(state: vae.VaeState) -> list[jax.Array]:
    """Returns the states of the decoder's causal convolutions, in their order."""
    leaves = traverse_util.flatten_dict(state.past)
    stages = ("conv1", "middle", "upsamples", "head")

    def order(path: tuple[str, ...]):
        stage, _, at = path[0].partition("_")
        return stages.index(stage), int(at or 0), path[1:]

    return [leaves[path] for path in sorted(leaves, key=order)]


def _compare_first_latent(checks: Checks, inner) -> None:
    """Compares the recorded layers of the decoder on the first latent frame."""
    for name in checks.outputs:
        found = re.fullmatch(
            r"decode\.first_latent\.(conv1|middle|upsample)(?:\.(\d+))?", name
        )
        if not found:
            continue
        layer = {"conv1": "conv1", "middle": "middle_2"}.get(
            found[1], f"upsamples_{found[2]}"
        )
        if layer not in inner:
            raise CaseError(f"{name} names no layer of the decoder")
        checks.compare(name, _first(inner[layer]["output"][0]), relative=NEAR)
