"""Causal initialisation by ODE regression: a teacher's endpoints from its noisy states.

    anchor-jax trajectories --config=configs/trajectories.py \
        --config.weights=runs/teacher21 --config.out=data/trajectories
    anchor-jax train --config=configs/train_ode.py --config.weights=runs/teacher21 \
        --config.data.path=data/trajectories --config.out=runs/causal

Each block of a clip has one of the stored noise levels and sees itself and the blocks
before it. Expected: runs/causal with checkpoints and log.jsonl.
"""

from ml_collections import ConfigDict

from anchor_jax.config import to_config
from anchor_jax.training.build import TrainConfig


def get_config() -> ConfigDict:
    """Returns the config."""
    config = to_config(TrainConfig())
    config.stage = "regression"
    config.weights = "runs/teacher21"
    config.steps, config.batch = 3000, 64
    config.regression.forcing, config.regression.endpoints = "noise", True
    config.data.kind, config.data.path = "trajectories", "data/trajectories"
    config.optimizer.learning_rate = 2e-6
    config.optimizer.betas = (0.9, 0.999)
    config.ema.decay = 0.0
    config.out = "runs/causal"
    return config
