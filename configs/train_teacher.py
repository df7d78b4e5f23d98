"""The tiny world's bidirectional teacher: flow matching on clips.

    anchor-jax train --config=configs/train_teacher.py --config.out=runs/teacher6
    anchor-jax train --config=configs/train_teacher.py:21 --config.out=runs/teacher21 \
        --config.weights=runs/teacher6
    anchor-jax train --config=configs/train_teacher.py:more --config.out=runs/teacher \
        --config.weights=runs/teacher21

The argument is the clip's length in latent frames: first short clips, then the 21
frames that distillation scores. "more" continues with new clips at a lower rate.
Expected: runs/teacher with checkpoints and log.jsonl; on two cores about a quarter of
an hour for the first and the last stage, and an hour for the second.
"""

from ml_collections import ConfigDict

from anchor_jax.config import to_config
from anchor_jax.errors import UserError
from anchor_jax.training.stages.build import TrainConfig


def get_config(frames: str = "6") -> ConfigDict:
    """Returns the config for clips of `frames` latent frames, or of the last stage."""
    if frames == "more":
        return _more(get_config("21"))
    if not frames.isdecimal() or not int(frames) or int(frames) % 3:
        raise UserError(
            f"{frames!r} after the colon: must be 6, 21 or another multiple of 3 latent"
            " frames, or more (the last stage)"
        )
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


def _more(config: ConfigDict) -> ConfigDict:
    """Returns the config of the last stage: other clips, and a lower learning rate."""
    config.weights = "runs/teacher21"
    config.steps = 1800
    config.seed = config.data.seed = 1
    config.optimizer.learning_rate, config.optimizer.decay = 1e-3, 0.6
    config.out = "runs/teacher"
    return config
