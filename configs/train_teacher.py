"""The tiny world's bidirectional teacher: flow matching on clips, text trained along.

    anchor-jax train --config=configs/train_teacher.py --config.out=runs/teacher6
    anchor-jax train --config=configs/train_teacher.py:21 --config.out=runs/teacher21 \
        --config.weights=runs/teacher6

The argument is the clip's length in latent frames: short clips first, then the 21 that
distillation scores. Expected: runs/teacher21 with checkpoints and log.jsonl; about an
hour on one core for the first stage, two for the second.
"""

from ml_collections import ConfigDict

from anchor_jax.config import to_config
from anchor_jax.training.build import TrainConfig


def get_config(frames: str = "6") -> ConfigDict:
    """Returns the config for clips of so many latent frames."""
    if not frames.isdecimal() or not int(frames) or int(frames) % 3:
        raise ValueError(f"{frames!r}: expected a multiple of 3, such as 6 or 21")
    config = to_config(TrainConfig())
    config.stage = "regression"
    config.weights = "fresh"
    config.steps, config.batch = (2000, 32) if frames == "6" else (5400, 16)
    config.regression.blocks = int(frames) // config.regression.block
    config.regression.shift = 3.0
    config.regression.text = True
    config.data.kind = "world_clips"
    config.data.size = 6144
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3 if frames == "6" else 1.5e-3
    config.optimizer.betas = (0.9, 0.99)
    config.optimizer.clip = 1.0
    config.optimizer.warmup = 100
    config.optimizer.decay = 0.4
    config.ema.decay, config.ema.start, config.ema.warm = 0.998, 0, True
    config.out = f"runs/teacher{frames}"
    return config
