"""Default sampling settings of weights, from the method that they were trained with.

`METHODS` is the one table of the methods of published weights. Weights that this
package trained are sampled as their training's config says.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from anchor_jax.cache.catalog import TEACHER
from anchor_jax.config import from_config
from anchor_jax.errors import UserError, shown, suggest
from anchor_jax.sampling.config import EVEN, WAN_NEGATIVE_PROMPT
from anchor_jax.training.stages.registry import STAGES

_NOT_READ = (AttributeError, LookupError, RecursionError, TypeError)


@dataclasses.dataclass(frozen=True)
class Method:
    """Default sampling settings for the weights of a training method.

    Attributes:
      policy: name of the cache policy.
      rules: "release" for published weights, which follow their own code.
      solver: name in `SOLVERS`.
      steps: timesteps of the solver renoise.
      warp: whether `steps` index the shifted grid or are timesteps themselves.
      num_steps: number of steps of the other solvers.
      grid: name in `flow.GRIDS` of the noise levels of the other solvers.
      shift: shift of the noise levels towards noise.
      guidance: guidance scale; 1 turns guidance off.
      negative_prompt: negative prompt of the guidance.
      note: a line that is printed when such weights are sampled.
    """

    policy: str
    rules: str = "release"
    solver: str = "renoise"
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    warp: bool = True
    num_steps: int = 50
    grid: str = EVEN
    shift: float = 5.0
    guidance: float = 1.0
    negative_prompt: str = ""
    note: str = ""


METHODS = {
    "anchor_forcing": Method("anchor_forcing"),
    "longlive": Method("longlive"),
    "self_forcing": Method("self_forcing"),
    # The published list is [1000, 757, 522, 0]. Its entries are already shifted. Its 0
    # is the clean pass, with which every block ends here anyway.
    "causvid": Method("causvid", steps=(1000, 757, 522), warp=False, shift=8.0),
    "memflow": Method(
        "longlive",
        note="memflow's memory bank is not supported; longlive's policy is used",
    ),
    # The defaults of Wan2.1's own program, for text to video.
    "wan": Method(
        TEACHER,
        solver="unipc",
        num_steps=50,
        grid="wan_unipc",
        shift=5.0,
        guidance=5.0,
        negative_prompt=WAN_NEGATIVE_PROMPT,
        note="for the 1.3B model at 480x832 the authors of Wan2.1 recommend"
        " sampler.guidance=6 and a sampler.shift from 8 to 12",
    ),
}
# For bundles without a method, such as `tiny`.
SAVED = Method("anchor_forcing", rules="paper")


def trained_method(training: Mapping[str, Any], base: Method = SAVED) -> Method:
    """Returns the sampling settings of trained weights: those of their stage.

    Args:
      training: the training's config, as plain values.
      base: the settings of the initial weights. If these are bidirectional, the trained
        weights are too.

    Raises:
      UserError: The stage is unknown.
    """
    name = training["stage"]
    if name not in STAGES:
        known = suggest(str(name), STAGES, "stages")
        raise UserError(f"unknown stage {shown(name)}{known}")
    return STAGES[name].method(training, base)


def method_of(metadata: Mapping[str, Any]) -> Method:
    """Returns the method of a bundle's metadata.

    Raises:
      UserError: The method is unknown, or the config of the training cannot be read.
    """
    training = metadata.get("training")
    if training is not None:
        initial = method_of({**metadata, "training": None})
        try:
            method = trained_method(training, initial)
            fields = dataclasses.fields(Method)
            values = {field.name: getattr(method, field.name) for field in fields}
            return from_config(Method, values, "training")
        except (*_NOT_READ, UserError) as error:
            raise UserError(
                "the config of the weights' training cannot be read"
                f" ({_reason(error)}); set policy, rules and every field of sampler"
            ) from error
    name = metadata.get("method")
    if name is None:
        return SAVED
    if not isinstance(name, str) or name not in METHODS:
        known = suggest(str(name), METHODS, "methods")
        raise UserError(
            f"the weights were ported as {shown(name)}{known}; set policy, rules and"
            " every field of sampler, or port them again"
        )
    return METHODS[name]


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else repr(error)
