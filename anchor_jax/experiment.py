"""Old names of `anchor_jax.sampling`, for configs and programs outside the package."""

from anchor_jax.cache import catalog
from anchor_jax.cache.catalog import TEACHER
from anchor_jax.sampling.config import (
    EVEN,
    WAN_NEGATIVE_PROMPT,
    SampleConfig,
    SamplerConfig,
    negative_prompt,
    read_config,
)
from anchor_jax.sampling.methods import METHODS, SAVED, Method, trained_method
from anchor_jax.sampling.resolve import (
    RULES,
    SOLVERS,
    describe_choices,
    load_scripts,
    load_weights,
    make_policy,
    make_setup,
    noise_levels,
    read_scripts,
    resolve,
    setup_key,
)
from anchor_jax.wan.spec import WAN_2_1

ROPES = {name: rope.make for name, rope in catalog.ROPES.items()}
SWITCHES = {name: switch.action for name, switch in catalog.SWITCHES.items()}
told_choices = describe_choices
parse_size = WAN_2_1.parse_size

__all__ = [
    "EVEN",
    "METHODS",
    "ROPES",
    "RULES",
    "SAVED",
    "SOLVERS",
    "SWITCHES",
    "TEACHER",
    "WAN_NEGATIVE_PROMPT",
    "Method",
    "SampleConfig",
    "SamplerConfig",
    "describe_choices",
    "load_scripts",
    "load_weights",
    "make_policy",
    "make_setup",
    "negative_prompt",
    "noise_levels",
    "parse_size",
    "read_config",
    "read_scripts",
    "resolve",
    "setup_key",
    "told_choices",
    "trained_method",
]
