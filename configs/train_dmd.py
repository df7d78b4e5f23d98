"""Self-forcing distillation on 21 latent frames: many steps become four.

    anchor-jax train --config=configs/train_dmd.py --config.out=runs/dmd \
        --config.weights=runs/causal --config.teacher=runs/teacher \
        --config.data.path=prompts.txt

With `train_dmd.py:tiny` it trains the tiny world's model, in about a quarter of an hour
on one core.

Expected: runs/dmd with checkpoints, log.jsonl and TensorBoard events. Every step makes
a clip with the generator and updates the critic; every fifth step also updates the
generator. `anchor_jax/training/stages/build.py` explains the fields.
"""

from typing import Literal

from ml_collections import ConfigDict

from anchor_jax.config import to_config
from anchor_jax.sampling.config import WAN_NEGATIVE_PROMPT
from anchor_jax.training.stages.build import TrainConfig


def get_config(scale: Literal["paper", "tiny"] = "paper") -> ConfigDict:
    """Returns the config of the paper, or with scale "tiny" that of the tiny world."""
    config = to_config(TrainConfig())
    config.distillation.policy = "longlive"  # window 12, sink 3, no junction yet
    config.out = "runs/dmd"
    if scale == "tiny":
        config.weights, config.teacher = "runs/guided", "runs/teacher"
        config.steps, config.batch = 400, 16
        config.distillation.guidance = 1.5
        config.optimizer.learning_rate, config.optimizer.warmup = 1e-4, 20
        config.critic_optimizer.learning_rate = 3e-4
        config.ema.decay, config.ema.start, config.ema.warm = 0.98, 0, True
        return config
    config.data.kind = "prompts"
    # Stored activations would not fit into the memory of any chip.
    config.remat = "nothing_saveable"
    config.distillation.negative_prompt = WAN_NEGATIVE_PROMPT
    return config
