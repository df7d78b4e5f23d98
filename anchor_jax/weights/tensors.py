"""The tensors of weights of given sizes, and their low-rank updates."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from anchor_jax import trees
from anchor_jax.errors import UserError, damaged, shown, some
from anchor_jax.wan import lora, shapes
from anchor_jax.wan.spec import ModelConfig
from anchor_jax.wan.text import TextConfig
from anchor_jax.weights import codecs
from anchor_jax.weights.codecs import StoredCodec

damaged_weights = functools.partial(
    damaged,
    remedy="copy it again, or write it again",
    fault="is not a usable bundle",
    wraps=True,
)
"""Turns errors in weights into one message that names their place."""


def expected_tensors(
    model: ModelConfig, text: TextConfig, codec: StoredCodec | None
) -> dict[str, Any]:
    """Returns the shape and type of every tensor by name, without creating any."""
    tree = {
        "generator": shapes.of(model),
        "text": shapes.of(text),
        "codec": codecs.parameters(codec, model.latent_channels) if codec else {},
    }
    return trees.flatten(tree)


def expected_lora(params, stored) -> dict[str, Any]:
    """Returns the shapes of updates of the stored rank, for layers that have them."""
    flat = traverse_util.flatten_dict(stored)
    ranks = {leaf.shape[-1] for path, leaf in flat.items() if path[-1] == "a"}
    if len(ranks) != 1:
        raise UserError(
            f"lora: the updates have the ranks {sorted(ranks)}, but must have one"
        )
    init = functools.partial(lora.init, rank=ranks.pop(), rng=jax.random.key(0))
    every = traverse_util.flatten_dict(jax.eval_shape(init, params))
    changed = {path[:-1] for path in flat}
    return traverse_util.unflatten_dict(
        {path: leaf for path, leaf in every.items() if path[:-1] in changed}
    )


def check_tensors(path, stored: Mapping[str, Any], expected: Mapping[str, Any]):
    """Raises UserError unless the tensors are the expected ones, with their shapes."""
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
            f"{path}: the tensors do not fit its sizes: {'; '.join(some(wrong))};"
            " save the weights together with their sizes"
        )


def check_vocab(path: pathlib.Path, tokenizer, text: TextConfig) -> None:
    """Raises UserError unless the text encoder has every id of the tokenizer."""
    if tokenizer.vocab > text.vocab:
        raise UserError(
            f"{path} has {tokenizer.vocab} pieces, more than the"
            f" {text.vocab} of the text encoder; use two files that were saved together"
        )


def merge_lora(params, adapters, dtype: str):
    """Returns the parameters plus their low-rank updates, by kind of layer."""
    leaves, updates = map(traverse_util.flatten_dict, (params, adapters))
    del params, adapters
    for path in list(leaves):
        names = [(*path[:-1], name) for name in ("a", "b")]
        one = {path[-1]: leaves.pop(path)}
        if path[-1] == "kernel" and names[0] in updates:
            update = {name[-1]: updates.pop(name) for name in names}
            one = lora.merge(*trees.cast((one, update), jnp.float32))
        leaves[path] = one[path[-1]].astype(dtype)
    return traverse_util.unflatten_dict(leaves)
