"""Causal initialisation by ODE regression: a teacher's endpoints from its noisy states.

    anchor-jax trajectories --config=configs/trajectories.py \
        --config.weights=runs/teacher --config.out=data/trajectories
    anchor-jax train --config=configs/train_ode.py:tiny --config.out=runs/causal_ode \
        --config.weights=runs/teacher --config.data.path=data/trajectories

Each block of a clip has one of the stored noise levels and sees itself and the blocks
before it. Without `:tiny` the values are those for Wan2.1. Expected: the folder of
config.out with checkpoints and log.jsonl, and weights that sample in four steps.
"""

from typing import Literal

from ml_collections import ConfigDict

from anchor_jax.config import to_config
from anchor_jax.training.stages.build import TrainConfig


def get_config(scale: Literal["paper", "tiny"] = "paper") -> ConfigDict:
    """Returns the config of the paper, or with scale "tiny" that of the tiny world."""
    config = to_config(TrainConfig())
    config.stage = "regression"
    config.weights = "runs/teacher"
    config.steps, config.batch = 3000, 64
    config.regression.forcing, config.regression.endpoints = "noise", True
    config.data.kind, config.data.path = "trajectories", "data/trajectories"
    config.optimizer.learning_rate = 2e-6
    config.optimizer.betas = (0.9, 0.999)
    config.ema.decay = 0.0
    config.out = "runs/causal_ode"
    if scale == "tiny":
        config.steps, config.batch = 1200, 16
        config.optimizer.name = "muon"
        config.optimizer.learning_rate = 5e-4
        config.optimizer.betas = (0.9, 0.99)
        config.optimizer.clip = 1.0
        config.optimizer.warmup = 50
        config.optimizer.decay = 0.4
        config.ema.decay, config.ema.start, config.ema.warm = 0.998, 0, True
        return config
    # Stored activations would not fit into the memory of any chip.
    config.remat = "nothing_saveable"
    return config
