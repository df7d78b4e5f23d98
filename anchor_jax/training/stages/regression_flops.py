"""The operations of a step of regression."""

from collections.abc import Iterator

from anchor_jax.perf import roofline
from anchor_jax.perf.work import Use, repeated
from anchor_jax.training.stages.regression_step import RegressionSpec
from anchor_jax.wan.spec import LatentGrid, ModelConfig


def clip_uses(spec: RegressionSpec, grid: LatentGrid, frames: int) -> tuple[Use, ...]:
    """Returns what a step does: a gradient, and the scores of a guided teacher.

    A text encoder that is trained too is not counted.

    Args:
      spec: static settings of the regression.
      grid: latent size.
      frames: latent frames of a clip.
    """
    found = [_use(spec, spec.model, grid, frames, calls=1, backward=True)]
    if spec.teacher is not None:
        found.append(_use(spec, spec.teacher, grid, frames, calls=2, backward=False))
    return tuple(found)


def _use(spec, model: ModelConfig, grid, frames: int, calls: int, backward: bool):
    rows = list(_passes(spec, model, grid, frames))
    flops = sum(one.total for one in rows)
    attention = sum(one.self_attention for one in rows)
    again = sum(repeated(model.remat, one) for one in rows) if backward else 0.0
    height, width = grid.tokens(model.patch)
    copies = 2 if spec.forcing == "teacher" else 1
    live = calls * copies * frames * height * width
    times, passes = (3, 2) if backward else (calls, 1)
    return Use(
        "gradient" if backward else "guided teacher",
        "step",
        model=model,
        flops=times * flops,
        again=again,
        attention=(times + bool(again)) * attention,
        passes=passes,
        tokens=passes * live,
        live=live,
        gathers=passes,
        backward=backward,
    )


def _passes(spec, model: ModelConfig, grid, frames: int) -> Iterator[roofline.Pass]:
    """Yields the operations of the parts of a clip that see equally many frames."""
    if not spec.blocks:
        yield roofline.pass_flops(model, grid, frames, frames)
        return
    # With clean earlier blocks beside the noisy ones, every block passes twice.
    copies, end = 2 if spec.forcing == "teacher" else 1, 0
    for block in spec.blocks:
        end += block
        for _ in range(copies):
            keys = min(end, spec.window or end)
            yield roofline.pass_flops(model, grid, block, keys)
