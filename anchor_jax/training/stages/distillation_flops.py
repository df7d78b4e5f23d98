"""The operations of a step of distillation."""

from anchor_jax.perf import roofline
from anchor_jax.training.stages.distillation_step import DistillationSpec


def step_flops(spec: DistillationSpec, metrics) -> float:
    """Returns the operations of a step for the exit levels that it drew.

    The count has a rollout's passes up to its exit level and the clean pass. The
    generator adds three forward passes of the scores and the backward of the exit pass,
    which counts twice; the critic adds one forward and one backward. The gradient of a
    chunk runs the exit pass forward a second time to save memory, which is not counted.

    Args:
      spec: static settings of the distillation.
      metrics: the step's metrics.
    """
    total = _rollout(spec, int(metrics["critic_exit_level"]))
    total += 3 * _clip(spec, spec.critic.model)
    if "exit_level" in metrics:
        total += _rollout(spec, int(metrics["exit_level"]))
        total += _clip(spec, spec.critic.model) + 2 * _clip(spec, spec.teacher.model)
        total += 2 * _blocks(spec)
    return spec.batch * total


def _rollout(spec: DistillationSpec, exit_level: int) -> float:
    return (exit_level + 2) * _blocks(spec)


def _blocks(spec: DistillationSpec) -> float:
    """Returns the operations of one pass over every block of a chunk."""
    setup, policy = spec.setup, spec.setup.policy
    starts = range(0, spec.plan.frames, policy.block)
    kept = policy.sink + policy.local
    return sum(
        roofline.pass_flops(
            setup.model, setup.grid, policy.block, policy.block + min(start, kept)
        ).total
        for start in starts
    )


def _clip(spec: DistillationSpec, model) -> float:
    frames = spec.plan.frames
    return roofline.pass_flops(model, spec.setup.grid, frames, frames).total
