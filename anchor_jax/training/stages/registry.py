"""The stages of training, by the name that a config gives as `stage`.

A stage is added here, as a section of `TrainConfig`, and nowhere else. The modules are
imported when a stage is asked for: sampling reads this table too.
"""

from typing import TYPE_CHECKING

from anchor_jax.plugins import Registry

if TYPE_CHECKING:
    from anchor_jax.training.stages.base import StageKind

_HERE = "anchor_jax.training.stages"

STAGES: "Registry[StageKind]" = Registry(
    "stages",
    {
        "regression": f"{_HERE}.regression:REGRESSION",
        "distillation": f"{_HERE}.distillation:DISTILLATION",
    },
)
