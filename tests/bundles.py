"""A tiny random bundle on disk, for the tests that load one."""

import functools
import tempfile

import jax
import numpy as np
import tiny

from anchor_jax.tiny_world.codec import BLOCK_VALUES
from anchor_jax.tiny_world.words import train_tokenizer
from anchor_jax.wan import shapes
from anchor_jax.wan.text import TextConfig
from anchor_jax.weights.bundle import Bundle
from anchor_jax.weights.load import load_bundle
from anchor_jax.weights.single_file import save_bundle

TEXT = TextConfig(
    vocab=32,
    dim=8,
    attention_dim=8,
    ffn_dim=16,
    num_heads=2,
    num_layers=1,
    text_len=6,
    dtype="float32",
)
RED, BLUE, GREEN = "a red ring", "a blue square moves up", "a green ring stays still"


@functools.cache
def words() -> bytes:
    return train_tokenizer([RED, BLUE, GREEN])


@functools.cache
def params():
    """Returns the parameters of a bundle, filled by numpy."""
    rng = np.random.default_rng(5)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    decode = 0.2 * normal(tiny.MODEL.latent_channels, BLOCK_VALUES)
    return {
        "generator": jax.tree.map(np.asarray, tiny.params()),
        "text": jax.tree.map(lambda x: normal(*x.shape), shapes.of(TEXT)),
        "codec": {
            "mean": np.zeros(BLOCK_VALUES, np.float32),
            "encode": np.linalg.pinv(decode).astype(np.float32),
            "decode": decode,
        },
    }


def save(path, tree=None, **sizes):
    """Writes the bundle, or another tree or sizes, to a path."""
    sizes = {"model": tiny.MODEL, "text": TEXT, "grid": tiny.GRID} | sizes
    save_bundle(tree or params(), words(), path, {"note": "random"}, **sizes)


@functools.cache
def load() -> Bundle:
    """Returns the bundle as loaded from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return load_bundle(folder)
