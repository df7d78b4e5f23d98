"""Flow-matching maths: x_t = (1 - sigma) x0 + sigma noise, flow = noise - x0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

TRAIN_STEPS = 1000


def shift_sigma(sigma, shift: float):
    """Returns shift s / (1 + (shift - 1) s): noise levels moved towards noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_table(shift: float) -> np.ndarray:
    """Returns the 1000 float32 noise levels, falling; the last is not 0.

    Source: algorithm.md 2.1.
    """
    grid = np.linspace(1.0, 0.0, TRAIN_STEPS + 1)[:-1].astype(np.float32)
    return shift_sigma(grid, np.float32(shift)).astype(np.float32)


def lookup_sigma(timestep: jax.Array, shift: float) -> jax.Array:
    """Returns the sigma of the table's entry nearest to each timestep.

    So timestep 0 is sigma 0.00498 at shift 5, as in the official code.
    """
    table = sigma_table(shift)
    times = table * np.float32(TRAIN_STEPS)
    nearest = jnp.argmin(jnp.abs(times - timestep[..., None]), axis=-1)
    return jnp.asarray(table)[nearest]


def shift_timestep(timestep: jax.Array, shift: float) -> jax.Array:
    """Returns timesteps in [0, 1000] moved towards noise, for a shift over 1.

    Source: algorithm.md 7.4.
    """
    if shift <= 1:
        return timestep
    return shift_sigma(timestep / TRAIN_STEPS, shift) * TRAIN_STEPS


def dmd_timestep(
    timestep: jax.Array, shift: float, low: float = 20.0, high: float = 980.0
) -> jax.Array:
    """Returns timesteps at which distillation compares scores, of uniform ones."""
    return jnp.clip(shift_timestep(timestep, shift), low, high)


def add_noise(x0: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns x0 noised to `sigma`, in float32 and then the noise's dtype.

    `sigma` broadcasts from the left: [], [batch] or [batch, frame].
    """
    sigma = spread(sigma, x0)
    mixed = (1 - sigma) * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)
    return mixed.astype(noise.dtype)


def x0_from_flow(flow: jax.Array, noisy: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns the clean latents that a predicted flow points to, in noisy's dtype."""
    x0 = noisy.astype(jnp.float32) - spread(sigma, flow) * flow.astype(jnp.float32)
    return x0.astype(noisy.dtype)


def flow_from_x0(x0: jax.Array, noisy: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns the flow that leads from `noisy` to `x0`, in x0's dtype."""
    flow = (noisy.astype(jnp.float32) - x0.astype(jnp.float32)) / spread(sigma, x0)
    return flow.astype(x0.dtype)


def spread(sigma: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `sigma` in float32 with trailing axes to broadcast against `like`."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


@dataclasses.dataclass(frozen=True)
class Levels:
    """Noise levels of a sampler, falling, before the final 0; static.

    `timestep` is what the network is told, `sigma` what the maths uses.
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
      steps: entries of a 1000-step grid.
      shift: moves the grid towards noise.
      warp: whether `steps` index the shifted grid, or are timesteps themselves.
      table: whether sigma is looked up in the 1000-entry table, as the official code
        does, rather than timestep / 1000.

    Source: algorithm.md 2.2.
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
    """Returns `num_steps` levels, even before the shift; for Euler and UniPC."""
    grid = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
    sigma = shift_sigma(grid, shift).astype(np.float32)
    return Levels(tuple(map(float, sigma * TRAIN_STEPS)), tuple(map(float, sigma)))


def training_weights(shift: float) -> np.ndarray:
    """Returns the table's loss weights, a bell around timestep 500; mean 1.

    Source: algorithm.md 2.4. No stage of the method uses them.
    """
    times = sigma_table(shift).astype(np.float64) * TRAIN_STEPS
    bell = np.exp(-2 * ((times - TRAIN_STEPS / 2) / TRAIN_STEPS) ** 2)
    shifted = bell - bell.min()
    return (shifted * (TRAIN_STEPS / shifted.sum())).astype(np.float32)
