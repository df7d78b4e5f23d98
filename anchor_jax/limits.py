"""Limits of sizes in untrusted files: large enough for networks, yet safe."""

import dataclasses
import math
from typing import Any

from anchor_jax.errors import UserError, shown, suggest

DTYPES = ("float32", "bfloat16", "float16")
"""Allowed number types of weights and activations."""

_LARGEST = {
    "height": 512,
    "width": 512,
    "text_len": 4096,
    "num_layers": 128,
    "num_heads": 1024,
    "unroll": 128,
    "latent_channels": 1024,
    "z_dim": 1024,
    "num_res_blocks": 16,
    "num_buckets": 1024,
    "vocab": 2**20,
    "max_distance": 2**20,
}
_LARGEST_OTHER = 2**16


def check_sizes(name: str, config: Any) -> None:
    """Raises UserError unless every field of a network's config has a valid value.

    Args:
      name: name of the config in messages.
      config: a frozen dataclass, such as `ModelConfig`, `VaeConfig` or `LatentGrid`.
    """
    for field, value in dataclasses.asdict(config).items():
        _check_size(f"{name}.{field}", field, value)


def _check_size(name: str, field: str, value: Any) -> None:
    if field in ("dtype", "param_dtype") and value not in DTYPES:
        raise UserError(f"{name}={shown(value)}{suggest(value, DTYPES, 'types')}")
    if isinstance(value, float) and not 0 < value < math.inf:
        raise UserError(f"{name}={value}: must be above 0")
    largest = _LARGEST.get(field, _LARGEST_OTHER)
    if type(value) is int and not 1 <= value <= largest:
        raise UserError(f"{name}={shown(value)}: must be from 1 to {largest}")
    check = _CHECKS.get(field)
    if check:
        check(name, value)


def _check_patch(name: str, value: tuple) -> None:
    if len(value) != 3 or not _are_whole(value):
        raise UserError(
            f"{name}={shown(value)}: must be three whole numbers from 1 to 64"
        )


def _check_mult(name: str, value: tuple) -> None:
    if len(value) > 8 or not _are_whole(value):
        raise UserError(
            f"{name}={shown(value)}: must be at most 8 whole numbers from 1 to 64"
        )


def _are_whole(values: tuple) -> bool:
    return all(type(one) is int and 1 <= one <= 64 for one in values)


def _check_truths(name: str, value: tuple) -> None:
    if not all(type(one) is bool for one in value):
        raise UserError(f"{name}: each must be true or false")


def _check_mean(name: str, value: tuple) -> None:
    if not all(type(one) in (int, float) and math.isfinite(one) for one in value):
        raise UserError(f"{name}: must be finite numbers")


def _check_std(name: str, value: tuple) -> None:
    _check_mean(name, value)
    if min(value, default=1) <= 0:
        raise UserError(f"{name}: must be finite numbers, and deviations above 0")


_CHECKS = {
    "patch": _check_patch,
    "dim_mult": _check_mult,
    "temporal_downsample": _check_truths,
    "latent_mean": _check_mean,
    "latent_std": _check_std,
}
