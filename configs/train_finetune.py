"""Fine-tunes a bidirectional teacher such as Wan2.1 on your own videos, with LoRA.

    anchor-jax train --config=configs/train_finetune.py --config.out=runs/mine \
        --config.weights=weights/wan --config.data.path=videos/list.jsonl

The list has a line {"video": "NAME.mp4", "caption": "TEXT"} for each video, which is
beside the list or in a folder below it. The first 81 frames at 16 frames per second are
used, scaled and cropped to `config.size`; shorter videos are refused. Videos are
encoded once, into runs/mine/data.

Expected: runs/mine with checkpoints and log.jsonl. Sample from it with

    anchor-jax sample --config=configs/interactive.py --config.weights=runs/mine \
        --config.prompt="PROMPT[5s]"
"""

from ml_collections import ConfigDict

from anchor_jax.config import to_config
from anchor_jax.training.stages.build import TrainConfig


def get_config() -> ConfigDict:
    """Returns the config."""
    config = to_config(TrainConfig())
    config.stage = "regression"
    config.weights = "weights/wan"
    config.steps, config.batch = 1000, 8
    config.remat = "nothing_saveable"
    config.lora.rank = 32
    config.data.kind = "videos"
    config.data.path = "videos/list.jsonl"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.betas = (0.9, 0.999)
    config.optimizer.clip = 1.0
    config.optimizer.warmup = 50
    config.ema.decay = 0.0
    config.out = "runs/finetune"
    return config
