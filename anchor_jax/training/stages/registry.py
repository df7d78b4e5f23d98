"""The stages of training, by the name that a config gives as `stage`.

A stage is added here and nowhere else: `TrainConfig` has a section for each one. The
modules are imported only when a stage is looked up, because sampling reads this table
too.
"""

from typing import Any

from anchor_jax.plugins import Registry

_HERE = "anchor_jax.training.stages"

STAGES: Registry[Any] = Registry(
    "stages",
    {
        "regression": f"{_HERE}.regression:REGRESSION",
        "distillation": f"{_HERE}.distillation:DISTILLATION",
    },
)
"""Each is a `stages.base.StageKind`, which cannot be imported here without a cycle."""
