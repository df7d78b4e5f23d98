"""Self-forcing distillation on 21 latent frames: many steps become four.

    anchor-jax train --config=configs/train_dmd.py --config.out=runs/dmd \
        --config.weights=runs/causal --config.teacher=runs/teacher

Expected: runs/dmd with checkpoints, log.jsonl and TensorBoard events. Every step makes
a clip with the generator and moves the critic; every fifth moves the generator.
`anchor_jax.training.build.TrainConfig` explains the fields.
"""

from ml_collections import ConfigDict

from anchor_jax.config import to_config
from anchor_jax.training.build import TrainConfig


def get_config() -> ConfigDict:
    """Returns the config."""
    config = to_config(TrainConfig())
    config.distillation.policy = "longlive"  # window 12, sink 3, no junction yet
    config.out = "runs/dmd"
    return config
