"""Parameters of the networks as shapes, without making any array."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from anchor_jax.wan import dit
from anchor_jax.wan.spec import ModelConfig
from anchor_jax.wan.text import TextConfig, Umt5Encoder
from anchor_jax.wan.vae import VaeConfig, WanVae

Shapes = dict[str, Any]
"""A tree of parameters whose leaves are `jax.ShapeDtypeStruct`."""


def of(config: ModelConfig | TextConfig | VaeConfig) -> Shapes:
    """Returns the parameters of a transformer, a text encoder or a VAE.

    The tree is the caller's own. Each config is traced once.

    Raises:
      TypeError: The config is not that of a known network.
    """
    return jax.tree.map(lambda leaf: leaf, _traced(config))


@functools.cache
def _traced(config: ModelConfig | TextConfig | VaeConfig) -> Shapes:
    # It may be called while another program is traced; its mesh and tracers must not
    # leak in.
    kind = next((kind for kind in _INITS if isinstance(config, kind)), None)
    if kind is None:
        names = ", ".join(kind.__name__ for kind in _INITS)
        raise TypeError(f"config is a {type(config).__name__}; expected one of {names}")
    init = _INITS[kind]
    made = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    # A mesh that may be set now must not apply.
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made)


def _generator(config: ModelConfig, key: jax.Array) -> Shapes:
    return dit.init_params(config, key)


def _text_encoder(config: TextConfig, key: jax.Array) -> Shapes:
    ids = jnp.zeros((1, config.text_len), jnp.int32)
    return Umt5Encoder(config).init(key, ids, ids)["params"]


def _vae(config: VaeConfig, key: jax.Array) -> Shapes:
    _, height, width = config.strides
    pixels = jnp.zeros((1, 1, height, width, 3), config.dtype)
    return WanVae(config).init(key, pixels)["params"]


_INITS = {ModelConfig: _generator, TextConfig: _text_encoder, VaeConfig: _vae}
