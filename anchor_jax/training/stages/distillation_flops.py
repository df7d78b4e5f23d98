"""The operations of a step of distillation."""

from anchor_jax.perf import roofline
from anchor_jax.training.stages.distillation_step import DistillationSpec


def step_flops(spec: DistillationSpec, metrics) -> float:
    """Returns the operations of a step, of the exit levels that it drew.

    A rollout's passes up to its exit level and the clean one; for the generator three
    forwards of the scores, and the exit pass's backward, which counts twice; for the
    critic one forward and backward. That a chunk's gradient runs the exit pass forward
    once more is our way to save memory, and does not count.

    Args:
      spec: static.
      metrics: the step's metrics.
    """
    total = _rollout(spec, int(metrics["critic_exit_level"]))
    total += 3 * _clip(spec, spec.critic.model)
    if "exit_level" in metrics:
        total += _rollout(spec, int(metrics["exit_level"]))
        total += _clip(spec, spec.critic.model) + 2 * _clip(spec, spec.teacher.model)
        total += 2 * _blocks(spec)
    return spec.batch * total


def _rollout(spec: DistillationSpec, leave: int) -> float:
    return (leave + 2) * _blocks(spec)


def _blocks(spec: DistillationSpec) -> float:
    """Returns the operations of one pass of every block of a chunk."""
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
