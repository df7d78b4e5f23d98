"""Trajectories of a bidirectional teacher, for ODE regression.

    anchor-jax trajectories --config=configs/trajectories.py \
        --config.weights=runs/teacher --config.out=data/trajectories

The teacher takes 48 Euler steps at shift 5 with guidance. The states at noise levels 1,
0.9375, 0.8333 and 0.625 and the clean state are stored as float16. Prompts are those of
the tiny world; with `trajectories.py:paper`, for Wan2.1 in float32, those of
`data.path`. `anchor_jax.training.ode.TrajectoryConfig` explains the fields.
"""

from typing import Literal

from ml_collections import ConfigDict

from anchor_jax.config import to_config
from anchor_jax.sampling.config import WAN_NEGATIVE_PROMPT
from anchor_jax.training.ode import TrajectoryConfig


def get_config(scale: Literal["tiny", "paper"] = "tiny") -> ConfigDict:
    """Returns the config of the tiny world, or with scale "paper" that of the paper."""
    config = to_config(TrajectoryConfig())
    config.guidance = 2.5
    if scale == "paper":
        config.guidance = TrajectoryConfig.guidance
        config.data.kind, config.dtype = "prompts", "float32"
        config.negative_prompt = WAN_NEGATIVE_PROMPT
        # No fused kernel supports float32, and the scores of all heads exceed every
        # chip's memory.
        config.attention = "heads"
    return config
