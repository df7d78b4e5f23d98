"""The bundle of a training: the one that it began with, its own weights in place."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from anchor_jax import trees
from anchor_jax.config import from_config
from anchor_jax.errors import UserError
from anchor_jax.limits import check_sizes
from anchor_jax.wan import shapes
from anchor_jax.wan.spec import ModelConfig
from anchor_jax.weights import checkpoint
from anchor_jax.weights.bundle import Bundle
from anchor_jax.weights.lineage import run_base, run_folder
from anchor_jax.weights.options import Options
from anchor_jax.weights.tensors import (
    check_tensors,
    damaged_weights,
    expected_lora,
    merge_lora,
)

CRITIC = "critic"
"""Of a training's checkpoint: where `meta` has the sizes of its critic."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What was found of a training.

    Attributes:
      folder: its own, or that of a step in it.
      options: how it was asked for.
      base: name of the weights that it began with.
      item: of the checkpoint, that holds the asked-for network.
      stored: shapes of the item's collections.
    """

    folder: pathlib.Path
    options: Options
    base: str
    item: str
    stored: Mapping[str, Any]

    def base_options(self) -> Options:
        """Returns how the weights that it began with are to be loaded."""
        # A training goes on with the updates that it finds: they hold these.
        lora = "none" if "lora" in self.stored else self.options.lora
        return dataclasses.replace(self.options, network="generator", lora=lora)

    def onto(self, base: Bundle) -> Bundle:
        """Returns the bundle that the training began with, its weights in place."""
        folder, item, options = self.folder, self.item, self.options
        if item == "fake_score":
            base = dataclasses.replace(base, model=_critic_model(folder, base.model))
        base = _with_variables(folder, item, self.stored, base, options)
        if "text" not in self.stored:
            return base

        def load_text():
            return checkpoint.restore(folder, item, base.text.dtype)["text"]

        encoder = options.encoder(base.text, base.tokenizer, load_text)
        return dataclasses.replace(base, encode_prompts=encoder)


def find_trained(folder: pathlib.Path, options: Options) -> Trained:
    """Returns what there is of a training, or raises if that cannot be loaded.

    Of the last checkpoint, or of the step that the folder is. The mean of the
    generator is taken where there is one.
    """
    name = run_base(run_folder(folder))
    if not checkpoint.is_checkpoint(folder):
        raise UserError(_why_not(folder, name))
    present = checkpoint.items(folder)
    item = options.item(present)
    if item == "generator" and "ema" in present:
        item = "ema"
    stored = checkpoint.shapes(folder, item)
    if item == "fake_score" and "lora" in stored:
        raise UserError(
            f"{folder} holds updates of a critic, not the whole of it; begin with the"
            " weights that its own config.critic or config.teacher names, or go on with"
            " that training"
        )
    return Trained(folder, options, name, item, stored)


def _critic_model(folder: pathlib.Path, generator: ModelConfig) -> ModelConfig:
    """Returns the sizes of a distillation's critic, which may be those of a teacher."""
    sizes = checkpoint.read_meta(folder).get(CRITIC, {})
    types = {name: getattr(generator, name) for name in ("dtype", "param_dtype")}
    with damaged_weights(folder):
        whole = dataclasses.asdict(generator) | dict(sizes) | types
        model = from_config(type(generator), whole, f"meta.{CRITIC}")
        check_sizes(f"meta.{CRITIC}", model)
    return model


def _why_not(folder: pathlib.Path, base: str) -> str:
    """Says why there are no weights of a training, or of a step of it."""
    run = run_folder(folder)
    kept = ", ".join(map(str, checkpoint.steps(run)))
    if kept:
        return (
            f"{run} has no checkpoint of step {folder.name}, only of {kept}; trainings"
            " that begin with a step need it later too: keep more with config.keep"
        )
    return (
        f"{folder} is a training without a checkpoint yet; wait for its first, or use"
        f" the weights that it began with: {base}"
    )


def _with_variables(folder, item: str, stored, base: Bundle, options: Options):
    """Returns the bundle with the collections of a training's checkpoint."""
    params = shapes.of(base.model)
    with damaged_weights(folder):
        expected = {"params": params}
        if "lora" in stored:
            expected = {"lora": expected_lora(params, stored["lora"])}
        found = {name: tree for name, tree in stored.items() if name in expected}
        check_tensors(
            folder / item,
            trees.flatten(found),
            trees.flatten(expected),
        )
    dtype = base.model.param_dtype

    def load():
        if "lora" in expected and options.lora == "none":
            return base.load_variables()
        trained = checkpoint.restore(folder, item)
        trained = {name: trained[name] for name in expected}
        if "lora" not in trained:
            return trees.cast(trained, dtype)
        params = base.load_variables()["params"]
        if options.lora == "merged":
            return {"params": merge_lora(params, trained["lora"], dtype)}
        return {"params": params, **trained}

    meta = checkpoint.read_meta(folder)
    training = meta.get("training")
    step = checkpoint.last_step(folder)
    parts = [base.digest, step, training, *([item] if item == "fake_score" else [])]
    digest = json.dumps(parts, sort_keys=True)
    return dataclasses.replace(
        base,
        load_variables=load,
        metadata={**base.metadata, "training": training, "step": step},
        digest=hashlib.sha256(digest.encode()).hexdigest(),
    )
