"""Published layouts with every name and small sizes, written without our tables."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from torch_files import write_torch

KINDS = ("wan", "wan_sharded", "diffusers", "generator", "lora", "peft")
PREFIX = "model._fsdp_wrapped_module."


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the networks; the VAE has the stages of Wan2.1 in small widths."""

    dim: int = 16
    ffn: int = 24
    layers: int = 3
    freq: int = 8
    latent: int = 16
    text: int = 10
    rank: int = 2
    vocab: int = 11
    text_ffn: int = 14
    text_heads: int = 2
    text_layers: int = 2
    vae: int = 2


SMALL = Sizes()


def write_layout(folder, kind, sizes=SMALL, dtype=ml_dtypes.bfloat16, seed=0):
    """Writes a layout and returns its file or folder, and its arrays by network."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    style = "diffusers" if kind == "diffusers" else "wan"
    arrays = {
        "generator": draw(dit_names(sizes, style), dtype, seed),
        "text_encoder": draw(text_names(sizes, style), dtype, seed + 1),
        "vae": draw(vae_names(sizes, style), dtype, seed + 2),
        "lora": draw(lora_names(sizes), dtype, seed + 3),
    }
    if kind in ("wan", "wan_sharded", "diffusers"):
        del arrays["lora"]
        write = _write_diffusers if kind == "diffusers" else _write_wan
        write(folder, arrays, sizes, sharded=kind == "wan_sharded")
        return folder, arrays
    return _write_parts(folder, kind, arrays, sizes)


def _write_parts(folder, kind, arrays, sizes):
    if kind == "generator":
        path = folder / "base.pt"
        wrapped = {PREFIX + name: part for name, part in arrays["generator"].items()}
        other = draw({PREFIX + "x.weight": (2, 2)}, np.float32, 9)
        write_torch(path, {"generator": wrapped, "critic": other, "step": 7})
        _write_json(folder / "config.json", {"num_heads": 2})
        return path, {"generator": arrays["generator"]}
    found = {"lora": arrays["lora"]}
    if kind == "lora":
        path = folder / "final.pt"
        write_torch(path, {"generator_lora": arrays["lora"], "step": 3})
        return path, found
    path = folder / "adapter_model.safetensors"
    save_file(arrays["lora"], path)
    _write_json(
        folder / "adapter_config.json", {"lora_alpha": 2 * sizes.rank, "r": sizes.rank}
    )
    return path, found


def _write_wan(folder, arrays, sizes, sharded):
    _write_safetensors(
        folder, "diffusion_pytorch_model", arrays["generator"], 3 if sharded else 1
    )
    _write_json(
        folder / "config.json",
        {
            "_class_name": "WanModel",
            "dim": sizes.dim,
            "eps": 1e-6,
            "ffn_dim": sizes.ffn,
            "freq_dim": sizes.freq,
            "in_dim": sizes.latent,
            "model_type": "t2v",
            "num_heads": 2,
            "num_layers": sizes.layers,
            "out_dim": sizes.latent,
            "text_len": 32,
        },
    )
    write_torch(folder / "models_t5_umt5-xxl-enc-bf16.pth", arrays["text_encoder"])
    write_torch(folder / "Wan2.1_VAE.pth", arrays["vae"])
    _write_tokenizer(folder / "google" / "umt5-xxl")


def _write_diffusers(folder, arrays, sizes, sharded):
    del sharded
    for name in ("transformer", "vae", "text_encoder"):
        (folder / name).mkdir()
    stem = "diffusion_pytorch_model"
    _write_safetensors(folder / "transformer", stem, arrays["generator"], 2)
    _write_safetensors(folder / "vae", stem, arrays["vae"], 1)
    _write_safetensors(folder / "text_encoder", "model", arrays["text_encoder"], 2)
    _write_json(
        folder / "transformer" / "config.json",
        {
            "_class_name": "WanTransformer3DModel",
            "attention_head_dim": sizes.dim // 2,
            "eps": 1e-6,
            "ffn_dim": sizes.ffn,
            "freq_dim": sizes.freq,
            "in_channels": sizes.latent,
            "num_attention_heads": 2,
            "num_layers": sizes.layers,
            "patch_size": [1, 2, 2],
            "text_dim": sizes.text,
        },
    )
    _write_json(
        folder / "vae" / "config.json",
        {"base_dim": sizes.vae, "z_dim": sizes.latent, "dim_mult": [1, 2, 4, 4]},
    )
    _write_json(
        folder / "text_encoder" / "config.json",
        {"vocab_size": sizes.vocab, "d_model": sizes.text, "d_ff": sizes.text_ffn},
    )
    _write_tokenizer(folder / "tokenizer")


def _write_safetensors(folder, stem, arrays, shards):
    if shards == 1:
        save_file(arrays, folder / f"{stem}.safetensors")
        return
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = dict(list(arrays.items())[shard::shards])
        save_file(own, folder / file)
        weight_map |= dict.fromkeys(own, file)
    _write_json(
        folder / f"{stem}.safetensors.index.json",
        {"metadata": {}, "weight_map": weight_map},
    )


def _write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_tokenizer(folder):
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(b"pieces")
    _write_json(folder / "tokenizer.json", tokenizer_json(["\u2581", "\u2581a"]))


def tokenizer_json(pieces, byte_fallback=False):
    """Returns a tokenizer of T5's kind with the given pieces, as `tokenizer.json`."""
    special = ["<pad>", "</s>", "<unk>"]
    vocab = [[piece, 0.0] for piece in special]
    vocab += [[piece, -2.0 - 0.001 * n] for n, piece in enumerate(pieces)]
    space = {"replacement": "\u2581", "prepend_scheme": "always", "split": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": n, "content": piece, **flags, "special": True}
            for n, piece in enumerate(special)
        ],
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "WhitespaceSplit"},
                {"type": "Metaspace", **space},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                "</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]},
            },
        },
        "decoder": {"type": "Metaspace", **space},
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": vocab,
            "byte_fallback": byte_fallback,
        },
    }


def draw(names, dtype, seed):
    """Returns normal arrays of the shapes."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in names.items()
    }


_DIT = {
    "text1": ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    "text2": ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    "time1": ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    "time2": ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    "project": ("time_projection.1", "condition_embedder.time_proj"),
    "out": ("head.head", "proj_out"),
    "head_table": ("head.modulation", "scale_shift_table"),
    "table": ("modulation", "scale_shift_table"),
    "norm": ("norm3", "norm2"),
    "ffn1": ("ffn.0", "ffn.net.0.proj"),
    "ffn2": ("ffn.2", "ffn.net.2"),
    "self": ("self_attn", "attn1"),
    "cross": ("cross_attn", "attn2"),
    "q": ("q", "to_q"),
    "k": ("k", "to_k"),
    "v": ("v", "to_v"),
    "o": ("o", "to_out.0"),
}


def dit_names(sizes, style="wan"):
    """Returns names and shapes of a transformer, in either style."""
    word = {name: pair[style == "diffusers"] for name, pair in _DIT.items()}
    dim, names = sizes.dim, {}

    def linear(name, fan_in, out):
        names[name + ".weight"], names[name + ".bias"] = (out, fan_in), (out,)

    names["patch_embedding.weight"] = (dim, sizes.latent, 1, 2, 2)
    names["patch_embedding.bias"] = (dim,)
    linear(word["text1"], sizes.text, dim)
    linear(word["text2"], dim, dim)
    linear(word["time1"], sizes.freq, dim)
    linear(word["time2"], dim, dim)
    linear(word["project"], dim, 6 * dim)
    names[word["head_table"]] = (1, 2, dim)
    linear(word["out"], dim, 4 * sizes.latent)
    for layer in range(sizes.layers):
        block = f"blocks.{layer}."
        names[block + word["table"]] = (1, 6, dim)
        names[f"{block}{word['norm']}.weight"] = (dim,)
        names[f"{block}{word['norm']}.bias"] = (dim,)
        for attention in ("self", "cross"):
            for part in "qkvo":
                linear(f"{block}{word[attention]}.{word[part]}", dim, dim)
            for part in "qk":
                names[f"{block}{word[attention]}.norm_{part}.weight"] = (dim,)
        linear(block + word["ffn1"], dim, sizes.ffn)
        linear(block + word["ffn2"], sizes.ffn, dim)
    return names


def lora_names(sizes):
    """Returns names and shapes of adapters, in the style of PEFT."""
    dim, rank, names = sizes.dim, sizes.rank, {}
    modules = {f"{a}_attn.{p}": (dim, dim) for a in ("self", "cross") for p in "qkvo"}
    modules |= {"ffn.0": (dim, sizes.ffn), "ffn.2": (sizes.ffn, dim)}
    for layer in range(sizes.layers):
        for module, (fan_in, out) in modules.items():
            name = f"base_model.model.blocks.{layer}.{module}"
            names[name + ".lora_A.weight"] = (rank, fan_in)
            names[name + ".lora_B.weight"] = (out, rank)
    return names


def text_names(sizes, style="wan"):
    """Returns names and shapes of a text encoder, in either style."""
    dim, wide = sizes.text, sizes.text_ffn
    inner = {part: (dim, dim) for part in "qkvo"}
    official = style == "wan"
    if official:
        names = {"token_embedding.weight": (sizes.vocab, dim), "norm.weight": (dim,)}
    else:
        names = {"shared.weight": (sizes.vocab, dim)}
        names["encoder.final_layer_norm.weight"] = (dim,)
    for layer in range(sizes.text_layers):
        start = f"blocks.{layer}." if official else f"encoder.block.{layer}.layer."
        attention = start + ("attn." if official else "0.SelfAttention.")
        bias, norms, feed = (
            ("pos_embedding.embedding", ("norm1", "norm2"), _FEED[0])
            if official
            else (
                "0.SelfAttention.relative_attention_bias",
                ("0.layer_norm", "1.layer_norm"),
                _FEED[1],
            )
        )
        names |= {f"{attention}{part}.weight": shape for part, shape in inner.items()}
        names |= {f"{start}{norm}.weight": (dim,) for norm in norms}
        names[f"{start}{bias}.weight"] = (32, sizes.text_heads)
        gate, up, down = (f"{start}{name}.weight" for name in feed)
        names |= {gate: (wide, dim), up: (wide, dim), down: (dim, wide)}
    return names


_FEED = (
    ("ffn.gate.0", "ffn.fc1", "ffn.fc2"),
    *[tuple(f"1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo"))],
)


def vae_names(sizes, style="wan"):
    """Returns names and shapes of a VAE with the stages of Wan2.1, in either style."""
    names = {}
    _Vae(names, style == "wan").write(sizes.vae, sizes.latent)
    return names


@dataclasses.dataclass(frozen=True)
class _Vae:
    names: dict
    official: bool

    def conv(self, name, fan_in, out, kernel=(3, 3, 3)):
        self.names[name + ".weight"] = (out, fan_in, *kernel)
        self.names[name + ".bias"] = (out,)

    def residual(self, name, fan_in, out):
        words = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")
        if self.official:
            words = [f"residual.{at}" for at in (0, 2, 3, 6)] + ["shortcut"]
        norm1, conv1, norm2, conv2, shortcut = (f"{name}.{word}" for word in words)
        self.names[norm1 + ".gamma"] = (fan_in, 1, 1, 1)
        self.conv(conv1, fan_in, out)
        self.names[norm2 + ".gamma"] = (out, 1, 1, 1)
        self.conv(conv2, out, out)
        if fan_in != out:
            self.conv(shortcut, fan_in, out, (1, 1, 1))

    def middle(self, half, wide):
        words = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
        if self.official:
            words = ("middle.0", "middle.1", "middle.2")
        first, attention, second = (f"{half}.{word}" for word in words)
        self.residual(first, wide, wide)
        self.names[attention + ".norm.gamma"] = (wide, 1, 1)
        self.conv(attention + ".to_qkv", wide, 3 * wide, (1, 1))
        self.conv(attention + ".proj", wide, wide, (1, 1))
        self.residual(second, wide, wide)

    def ends(self, half, first, last):
        words = ("conv_in", "norm_out", "conv_out")
        if self.official:
            words = ("conv1", "head.0", "head.2")
        start, norm, end = (f"{half}.{word}" for word in words)
        self.conv(start, *first)
        self.names[norm + ".gamma"] = (last[0], 1, 1, 1)
        self.conv(end, *last)

    def encoder(self, base, latent):
        self.ends("encoder", (3, base), (4 * base, 2 * latent))
        self.middle("encoder", 4 * base)
        stages = ("downsamples" if self.official else "down_blocks", 0, base)
        word, at, wide = stages
        for level, mult in enumerate((1, 2, 4, 4)):
            for _ in range(2):
                self.residual(f"encoder.{word}.{at}", wide, mult * base)
                at, wide = at + 1, mult * base
            if level < 3:
                name = f"encoder.{word}.{at}"
                self.conv(name + ".resample.1", wide, wide, (3, 3))
                if level > 0:
                    self.conv(name + ".time_conv", wide, wide, (3, 1, 1))
                at += 1

    def decoder(self, base, latent):
        self.ends("decoder", (latent, 4 * base), (base, 3))
        self.middle("decoder", 4 * base)
        wide = 4 * base
        for level, mult in enumerate((4, 4, 2, 1)):
            for block in range(3):
                name = f"decoder.up_blocks.{level}.resnets.{block}"
                if self.official:
                    name = f"decoder.upsamples.{4 * level + block}"
                self.residual(name, wide, mult * base)
                wide = mult * base
            if level < 3:
                name = f"decoder.up_blocks.{level}.upsamplers.0"
                if self.official:
                    name = f"decoder.upsamples.{4 * level + 3}"
                self.conv(name + ".resample.1", wide, wide // 2, (3, 3))
                if level < 2:
                    self.conv(name + ".time_conv", wide, 2 * wide, (3, 1, 1))
                wide //= 2

    def write(self, base, latent):
        before, after = ("quant_conv", "post_quant_conv")
        if self.official:
            before, after = "conv1", "conv2"
        self.conv(before, 2 * latent, 2 * latent, (1, 1, 1))
        self.conv(after, latent, latent, (1, 1, 1))
        self.encoder(base, latent)
        self.decoder(base, latent)
