"""The bundle of a training: its initial bundle with the trained weights."""

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
from anchor_jax.weights.options import LoadOptions
from anchor_jax.weights.tensors import (
    check_tensors,
    damaged_weights,
    expected_lora,
    merge_lora,
)

CRITIC = "critic"
"""Key of the critic's sizes in the `meta` of a training's checkpoint."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """The files of a training that are loaded.

    Attributes:
      folder: folder of the training, or of a step in it.
      options: the requested options.
      base: name of its initial weights.
      item: item of the checkpoint that holds the requested network.
      stored: shapes of the item's collections.
    """

    folder: pathlib.Path
    options: LoadOptions
    base: str
    item: str
    stored: Mapping[str, Any]

    def base_options(self) -> LoadOptions:
        """Returns the options for loading its initial weights."""
        # A training continues existing updates, so its own updates contain them.
        lora = "none" if "lora" in self.stored else self.options.lora
        return dataclasses.replace(self.options, network="generator", lora=lora)

    def onto(self, base: Bundle) -> Bundle:
        """Returns the training's initial bundle with the trained weights."""
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


def find_trained(folder: pathlib.Path, options: LoadOptions) -> Trained:
    """Returns the files of a training. Raises UserError if they cannot be loaded.

    The files are those of the last checkpoint, or of the folder's step. The running
    mean of the generator is preferred.
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
            f"{folder} holds only updates of a critic; start from the"
            " weights that its own config.critic or config.teacher names, or resume"
            " that training"
        )
    return Trained(folder, options, name, item, stored)


def _critic_model(folder: pathlib.Path, generator: ModelConfig) -> ModelConfig:
    """Returns the sizes of a distillation's critic, which may be a teacher's."""
    sizes = checkpoint.read_meta(folder).get(CRITIC, {})
    types = {name: getattr(generator, name) for name in ("dtype", "param_dtype")}
    with damaged_weights(folder):
        whole = dataclasses.asdict(generator) | dict(sizes) | types
        model = from_config(type(generator), whole, f"meta.{CRITIC}")
        check_sizes(f"meta.{CRITIC}", model)
    return model


def _why_not(folder: pathlib.Path, base: str) -> str:
    """Returns the reason why a training or a step has no weights."""
    run = run_folder(folder)
    kept = ", ".join(map(str, checkpoint.steps(run)))
    if kept:
        return (
            f"{run} has no checkpoint of step {folder.name}, only of {kept}; a training"
            " that starts from a step also needs it later: retain more with"
            " config.keep"
        )
    return (
        f"{folder} is a training that has no checkpoint yet; wait for its first, or use"
        f" its initial weights: {base}"
    )


def _with_variables(folder, item: str, stored, base: Bundle, options: LoadOptions):
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
