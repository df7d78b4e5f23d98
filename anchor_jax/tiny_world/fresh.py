"""Random tiny weights, from which a training of the tiny world can start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from anchor_jax import places
from anchor_jax.io import scratch_folder
from anchor_jax.tiny_world import clips as world_clips
from anchor_jax.tiny_world import data as world_data
from anchor_jax.tiny_world.words import train_tokenizer
from anchor_jax.wan import dit
from anchor_jax.wan.spec import TINY
from anchor_jax.wan.text import Umt5Encoder
from anchor_jax.weights.single_file import TINY_TEXT, save_bundle


def init_params(seed: int):
    """Returns fresh transformer and text encoder; residual gates start near 1."""
    generator_key, text_key = jax.random.split(jax.random.key(seed))
    generator = jax.jit(functools.partial(dit.init_params, TINY))(generator_key)
    generator["blocks"]["modulation"] += jnp.zeros((6, 1)).at[jnp.array([2, 5])].set(1)
    ids = jnp.zeros((1, TINY_TEXT.text_len), jnp.int32)
    text = jax.jit(Umt5Encoder(TINY_TEXT).init)(text_key, ids, jnp.ones_like(ids))
    return jax.tree.map(np.asarray, {"generator": generator, "text": text["params"]})


def save_fresh(folder: places.Place, seed: int, data_seed: int) -> None:
    """Writes a bundle of random networks unless it exists.

    Args:
      folder: folder of the bundle.
      seed: seed of the networks.
      data_seed: seed of the clips that the codec is fitted to.
    """
    if places.exists(folder / "model.safetensors"):
        return
    with scratch_folder() as scratch:
        words = train_tokenizer(world_clips.captions(), scratch)
    codec = world_data.fit_codec(data_seed, TINY.latent_channels)
    save_bundle({**init_params(seed), "codec": codec}, words, folder, {})
