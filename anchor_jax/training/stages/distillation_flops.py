"""The operations of a step of distillation."""

import dataclasses
import math
from collections.abc import Iterator

from anchor_jax.perf import roofline
from anchor_jax.perf.work import Use, repeated
from anchor_jax.training.stages.distillation_step import DistillationSpec
from anchor_jax.wan.vae import VaeCodec


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


def mean_uses(
    spec: DistillationSpec, every: int, gradient: float = 0.0
) -> tuple[Use, ...]:
    """Returns what a mean step does: a critic's step, and a generator's now and then.

    Exit levels have their mean. The operations of networks are those of `step_flops`.

    Args:
      spec: static settings of the distillation.
      every: steps per generator update.
      gradient: bytes of the generator's gradient.
    """
    found = (
        *_chunk_uses(spec, "critic"),
        _clip_use(spec, "critic", spec.critic.model, backward=True),
        *_chunk_uses(spec, "generator"),
        _clip_use(spec, "generator", spec.critic.model),
        _clip_use(spec, "generator", spec.teacher.model, calls=2),
        _pull_back_use(spec, gradient),
    )
    return tuple(
        dataclasses.replace(one, each=1 / every) if one.role == "generator" else one
        for one in found
    )


def _chunk_uses(spec: DistillationSpec, role: str) -> Iterator[Use]:
    """Yields the rollout of a chunk, and the decoding for its clip's first frame.

    Re-caches are not counted.
    """
    model, rows = spec.setup.model, list(_mean_passes(spec))
    # A pass for each level up to a mean exit, and the clean pass.
    chunks = spec.plan.chunks(None)
    times = ((len(spec.setup.levels) + 1) / 2 + 1) / len(chunks)
    live = spec.setup.policy.block * _tokens(spec)
    yield Use(
        "rollout",
        role,
        model=model,
        flops=times * sum(one.total for one in rows),
        attention=times * sum(one.self_attention for one in rows),
        passes=times * len(rows),
        tokens=times * len(rows) * live,
        live=live,
        gathers=1,
        whole=True,
    )
    if isinstance(spec.codec, VaeCodec) and len(chunks) > 1:
        frames = (chunks[1].new + 1) * (len(chunks) - 1) / len(chunks)
        one = roofline.decode_flops(spec.codec.config, spec.setup.grid)
        yield Use("first frame of the clip", role, flops=frames * one)


def _clip_use(
    spec: DistillationSpec, role: str, model, calls: int = 1, backward: bool = False
) -> Use:
    """Returns a score of the clip, with its gradient if there is a backward pass.

    Args:
      spec: static settings of the distillation.
      role: role of the step.
      model: sizes of the network.
      calls: number of prompts.
      backward: whether the network is trained.
    """
    forward, live = _clip_pass(spec, model), calls * spec.plan.frames * _tokens(spec)
    again = repeated(model.remat, forward) if backward else 0.0
    times = calls * (3 if backward else 1)
    more = 1 if again else 0
    passes = 2 if backward else 1
    return Use(
        "critic's gradient" if backward else f"score of {model.num_layers} layers",
        role,
        model=model,
        flops=times * forward.total,
        again=again,
        attention=(times + more) * forward.self_attention,
        passes=passes,
        tokens=passes * live,
        live=live,
        gathers=passes,
        backward=backward,
    )


def _pull_back_use(spec: DistillationSpec, gradient: float) -> Use:
    """Returns the generator's gradient, block by block, after a second forward pass."""
    model, rows = spec.setup.model, list(_mean_passes(spec))
    chunks = len(spec.plan.chunks(None))
    live = spec.setup.policy.block * _tokens(spec)
    forward = sum(one.total for one in rows) / chunks
    again = sum(repeated(model.remat, one) for one in rows) / chunks
    attention = sum(one.self_attention for one in rows) / chunks
    passes = 2 * len(rows) / chunks
    return Use(
        "generator's gradient",
        "generator",
        model=model,
        flops=2 * forward,
        again=forward + again,
        attention=(3 + bool(again)) * attention,
        passes=passes,
        tokens=passes * live,
        live=live,
        gathers=1,
        backward=True,
        whole=True,
        gradient=gradient,
    )


def _rollout(spec: DistillationSpec, exit_level: int) -> float:
    return (exit_level + 2) * _blocks(spec)


def _blocks(spec: DistillationSpec) -> float:
    """Returns the operations of one pass over every block of a chunk."""
    return sum(one.total for one in _passes(spec))


def _passes(spec: DistillationSpec) -> Iterator[roofline.Pass]:
    """Yields the operations of a pass over each block of a chunk."""
    setup, policy = spec.setup, spec.setup.policy
    kept = policy.sink + policy.local
    for start in range(0, spec.plan.frames, policy.block):
        keys = policy.block + min(start, kept)
        yield roofline.pass_flops(setup.model, setup.grid, policy.block, keys)


def _mean_passes(spec: DistillationSpec) -> Iterator[roofline.Pass]:
    """Yields a pass over each block of all chunks of a sequence.

    The junction is seen from the mean switch frame.
    """
    setup, policy, switches = spec.setup, spec.setup.policy, spec.plan.switches
    switch = sum(switches) / len(switches) if switches else math.inf
    kept = policy.sink + policy.local
    for span in spec.plan.chunks(None):
        for start in range(span.start, span.end, policy.block):
            junction = policy.junction_frames if start > switch else 0
            keys = policy.block + min(start, kept) + junction
            yield roofline.pass_flops(setup.model, setup.grid, policy.block, keys)


def _clip(spec: DistillationSpec, model) -> float:
    return _clip_pass(spec, model).total


def _clip_pass(spec: DistillationSpec, model) -> roofline.Pass:
    frames = spec.plan.frames
    return roofline.pass_flops(model, spec.setup.grid, frames, frames)


def _tokens(spec: DistillationSpec) -> int:
    rows, columns = spec.setup.tokens
    return rows * columns
