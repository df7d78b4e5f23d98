"""Measures the steps of a training against a matmul in the same run."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from anchor_jax import io
from anchor_jax.training import run
from anchor_jax.training.monitor import memory_gb
from anchor_jax.training.stages import build
from anchor_jax.training.stages.base import Cursor, Prepared, StageKind
from anchor_jax.training.stages.build import TrainConfig

SIZE = 1024
"""Side of the matmul, in float32."""


def measure(
    config: TrainConfig, progress: Callable[[str], None], repeats: int = 3
) -> dict[str, Any]:
    """Returns the measurements of the steps as plain values.

    A step's efficiency is its model FLOP/s divided by those of a matmul in the same
    run, by CPU seconds on a CPU and by wall seconds elsewhere. The stage defines the
    counted operations.

    Args:
      config: config of a stage whose operations are counted.
      progress: called with a line before each part.
      repeats: number of steps of each kind, after the compiling steps.

    Raises:
      UserError: The config is wrong, or its stage does not count operations.
    """
    stage = build.find_stage(config)
    steps = (1 + repeats) * stage.bench_cycle(config)
    config = dataclasses.replace(config, steps=steps, sample_every=0)
    with io.scratch_folder() as folder:
        scratch = dataclasses.replace(config, out=str(folder / "run"))
        training = run.open_training(scratch, tell=progress)
        return _measure(training.prepared, stage, scratch, progress)


def _measure(
    prepared: Prepared, stage: StageKind, config: TrainConfig, progress
) -> dict[str, Any]:
    compiled, state, cursor = prepared.compiled, prepared.state, Cursor()
    cycle, seconds, rates = compiled.cycle, {}, {}
    factor = jnp.ones((SIZE, SIZE), jnp.float32) / SIZE
    matmul = jax.jit(jnp.matmul)
    _timed(lambda: matmul(factor, factor))
    first = time.monotonic()
    for step in range(config.steps):
        progress(f"step {step}")
        (state, cursor, metrics), spent = _timed(
            lambda state=state, cursor=cursor, step=step: compiled.advance(
                state, cursor, step
            )
        )
        if step == cycle - 1:
            compiling = time.monotonic() - first
        if step < cycle:
            continue
        updates, flops = compiled.updates(step), stage.flops(compiled, metrics)
        seconds.setdefault(updates, []).append(spent)
        rates.setdefault(updates, []).append(flops / spent)
        _, spent = _timed(lambda: _some(matmul, factor))
        rates.setdefault("matmul", []).append(20 * 2 * SIZE**3 / spent)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rate = {name: statistics.median(values) for name, values in rates.items()}
    peak = rate.pop("matmul")
    made = [compiled.updates(step) for step in range(cycle)]
    spent = {name: made.count(name) * value for name, value in median.items()}
    whole = sum(spent.values())
    rate["all steps"] = sum(rate[name] * spent[name] for name in spent) / whole
    return {
        "batch": config.batch,
        "seconds": median,
        "seconds_per_step": whole / cycle,
        "latent_frames_per_second": prepared.frames * cycle / whole,
        "first_steps_seconds": compiling,
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
    """Returns the result of a call and its seconds, which are CPU seconds on a CPU."""
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    began = clock()
    result = jax.block_until_ready(call())
    return result, clock() - began
