"""Streaming long tuning: chunks of sequences with a prompt switch, on LoRA updates.

    anchor-jax train --config=configs/train_streaming.py --config.out=runs/streaming \
        --config.weights=runs/dmd --config.teacher=runs/teacher

Expected: runs/streaming with checkpoints, log.jsonl and TensorBoard events. Sequences
of 240 latent frames go on over the steps, in chunks of 21 and then 18 new frames.
`anchor_jax.training.build.TrainConfig` explains the fields.
"""

from ml_collections import ConfigDict

from anchor_jax.config import to_config
from anchor_jax.training.build import TrainConfig


def get_config() -> ConfigDict:
    """Returns the config."""
    config = to_config(TrainConfig())
    config.steps = 3000
    config.lora.rank = 256
    config.optimizer.learning_rate = 1e-5
    config.critic_optimizer.learning_rate = 2e-6
    config.ema.decay = 0.0  # the published training has none with LoRA
    config.distillation.policy = "anchor_forcing"
    config.distillation.length = 240
    config.distillation.switches = tuple(range(21, 202, 18))
    config.out = "runs/streaming"
    return config
