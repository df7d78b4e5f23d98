"""Recorded runs of published samplers on a network given by a formula."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from anchor_jax import flow
from anchor_jax.errors import shown, suggest
from anchor_jax.streaming.loop import DpmPlusPlus, Euler, UniPC, approach
from anchor_jax.verify.case import TIME, Case, CaseError, Checks

CLOSE = 1e-5  # absolute, or of the largest: latents and flows of every step
SOLVERS = {
    "wan_unipc": UniPC(),
    "wan_dpmpp": DpmPlusPlus(),
    "diffusers_unipc": UniPC(),
    "diffusers_euler": Euler(),
}
"""Solvers by the recordings' names, which are also those of `flow.GRIDS`."""

_NUMBER = r"(-?\d+(?:\.\d*)?(?:e-?\d+)?)"
_NETWORK = re.compile(
    rf"flow = tanh\({_NUMBER} ?x \+ a\) \({_NUMBER} \+ t/{_NUMBER}\)"
    rf" \+ b sin\(t/{_NUMBER}\) - {_NUMBER} ?x\b.*",
    re.DOTALL,
)


def verify_solver(case: Case, checks: Checks) -> None:
    """Compares timesteps, noise levels, and the flow and latents of every step."""
    name = case.setting("solver")
    if not isinstance(name, str) or name not in SOLVERS:
        known = suggest(shown(name), SOLVERS, "solvers")
        raise CaseError(f"config.json: solver={shown(name)} is unknown{known}")
    shift = case.number("shift")
    if not 1e-3 <= shift <= 1e3:
        raise CaseError(f"config.json: shift={shift} is out of range")
    case.demand_steps()
    steps = case.size("num_steps", high=flow.TRAIN_STEPS)
    levels = flow.GRIDS[name](steps, shift)
    checks.compare("timesteps", np.asarray(levels.timestep), relative=TIME)
    checks.compare("sigmas", np.asarray([*levels.sigma, 0.0]), absolute=1e-6)
    latents, passes = _sample(
        *_inputs(case), network=_network(case), levels=levels, solver=SOLVERS[name]
    )
    after = np.concatenate([passes.noisy[1:], np.asarray(latents)[None]])
    checks.compare("flow", passes.flow, absolute=CLOSE, relative=CLOSE)
    checks.compare("latents", after, absolute=CLOSE, relative=CLOSE)


@functools.partial(jax.jit, static_argnames=("network", "levels", "solver"))
def _sample(noise, inside, beside, *, network, levels: flow.Levels, solver):
    by_x, start, by_t, period, leak = network

    def denoise(x, time, carry):
        gain = start + time / by_t
        found = jnp.tanh(by_x * x + inside) * gain + beside * jnp.sin(time / period)
        return found - leak * x, carry

    latents, passes, _ = approach(denoise, noise, levels, solver)
    return latents, passes


def _inputs(case: Case) -> tuple[np.ndarray, ...]:
    """Returns the first noise, and the network's arrays a and b."""
    names = ("latents", "a", "b")
    found = [np.asarray(case.inputs[name], np.float32) for name in names]
    if len({one.shape for one in found}) != 1:
        raise CaseError("inputs: latents, a and b must have one shape")
    return tuple(found)


def _network(case: Case) -> tuple[float, ...]:
    """Returns the five numbers of the network's formula."""
    text = case.setting("network")
    match = _NETWORK.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise CaseError(
            f"config.json: network={shown(text)}, must be flow = tanh(N x + a)"
            " (N + t/N) + b sin(t/N) - N x, with numbers for N"
        )
    numbers = tuple(map(float, match.groups()))
    if 0 in (numbers[2], numbers[3]) or not all(map(math.isfinite, numbers)):
        raise CaseError("config.json: network divides by 0, or holds a huge number")
    return numbers
