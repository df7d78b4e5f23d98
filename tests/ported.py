"""Tiny random weights as the port writes them, for the tests that sample from them."""

import dataclasses
import functools

import bundles
import jax
import numpy as np
import tiny

from anchor_jax.wan import lora, shapes
from anchor_jax.wan.vae import VaeConfig
from anchor_jax.weights import checkpoint

MODEL = dataclasses.replace(tiny.MODEL, dim=32, ffn_dim=32, latent_channels=16)
VAE = VaeConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1)
SMALL_VAE = VaeConfig(
    base_dim=8, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)
)
NOT_SIZES = ("dtype", "param_dtype", "remat", "unroll")


def save(folder, method: str, critic: bool = False) -> None:
    """Writes a checkpoint of weights that were ported as a method."""
    items = draw_items()
    if critic:
        items = items | {"fake_score": {"params": _draw(shapes.of(MODEL), 5)}}
    write(folder, items, method)


def write(folder, items, method: str = "", vae: VaeConfig = VAE) -> None:
    """Writes a checkpoint of the items, as if they were ported as a method."""
    files = [{"name": "generator.pt", "bytes": 5, "sha256": "0a" * 32}]
    source = {"item": "generator", "key": "generator", "alpha": None, "files": files}
    meta = {
        "method": method,
        "model": _sizes(MODEL),
        "text": _sizes(bundles.TEXT),
        "vae": _sizes(vae),
        "sources": [source],
    }
    tokenizer = {"tokenizer/spiece.model": bundles.words()}
    checkpoint.write(folder, items, meta, tokenizer)


@functools.cache
def draw_items(vae: VaeConfig = VAE):
    """Returns the networks of a checkpoint, filled by numpy."""
    key = jax.random.key(0)
    params = shapes.of(MODEL)
    adapters = jax.eval_shape(lambda tree: lora.init(tree, 3, key), params)
    return {
        "generator": {"params": _draw(params, 1), "lora": _draw(adapters, 2)},
        "text_encoder": _draw(shapes.of(bundles.TEXT), 3),
        "vae": _draw(shapes.of(vae), 4),
    }


def _draw(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), tree
    )


def _sizes(config):
    fields = dataclasses.asdict(config)
    return {name: fields[name] for name in fields if name not in NOT_SIZES}
