"""Wan2.1 1.3B at 480 x 832 on random weights in bfloat16, for an accelerator.

    anchor-jax bench --config=configs/bench_full.py --out=bench.json
    anchor-jax bench --config=configs/bench_full.py --config.text.num_layers=1

The first command needs about 24 GB with the text encoder's 24 layers, the second 13 GB.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from anchor_jax.errors import UserError, suggest
from anchor_jax.wan.spec import GRIDS, WAN_1_3B, WAN_2_1
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.vae import VaeConfig


def get_config(size: str = WAN_2_1.size) -> ConfigDict:
    """Returns the config for one of the sizes in pixels."""
    if size not in GRIDS:
        raise UserError(
            f"unknown size {size!r} after the colon{suggest(size, GRIDS, 'sizes')}"
        )
    config = ConfigDict()
    model = dataclasses.replace(WAN_1_3B, param_dtype="bfloat16")
    config.model = ConfigDict(dataclasses.asdict(model))
    config.text = ConfigDict(dataclasses.asdict(TextConfig(param_dtype="bfloat16")))
    config.vae = ConfigDict(dataclasses.asdict(VaeConfig(param_dtype="bfloat16")))
    config.height = GRIDS[size].height
    config.width = GRIDS[size].width
    config.policy = "anchor_forcing"
    config.rules = "paper"
    config.rope = placeholder(str)
    config.on_switch = placeholder(str)
    config.window = placeholder(int)
    config.sink = placeholder(int)
    config.block = placeholder(int)
    config.attention = "auto"  # or a kernel by name: plain runs on any machine
    config.steps = (1000, 750, 500, 250)
    config.shift = 5.0
    config.guidance = 1.0
    config.frames = 60
    config.switch_frame = 30
    config.repeats = 3
    return config
