"""Loads weights by name from every kind of storage.

Orbax takes long to import, so it is imported only for checkpoints.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from anchor_jax import finite, io, places, remote
from anchor_jax.wan.spec import LatentGrid
from anchor_jax.weights.bundle import Bundle
from anchor_jax.weights.lineage import run_folder
from anchor_jax.weights.options import LoadOptions
from anchor_jax.weights.single_file import load_saved


def load_bundle(
    weights: str,
    *,
    grid: LatentGrid | str | None = None,
    dtype: str | None = None,
    text_encoder: str = "device",
    mesh: Mesh | None = None,
    lora: str = "separate",
    param_dtype: str | None = None,
    network: str = "generator",
) -> Bundle:
    """Returns the bundle `tiny`, a saved bundle, or one of ported or trained weights.

    Args:
      weights: `tiny`, the path that `save_bundle` wrote to, the folder of a
        checkpoint with ported weights, or the folder of a training. `FOLDER/400` is the
        checkpoint of a training's step 400; `FOLDER` is the last one.
      grid: latent size of the videos, or their `HEIGHTxWIDTH` in pixels. Default: the
        stored size, or for ported weights the default of their family.
      dtype: type of weights and activations. Default: the stored type, or bfloat16 for
        ported weights.
      text_encoder: "device" keeps it on the device, "free" only while there are new
        prompts, and "sharded" splits it over all devices.
      mesh: mesh that the generator is split over. None uses the default device.
      lora: "separate" keeps low-rank updates beside their weights, "merged" adds them
        to the weights, and "none" leaves them out.
      param_dtype: type of the generator's weights, if it differs from that of
        activations.
      network: "generator", or "critic" to load the critic of the same training or
        checkpoint in the generator's place. Without a critic, "critic" loads the
        generator.

    Raises:
      UserError: A file is missing or damaged, its tensors do not fit its stated sizes,
        or an argument is not one of its choices.
    """
    options = LoadOptions(grid, dtype, text_encoder, mesh, lora, param_dtype, network)
    return _load(weights, options)


def _load(weights: str, options: LoadOptions) -> Bundle:
    folder = io.place(weights)
    if places.is_remote(folder):
        remote.check(folder)
    if weights != "tiny" and run_folder(folder) is not None:
        from anchor_jax.weights.trained import find_trained

        trained = find_trained(folder, options)
        base = _load(trained.base, trained.base_options())
        return _watched(weights, trained.onto(base))
    if weights != "tiny" and _is_checkpoint(folder):
        from anchor_jax.weights.ported import load_ported

        return _watched(weights, load_ported(folder, options))
    return _watched(weights, load_saved(weights, options))


def _watched(weights: str, bundle: Bundle) -> Bundle:
    """Returns the bundle, which then refuses to load weights that are not finite."""

    def watched(network: str, load: Callable[[], Any]) -> Callable[[], Any]:
        def checked():
            tree = load()
            finite.check(tree, f"weights={weights!r}, {network}", _remedy(weights))
            return tree

        return checked

    encoder = bundle.encode_prompts
    return dataclasses.replace(
        bundle,
        encode_prompts=dataclasses.replace(
            encoder, load=watched("text encoder", encoder.load)
        ),
        load_variables=watched("generator", bundle.load_variables),
        load_codec=watched("codec", bundle.load_codec),
    )


def _remedy(weights: str) -> str:
    """Returns the remedy for weights that are not finite."""
    run = run_folder(io.place(weights))
    if run is None:
        return "use an undamaged copy; float16 cannot hold values above 65504"
    from anchor_jax.weights import checkpoint

    kept = ", ".join(str(run / str(step)) for step in checkpoint.steps(run))
    return f"the training diverged; use an earlier checkpoint: {kept or 'none exists'}"


def _is_checkpoint(folder: io.Place) -> bool:
    if not places.is_dir(folder) or places.exists(folder / "model.safetensors"):
        return False
    from anchor_jax.weights import checkpoint

    return checkpoint.is_checkpoint(folder)
