"""Measures the steps of a distillation against the same run's matmul."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from anchor_jax import io
from anchor_jax.errors import UserError
from anchor_jax.perf import roofline
from anchor_jax.training import run
from anchor_jax.training.monitor import memory_gb
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.training.stages.distill import Distill
from anchor_jax.training.stages.programs import Cursor

SIZE = 1024
"""Of the matmul's sides, in float32."""


def measure(
    config: TrainConfig, progress: Callable[[str], None], repeats: int = 3
) -> dict[str, Any]:
    """Returns what the steps take, as plain values.

    A step's efficiency is its model FLOP/s over those of a matmul taken in the same
    run, by CPU-seconds on a CPU and by the clock elsewhere. `step_flops` says which
    operations count.

    Args:
      config: of a distillation whose sequences are one chunk.
      progress: called with a line before each part.
      repeats: steps of each kind, after those that compile.

    Raises:
      UserError: The config is wrong, or not of such a stage.
    """
    section = config.distillation
    if config.stage != "distillation" or section.length != section.frames:
        raise UserError(
            f"config.stage={config.stage!r}: bench measures distillations whose"
            " sequences are one chunk, such as configs/train_dmd.py:tiny"
        )
    every = section.every
    config = dataclasses.replace(config, steps=(1 + repeats) * every, sample_every=0)
    with io.scratch_folder() as folder:
        scratch = dataclasses.replace(config, out=str(folder / "run"))
        return _measure(run.open_job(scratch, tell=progress), scratch, progress)


def _measure(job, config: TrainConfig, progress) -> dict[str, Any]:
    stage, state, cursor = job.prepared.stage, job.prepared.state, Cursor()
    every, seconds, rates = stage.every, {}, {}
    factor = jnp.ones((SIZE, SIZE), jnp.float32) / SIZE
    matmul = jax.jit(jnp.matmul)
    _timed(lambda: matmul(factor, factor))
    first = time.monotonic()
    for step in range(config.steps):
        progress(f"step {step}")
        (state, cursor, watch), spent = _timed(
            lambda state=state, cursor=cursor, step=step: stage.advance(
                state, cursor, step
            )
        )
        if step == every - 1:
            compiled = time.monotonic() - first
        if step < every:
            continue
        kind = "generator and critic" if step % every == 0 else "critic"
        flops = step_flops(stage.stage, watch)
        seconds.setdefault(kind, []).append(spent)
        rates.setdefault(kind, []).append(flops / spent)
        _, spent = _timed(lambda: _some(matmul, factor))
        rates.setdefault("matmul", []).append(20 * 2 * SIZE**3 / spent)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rate = {name: statistics.median(values) for name, values in rates.items()}
    peak = rate.pop("matmul")
    # A cycle of steps, of which one moves the generator.
    spent = {name: (every - 1) * value for name, value in median.items()}
    spent["generator and critic"] = median["generator and critic"]
    whole = sum(spent.values())
    rate["all steps"] = sum(rate[name] * spent[name] for name in spent) / whole
    return {
        "batch": config.batch,
        "seconds": median,
        "seconds_per_step": whole / every,
        "latent_frames_per_second": config.batch
        * config.distillation.frames
        * (every + 1)
        / whole,
        "first_steps_seconds": compiled,
        "matmul_flops_per_second": peak,
        "efficiency": {name: value / peak for name, value in rate.items()},
        "memory_gb": memory_gb(),
    }


def _some(matmul, factor):
    x = factor
    for _ in range(20):
        x = matmul(x, factor)
    return x


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Returns what is called, and its seconds: of the CPU where that computes."""
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    began = clock()
    result = jax.block_until_ready(call())
    return result, clock() - began


def step_flops(stage: Distill, watch) -> float:
    """Returns the operations of a step, of the exit levels that it drew.

    A rollout's passes up to its exit level and the clean one; for the generator three
    forwards of the scores, and the exit pass's backward, which counts twice; for the
    critic one forward and backward. That a chunk's gradient runs the exit pass forward
    once more is our way to save memory, and does not count.

    Args:
      stage: static.
      watch: the step's numbers.
    """
    total = _rollout(stage, int(watch["critic_exit_level"]))
    total += 3 * _clip(stage, stage.critic.model)
    if "exit_level" in watch:
        total += _rollout(stage, int(watch["exit_level"]))
        total += _clip(stage, stage.critic.model) + 2 * _clip(
            stage, stage.teacher.model
        )
        total += 2 * _blocks(stage)
    return stage.batch * total


def _rollout(stage: Distill, leave: int) -> float:
    return (leave + 2) * _blocks(stage)


def _blocks(stage: Distill) -> float:
    """Returns the operations of one pass of every block of a chunk."""
    setup, policy = stage.setup, stage.setup.policy
    starts = range(0, stage.plan.frames, policy.block)
    kept = policy.sink + policy.local
    return sum(
        roofline.pass_flops(
            setup.model, setup.grid, policy.block, policy.block + min(start, kept)
        ).total
        for start in starts
    )


def _clip(stage: Distill, model) -> float:
    frames = stage.plan.frames
    return roofline.pass_flops(model, stage.setup.grid, frames, frames).total
