"""Flow-matching maths: x_t = (1 - sigma) x0 + sigma noise, flow = noise - x0."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

TRAIN_STEPS = 1000


def shift_sigma(sigma, shift: float):
    """Returns shift s / (1 + (shift - 1) s), noise levels shifted towards noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_table(
    shift: float, steps: int = TRAIN_STEPS, extra: bool = True, last: float = 0.0
) -> np.ndarray:
    """Returns a table of float32 noise levels, [steps], falling from 1.

    Args:
      shift: shift of the levels towards noise.
      steps: number of levels; a training's table has 1000.
      extra: whether one more step leads to `last`, which the table then omits.
      last: final level before the shift.

    Source: wan/README.md, "Noise levels".
    """
    grid = np.linspace(1.0, last, steps + extra)[:steps].astype(np.float32)
    return shift_sigma(grid, np.float32(shift)).astype(np.float32)


def lookup_sigma(timestep: jax.Array, shift: float) -> jax.Array:
    """Returns the sigma of the table's entry nearest to each timestep.

    Timestep 0 therefore has sigma 0.00498 at shift 5, as in the official code.
    """
    table = sigma_table(shift)
    return jnp.asarray(table)[nearest_entry(timestep, table)]


def nearest_entry(timestep: jax.Array, table: np.ndarray) -> jax.Array:
    """Returns the index of each timestep's nearest noise level, the first of a tie.

    Args:
      timestep: timesteps of any shape, 1000 sigma.
      table: result of `sigma_table`.
    """
    times = table * np.float32(TRAIN_STEPS)
    return jnp.argmin(jnp.abs(times - timestep[..., None]), axis=-1)


def shift_timestep(timestep: jax.Array, shift: float) -> jax.Array:
    """Returns timesteps in [0, 1000], shifted towards noise if the shift is above 1.

    Source: training/README.md, "Distribution matching".
    """
    if shift <= 1:
        return timestep
    return shift_sigma(timestep / TRAIN_STEPS, shift) * TRAIN_STEPS


def dmd_timestep(
    timestep: jax.Array, shift: float, low: float = 20.0, high: float = 980.0
) -> jax.Array:
    """Returns the timesteps of distillation's scores from uniform timesteps."""
    return jnp.clip(shift_timestep(timestep, shift), low, high)


def add_noise(x0: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns x0 noised to `sigma`, computed in float32, in the noise's dtype.

    `sigma` broadcasts from the left: [], [batch] or [batch, frame].
    """
    sigma = spread(sigma, x0)
    mixed = (1 - sigma) * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)
    return mixed.astype(noise.dtype)


def x0_from_flow(flow: jax.Array, noisy: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns the clean latents of a predicted flow, in the dtype of `noisy`."""
    x0 = noisy.astype(jnp.float32) - spread(sigma, flow) * flow.astype(jnp.float32)
    return x0.astype(noisy.dtype)


def flow_from_x0(x0: jax.Array, noisy: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns the flow from `x0` and `noisy`, in the dtype of `x0`."""
    flow = (noisy.astype(jnp.float32) - x0.astype(jnp.float32)) / spread(sigma, x0)
    return flow.astype(x0.dtype)


def spread(sigma: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `sigma` in float32 with trailing axes to broadcast against `like`."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


@dataclasses.dataclass(frozen=True)
class Levels:
    """Noise levels of a sampler in descending order, without the final 0; static.

    The two columns are independent: `timestep` is the input of the network, and `sigma`
    the level of the solver.
    """

    timestep: tuple[float, ...]
    sigma: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timestep)


def few_step_levels(
    steps: tuple[int, ...], shift: float, warp: bool = True, table: bool = False
) -> Levels:
    """Returns the levels of a few-step generator.

    (1000, 750, 500, 250) at shift 5 are timesteps 1000, 937.5, 833.3 and 625.

    Args:
      steps: entries of a grid of 1000 steps.
      shift: shift of the grid towards noise.
      warp: whether `steps` index the shifted grid. If false, they are timesteps.
      table: whether sigma is looked up in the 1000-entry table, as in the official
        code. If false, it is timestep / 1000.

    Source: wan/README.md, "Noise levels".
    """
    grid = np.append(sigma_table(shift) * np.float32(TRAIN_STEPS), np.float32(0))
    times = np.asarray(steps, np.float32)
    if warp:
        times = grid[TRAIN_STEPS - np.asarray(steps, np.int64)]
    sigma = times / np.float32(TRAIN_STEPS)
    if table:
        nearest = np.abs(grid[None, :-1] - times[:, None]).argmin(axis=1)
        sigma = sigma_table(shift)[nearest]
    return Levels(tuple(map(float, times)), tuple(map(float, sigma)))


def even_levels(num_steps: int, shift: float) -> Levels:
    """Returns levels from 1 that are even before the shift; timestep = 1000 sigma."""
    grid = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
    sigma = shift_sigma(grid, shift).astype(np.float32)
    return Levels(tuple(map(float, sigma * TRAIN_STEPS)), tuple(map(float, sigma)))


def wan_unipc_levels(num_steps: int, shift: float) -> Levels:
    """Returns the levels of Wan2.1's own sampler with UniPC, which is its default.

    They are even before the shift and start at 0.999, the first of a table of 1000
    without 1. 50 steps at shift 5 are timesteps 999, 995, ... and sigmas 0.9998,
    0.99573, ...
    """
    first = float(np.float32(1 - 1 / TRAIN_STEPS))
    return _truncated(shift_sigma(np.linspace(first, 0.0, num_steps + 1)[:-1], shift))


def wan_dpmpp_levels(num_steps: int, shift: float) -> Levels:
    """Returns the levels of Wan2.1's own sampler with DPM++, even from 1."""
    return _truncated(shift_sigma(np.linspace(1.0, 0.0, num_steps + 1)[:-1], shift))


def diffusers_unipc_levels(num_steps: int, shift: float) -> Levels:
    """Returns the levels of diffusers' UniPCMultistepScheduler with `flow_shift`.

    They are even before the shift, from 1 towards 0.001. A first level of 1 is lowered
    by 1e-6, because its signal-to-noise ratio has no logarithm.
    """
    sigma = np.linspace(1.0, 1 / TRAIN_STEPS, num_steps + 1)[:-1]
    sigma = shift_sigma(sigma, shift)
    sigma[0] -= 1e-6
    return _truncated(sigma)


def diffusers_euler_levels(num_steps: int, shift: float) -> Levels:
    """Returns the levels of diffusers' FlowMatchEulerDiscreteScheduler.

    They are even between the ends of a shifted table of 1000, and then shifted again.
    """
    table = np.asarray([1.0, 1 / TRAIN_STEPS], np.float32)
    first, last = shift_sigma(table, np.float32(shift)) * np.float64(TRAIN_STEPS)
    grid = np.linspace(first, last, num_steps) / TRAIN_STEPS
    sigma = shift_sigma(grid, shift).astype(np.float32)
    time = sigma * np.float32(TRAIN_STEPS)
    return Levels(tuple(map(float, time)), tuple(map(float, sigma)))


def _truncated(sigma: np.ndarray) -> Levels:
    """Returns float64 noise levels as float32, with timesteps truncated to integers."""
    time = (sigma * TRAIN_STEPS).astype(np.int64)
    return Levels(tuple(map(float, time)), tuple(map(float, sigma.astype(np.float32))))


GRIDS: dict[str, Callable[[int, float], Levels]] = {
    "even": even_levels,
    "wan_unipc": wan_unipc_levels,
    "wan_dpmpp": wan_dpmpp_levels,
    "diffusers_unipc": diffusers_unipc_levels,
    "diffusers_euler": diffusers_euler_levels,
}
"""Functions from a number of steps and a shift to a sampler's noise levels, by name."""


def training_weights(shift: float) -> np.ndarray:
    """Returns the table's loss weights, a bell around timestep 500 with mean 1.

    Source: wan/README.md, "Noise levels". No stage of the method uses them.
    """
    return table_weights(sigma_table(shift))


def table_weights(table: np.ndarray) -> np.ndarray:
    """Returns the loss weights of a table of noise levels, float32, mean 1.

    The bell's centre and width are right only for a table of 1000 entries, as in the
    official code.
    """
    steps, times = len(table), table.astype(np.float64) * TRAIN_STEPS
    bell = np.exp(-2 * ((times - steps / 2) / steps) ** 2)
    shifted = bell - bell.min()
    return (shifted * (steps / shifted.sum())).astype(np.float32)
