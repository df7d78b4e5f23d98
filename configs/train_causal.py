"""Causal initialisation of the tiny world's generator: teacher forcing on windows.

    anchor-jax train --config=configs/train_causal.py --config.weights=runs/teacher \
        --config.out=runs/causal
    anchor-jax train --config=configs/train_causal.py:guided --config.out=runs/guided \
        --config.weights=runs/causal --config.teacher=runs/causal

Every noisy block of a window sees clean earlier blocks in the layout of a stream: sink,
junction, local window. With "guided" the network learns its own guided output (first
stage of arXiv:2210.03142), so that self-forcing starts from a generator that follows
prompts in one pass. Expected: runs/causal with checkpoints and log.jsonl; an hour on
one core, and 20 minutes for "guided".
"""

from typing import Literal

from ml_collections import ConfigDict

from anchor_jax.config import to_config
from anchor_jax.training.stages.build import TrainConfig


def get_config(target: Literal["data", "guided"] = "data") -> ConfigDict:
    """Returns the config for the flow of the data, or for the network's guided flow."""
    config = to_config(TrainConfig())
    config.stage = "regression"
    config.weights = "runs/teacher"
    config.steps, config.batch = 2400, 16
    config.regression.forcing = "teacher"
    config.regression.blocks = 5
    config.regression.shift = 3.0
    config.data.kind = "world_windows"
    config.data.size = 6144
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.betas = (0.9, 0.99)
    config.optimizer.clip = 1.0
    config.optimizer.warmup = 50
    config.optimizer.decay = 0.4
    config.ema.decay, config.ema.start, config.ema.warm = 0.998, 0, True
    config.out = "runs/causal"
    if target == "guided":
        config.weights = config.teacher = "runs/causal"
        config.regression.guidance = 2.5
        config.steps, config.optimizer.learning_rate = 600, 5e-4
        config.data.dropout = 0.0
        config.seed = config.data.seed = 4
        config.samples.steps, config.samples.guidance = 4, 1.0
        config.out = "runs/guided"
    return config
