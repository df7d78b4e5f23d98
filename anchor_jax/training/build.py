"""The name of `stages.build` in configs that were copied from earlier versions."""

from anchor_jax.training.stages.build import TrainConfig

__all__ = ["TrainConfig"]
