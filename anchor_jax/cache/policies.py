"""Public names of the cache policies: the parts, `Policy`, and `POLICIES` by name."""

from anchor_jax.cache.actions import (
    Flush,
    Keep,
    Recache,
    RecachePass,
    Restart,
    SwitchAction,
)
from anchor_jax.cache.catalog import POLICIES
from anchor_jax.cache.junctions import (
    Junction,
    PeriodicJunction,
    ReleaseJunction,
    TrainedJunction,
)
from anchor_jax.cache.policy import (
    Policy,
    as_released,
    as_trained,
    single_prompt,
    whole_clip,
)
from anchor_jax.cache.types import EMPTY

Rerun = RecachePass
"""Older name of `RecachePass`."""

__all__ = [
    "EMPTY",
    "POLICIES",
    "Flush",
    "Junction",
    "Keep",
    "PeriodicJunction",
    "Policy",
    "Recache",
    "ReleaseJunction",
    "RecachePass",
    "Rerun",
    "Restart",
    "SwitchAction",
    "TrainedJunction",
    "as_released",
    "as_trained",
    "single_prompt",
    "whole_clip",
]
