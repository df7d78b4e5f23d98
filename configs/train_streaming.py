"""Streaming long tuning: chunks of sequences with a prompt switch, on LoRA updates.

    anchor-jax train --config=configs/train_streaming.py --config.out=runs/streaming \
        --config.weights=runs/dmd --config.teacher=runs/teacher \
        --config.data.path=prompts.txt --config.data.switch_path=switched.txt

With `train_streaming.py:tiny` it trains the tiny world's model in about 20 minutes on
one core, with shorter sequences and without LoRA.

Expected: runs/streaming with checkpoints, log.jsonl and TensorBoard events. Sequences
of 240 latent frames extend over many steps, in chunks of 21 and then 18 new frames.
`anchor_jax/training/stages/build.py` explains the fields.
"""

from typing import Literal

from ml_collections import ConfigDict

from anchor_jax.config import to_config
from anchor_jax.sampling.config import WAN_NEGATIVE_PROMPT
from anchor_jax.training.stages.build import TrainConfig


def get_config(scale: Literal["paper", "tiny"] = "paper") -> ConfigDict:
    """Returns the config of the paper, or with scale "tiny" that of the tiny world."""
    config = to_config(TrainConfig())
    config.distillation.policy = "anchor_forcing"
    config.out = "runs/streaming"
    if scale == "tiny":
        config.weights, config.teacher = "runs/dmd", "runs/teacher"
        config.steps, config.batch = 400, 16
        config.distillation.guidance = 1.5
        config.distillation.length = 93
        config.distillation.switches = (21, 39)
        config.optimizer.learning_rate, config.optimizer.warmup = 5e-5, 20
        config.critic_optimizer.learning_rate = 3e-4
        config.ema.decay, config.ema.start, config.ema.warm = 0.98, 0, True
        return config
    config.data.kind = "prompts"
    # Stored activations would not fit into the memory of any chip.
    config.remat = "nothing_saveable"
    config.distillation.negative_prompt = WAN_NEGATIVE_PROMPT
    config.steps = 3000
    config.lora.rank = 256
    config.optimizer.learning_rate = 1e-5
    config.critic_optimizer.learning_rate = 2e-6
    config.ema.decay = 0.0  # the published training with LoRA has no running mean
    config.distillation.length = 240
    config.distillation.switches = tuple(range(21, 202, 18))
    return config
