"""The only loop over noise levels, and its solvers."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float

from anchor_jax import flow
from anchor_jax.axes import Array, Number
from anchor_jax.flow import Levels

State = Float[Array, "*latents"]
"""Latents, whose axes do not matter to a solver."""


@struct.dataclass
class Passes:
    """The inputs and outputs of the loop's passes."""

    noisy: Float[Array, " level *latents"]
    flow: Float[Array, " level *latents"]
    x0: Float[Array, " level *latents"]


Coefficients = dict[str, Float[Array, " level *coefficient"]]


class _Memoryless:
    """Base of solvers of one step, which remember nothing between levels."""

    def init(self, noise: State) -> tuple[()]:
        return ()


@dataclasses.dataclass(frozen=True)
class Renoise(_Memoryless):
    """Estimates x0, then adds new noise up to the next level.

    Source: Consistency Models (arXiv:2303.01469), algorithm 1.
    """

    def dtype(self, model: str) -> str:
        """Returns the type that latents have between levels."""
        return model

    def coefficients(self, levels: Levels) -> Coefficients:
        return {"next": np.asarray([*levels.sigma[1:], 0.0], np.float32)}

    def advance(
        self,
        memory: Any,
        noisy: State,
        x0: State,
        fresh: State,
        level: Mapping[str, Any],
    ) -> tuple[Any, State]:
        del noisy
        return memory, flow.add_noise(x0, fresh, level["next"])


@dataclasses.dataclass(frozen=True)
class Euler(_Memoryless):
    """Euler's method on the flow."""

    def dtype(self, model: str) -> str:
        """Returns float32, because rounding errors of many small steps add up."""
        del model
        return "float32"

    def coefficients(self, levels: Levels) -> Coefficients:
        sigma = np.asarray([*levels.sigma, 0.0], np.float64)
        return {"keep": (sigma[1:] / sigma[:-1]).astype(np.float32)}

    def advance(
        self,
        memory: Any,
        noisy: State,
        x0: State,
        fresh: State,
        level: Mapping[str, Any],
    ) -> tuple[Any, State]:
        del fresh
        return memory, _mix((level["keep"], noisy), (1 - level["keep"], x0))


@dataclasses.dataclass(frozen=True)
class UniPC:
    """Second-order predictor and corrector in the log signal-to-noise ratio.

    Source: UniPC (arXiv:2302.04867), B(h) = e^h - 1, on predictions of x0; first
    order in the first and last step.
    """

    floor: float = 1e-3

    def dtype(self, model: str) -> str:
        """Returns float32, because rounding errors of many small steps add up."""
        del model
        return "float32"

    def coefficients(self, levels: Levels) -> Coefficients:
        sigma = np.asarray(levels.sigma, np.float64)
        if sigma[0] == 1 and len(sigma) > 1:
            # The ratio is infinite at 1. The first level must stay above the second.
            sigma[0] -= min(self.floor, (1 - sigma[1]) / 2)
        sigma = np.minimum(sigma, 1 - 1e-9)
        ratio = [math.log((1 - s) / s) for s in sigma]
        rows = []
        for i in range(len(sigma)):
            back = ratio[i - 1] if i else None
            before = ratio[i - 2] if i > 1 else None
            correct = (1.0, 0.0, 0.0, 0.0, 0.0)
            if i:
                correct = (0.0, *_corrector(sigma[i - 1], back, sigma[i], before))
            follow = sigma[i + 1] if i + 1 < len(sigma) else 0.0
            rows.append((*correct, *_predictor(sigma[i], ratio[i], follow, back)))
        return {"row": np.asarray(rows, np.float32)}

    def init(self, noise: State) -> tuple[State, State, State]:
        return noise, jnp.zeros_like(noise), jnp.zeros_like(noise)

    def advance(
        self,
        memory: Any,
        noisy: State,
        x0: State,
        fresh: State,
        level: Mapping[str, Any],
    ) -> tuple[Any, State]:
        del fresh
        last, m1, m2 = memory
        row = level["row"]
        x = _mix(
            (row[0], noisy), (row[1], last), (row[2], m1), (row[3], m2), (row[4], x0)
        )
        return (x, x0, m1), _mix((row[5], x), (row[6], x0), (row[7], m1))


@dataclasses.dataclass(frozen=True)
class DpmPlusPlus:
    """Second order from the two newest predictions of x0, without a corrector.

    Source: DPM-Solver++ (arXiv:2211.01095), 2M with the midpoint's form; first order
    in the first and last step.
    """

    def dtype(self, model: str) -> str:
        """Returns float32, because rounding errors of many small steps add up."""
        del model
        return "float32"

    def coefficients(self, levels: Levels) -> Coefficients:
        sigma = [*map(float, levels.sigma), 0.0]
        # The log signal-to-noise ratio; infinite at both ends.
        ratio = [_log_ratio(one) for one in sigma]
        rows = []
        for i, follow in enumerate(sigma[1:]):
            keep, slope = follow / sigma[i], 0.0
            if i and follow and math.isfinite(ratio[i - 1]):
                step, before = ratio[i + 1] - ratio[i], ratio[i] - ratio[i - 1]
                slope = 0.5 * (1 - keep) * step / before
            rows.append((keep, 1 - keep + slope, -slope))
        return {"row": np.asarray(rows, np.float32)}

    def init(self, noise: State) -> State:
        return jnp.zeros_like(noise)

    def advance(
        self,
        memory: Any,
        noisy: State,
        x0: State,
        fresh: State,
        level: Mapping[str, Any],
    ) -> tuple[Any, State]:
        del fresh
        row = level["row"]
        return x0, _mix((row[0], noisy), (row[1], x0), (row[2], memory))


def _log_ratio(sigma: float) -> float:
    """Returns log((1 - sigma) / sigma)."""
    if not 0 < sigma < 1:
        return -math.inf if sigma else math.inf
    return math.log((1 - sigma) / sigma)


def _phi(h: float) -> tuple[float, float, float]:
    """Returns B(h) and the first two right-hand sides of the order conditions."""
    b = math.expm1(-h)
    first = b / -h - 1
    second = first / -h - 0.5
    return b, first / b, 2 * second / b


def _predictor(sigma, ratio, follow, back) -> tuple[float, float, float]:
    """Returns weights of the sample, the newest x0 and the x0 before it."""
    keep, signal = follow / sigma, (1 - sigma) * follow / sigma
    if follow == 0 or back is None:
        return keep, 1 - follow - signal, 0.0
    h = math.log((1 - follow) / follow) - ratio
    b = _phi(h)[0]
    slope = -(1 - follow) * b * 0.5 / ((back - ratio) / h)
    return keep, 1 - follow - signal - slope, slope


def _corrector(sigma, ratio, follow, back) -> tuple[float, float, float, float]:
    """Returns weights of the last sample, its x0, the x0 before it and the new x0."""
    keep, signal = follow / sigma, (1 - sigma) * follow / sigma
    h = math.log((1 - follow) / follow) - ratio
    b, first, second = _phi(h)
    scale = -(1 - follow) * b
    if back is None:
        new, old = 0.5 * scale, 0.0
        return keep, 1 - follow - signal - new, old, new
    r = (back - ratio) / h
    # Solves rho_old + rho_new = first, r rho_old + rho_new = second.
    rho_old = (first - second) / (1 - r)
    old, new = scale * rho_old / r, scale * (first - rho_old)
    return keep, 1 - follow - signal - old - new, old, new


def _mix(*terms):
    total = sum(weight * value.astype(jnp.float32) for weight, value in terms)
    return total.astype(terms[0][1].dtype)


def approach(
    denoise: Callable,
    noise: State,
    levels: Levels,
    solver: Any,
    fresh: Float[Array, " later_level *latents"] | None = None,
    carry: Any = None,
    until: Number | None = None,
) -> tuple[State, Passes, Any]:
    """Returns the clean latents that the sampler makes from `noise`.

    It is the only loop over noise levels in the code base.

    Args:
      denoise: (noisy, timestep, carry) -> (flow, carry).
      noise: initial latents.
      levels: static noise levels.
      solver: `Renoise`, `Euler`, `UniPC` or `DpmPlusPlus`.
      fresh: noise of all levels but the first for `Renoise`, drawn by the caller.
      carry: value that each call of `denoise` passes to the next.
      until: number of passes to run, traced. The entries of `Passes` for the rest are
        zero. None runs all.

    Returns:
      Clean latents, or the sampler's latents after `until` passes; the inputs and
      outputs of every pass; and the last carry.
    """
    if fresh is None:
        fresh = jnp.zeros((len(levels) - 1, *noise.shape), noise.dtype)
    fresh = jnp.concatenate([fresh, jnp.zeros((1, *noise.shape), fresh.dtype)])
    rows = {
        "timestep": np.asarray(levels.timestep, np.float32),
        "sigma": np.asarray(levels.sigma, np.float32),
        "fresh": fresh,
        **solver.coefficients(levels),
    }

    def one_level(state, level):
        noisy, memory, carry = state
        predicted, carry = denoise(noisy, level["timestep"], carry)
        x0 = flow.x0_from_flow(predicted, noisy, level["sigma"])
        memory, following = solver.advance(memory, noisy, x0, level["fresh"], level)
        return (following, memory, carry), Passes(noisy, predicted, x0)

    state = (noise, solver.init(noise), carry)
    if until is None:
        (x0, _, carry), passes = jax.lax.scan(one_level, state, rows)
        return x0, passes, carry
    rows["number"] = np.arange(len(levels))
    (x0, _, carry), passes = jax.lax.scan(_up_to(until, one_level), state, rows)
    return x0, passes, carry


def _up_to(until, one_level: Callable) -> Callable:
    """Returns `one_level` with no effect from level `until` on."""

    def leave_out(state, level):
        passes = jax.eval_shape(one_level, state, level)[1]
        return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), passes)

    def choose(state, level):
        running = level["number"] < until
        return jax.lax.cond(running, one_level, leave_out, state, level)

    return choose


def guide(
    predicted: Float[Array, " both *axes"], scale: float
) -> Float[Array, " both//2 *axes"]:
    """Returns u + scale (c - u) for predictions whose batch is [c..., u...].

    Source: classifier-free guidance (arXiv:2207.12598).
    """
    with_prompt, without = jnp.split(predicted.astype(jnp.float32), 2)
    return (without + scale * (with_prompt - without)).astype(predicted.dtype)
