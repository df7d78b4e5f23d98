"""A medium-sized stream on random weights, to measure any machine.

    anchor-jax bench --config=configs/bench_medium.py --threads=1 --out=bench.json

Float32, eight layers of 512 channels, 30 latent frames of 16 x 26 with a switch in the
middle. It takes about two minutes on one core.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from anchor_jax.wan.spec import ModelConfig
from anchor_jax.wan.text import TextConfig
from anchor_jax.wan.vae import VaeConfig


def get_config() -> ConfigDict:
    """Returns the config."""
    config = ConfigDict()
    config.model = ConfigDict(
        dataclasses.asdict(
            ModelConfig(
                dim=512,
                ffn_dim=2048,
                num_heads=8,
                num_layers=8,
                text_dim=512,
                dtype="float32",
            )
        )
    )
    config.text = ConfigDict(
        dataclasses.asdict(
            TextConfig(
                vocab=1024,
                dim=512,
                attention_dim=512,
                ffn_dim=1280,
                num_heads=8,
                num_layers=4,
                dtype="float32",
            )
        )
    )
    config.vae = ConfigDict(dataclasses.asdict(VaeConfig(base_dim=16, dtype="float32")))
    config.height = 16  # latent rows, pixels / 8
    config.width = 26
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
    config.frames = 30
    config.switch_frame = 15
    config.repeats = 3
    return config
