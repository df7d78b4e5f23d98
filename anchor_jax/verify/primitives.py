"""Recorded building blocks: rotations, sinusoids, norms, and the noise schedule."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from anchor_jax import flow
from anchor_jax.errors import shown
from anchor_jax.verify.case import TIME, Case, CaseError, Checks, whole
from anchor_jax.wan import rope
from anchor_jax.wan.dit import unpatchify
from anchor_jax.wan.layers import RmsNorm

CLOSE = 1e-4
EXACT = 1e-6


def verify_primitives(case: Case, checks: Checks) -> None:
    """Compares RoPE, the sinusoid of timesteps, the RMS norm and unpatchify."""
    for dim in case.sizes("head_dims", low=2, high=8192):
        _compare_rope(case, checks, dim)
    time = jnp.asarray(case.inputs["t"], jnp.float32)
    for dim in case.sizes("freq_dims", low=2, high=8192):
        ours = rope.timestep_sinusoid(time, dim)
        checks.compare(f"sinusoidal.dim{dim}", ours, absolute=CLOSE)
    scale = jnp.asarray(case.inputs["rms_w"])
    norm = RmsNorm(case.number("model", "eps", default=1e-6), "float32", "float32")
    ours = norm.apply({"params": {"scale": scale}}, jnp.asarray(case.inputs["rms_x"]))
    checks.compare("rms_norm", ours, absolute=CLOSE)
    _compare_unpatchify(case, checks)


def _compare_rope(case: Case, checks: Checks, dim: int) -> None:
    if dim % 2:
        raise CaseError(f"config.json: head_dims holds {dim}, which is odd")
    angle = rope.table(np.asarray(case.sizes("positions", high=1023)), dim)
    checks.compare(f"rope_table.d{dim}.cos", np.cos(angle), absolute=EXACT)
    checks.compare(f"rope_table.d{dim}.sin", np.sin(angle), absolute=EXACT)
    checks.compare(f"rope_apply.d{dim}", rotated(case, dim, 0), absolute=CLOSE)
    starts = set(case.sizes("start_frames"))
    for name in checks.outputs:
        found = re.fullmatch(rf"causal_rope_apply\.d{dim}\.start(\d+)", name)
        if found:
            starts.add(whole(int(found[1]), name, 0, 2**20))
    for start in sorted(starts):
        ours = rotated(case, dim, start)
        checks.compare(f"causal_rope_apply.d{dim}.start{start}", ours, absolute=CLOSE)


def rotated(case: Case, dim: int, start: int) -> np.ndarray:
    """Returns a case's tokens, rotated from a start frame.

    Tokens after the last frame are padding, which is not rotated.
    """
    x = case.inputs[f"x.d{dim}"]
    frames, rows, columns = _grid(case, "grid")
    tokens = frames * rows * columns
    if x.ndim != 4 or x.shape[1] < tokens or x.shape[3] != dim:
        raise CaseError(f"inputs: x.d{dim} has shape {x.shape}")
    by = rope.rotary(start + jnp.arange(frames), (rows, columns), dim)
    own = rearrange(x[:, :tokens], "b (f t) h d -> b f t (h d)", f=frames)
    rotated = np.asarray(rope.rotate(jnp.asarray(own), by))
    rotated = rearrange(rotated, "b f t (h d) -> b (f t) h d", d=dim)
    return np.concatenate([rotated, x[:, tokens:]], axis=1)


def _grid(case: Case, name: str) -> tuple[int, int, int]:
    grid = case.sizes(name, low=1, high=4096)
    if len(grid) != 3:
        raise CaseError(f"config.json: {name} must hold frames, rows and columns")
    return grid


def _compare_unpatchify(case: Case, checks: Checks) -> None:
    frames, *tokens = _grid(case, "unpatchify_grid")
    patch = case.sizes("model", "patch_size", low=1, high=64)
    x = case.inputs["tokens"]
    channels = case.size("model", "out_dim")
    size = channels * math.prod(patch)
    if len(patch) != 3 or patch[0] != 1:
        raise CaseError("config.json: model.patch_size must be 1 and two more sizes")
    if x.ndim != 3 or x.shape[1:] != (frames * math.prod(tokens), size):
        raise CaseError(f"inputs: tokens has shape {x.shape}")
    y = rearrange(x, "b (f t) c -> b f t c", f=frames)
    ours = unpatchify(jnp.asarray(y), tuple(tokens), patch)
    checks.equal("unpatchify", rearrange(np.asarray(ours), "b f h w c -> b c f h w"))


def verify_scheduler(case: Case, checks: Checks) -> None:
    """Compares the noise table and everything that is computed from it.

    A table without 1000 entries belongs to a sampler. Values that only a training uses
    are compared if they were recorded.
    """
    table, shift = _table(case)
    checks.compare("sigmas", table, absolute=EXACT)
    checks.compare("timesteps", table * np.float32(1000), relative=TIME)
    trains = len(table) == flow.TRAIN_STEPS
    if trains or "training_weights" in checks.outputs:
        weights = flow.table_weights(table)
        checks.compare("training_weights", weights, absolute=CLOSE, relative=1e-5)
    if trains or "warped_denoising_step_list" in checks.outputs:
        warped = _warped(case, table)
        checks.compare("warped_denoising_step_list", warped, relative=TIME)
    _compare_conversions(case, checks, table)
    if trains or "raw_timestep" in case.inputs:
        raw = jnp.asarray(case.inputs["raw_timestep"].astype(np.float32))
        ours = flow.shift_timestep(raw, shift)
        checks.compare("dmd_shifted_timestep", ours, relative=TIME)
        ours = score_timestep(case, raw, shift)
        checks.compare("dmd_shifted_timestep_clamped", ours, relative=TIME)


def score_timestep(case: Case, raw, shift: float):
    """Returns the timesteps of the scores from uniform timesteps."""
    case.demand_steps()
    low = case.number("min_step", default=20)
    high = case.number("max_step", default=980)
    return flow.dmd_timestep(raw, shift, low, high)


def _table(case: Case) -> tuple[np.ndarray, float]:
    """Returns the table of noise levels that a case describes, and its shift."""
    case.demand_steps()
    for name in ("inverse_timesteps", "reverse_sigmas"):
        if case.is_set(name):
            raise CaseError(f"config.json: {name} can only be false")
    if case.number("sigma_max", default=1.0) != 1.0:
        raise CaseError("config.json: sigma_max can only be 1")
    last, shift = case.number("sigma_min", default=0), case.number("shift")
    if not 1e-3 <= shift <= 1e3 or not 0 <= last < 1:
        raise CaseError(
            f"config.json: shift={shift}, sigma_min={last}: the shift must be above 0,"
            " and the last level at least 0 and below 1"
        )
    extra = case.setting("extra_one_step", default=True)
    if not isinstance(extra, bool):
        raise CaseError("config.json: extra_one_step must be true or false")
    steps = case.size("num_steps", default=flow.TRAIN_STEPS, high=100_000)
    return flow.sigma_table(shift, steps, extra, last), shift


def _warped(case: Case, table: np.ndarray) -> np.ndarray:
    """Returns the timesteps of a list that counts back from a table's end."""
    steps = np.asarray(case.sizes("denoising_step_list", high=flow.TRAIN_STEPS))
    times = np.append(table * np.float32(1000), np.float32(0))
    # The list counts in a training's 1000 entries, or in those of the table.
    place = flow.TRAIN_STEPS - steps
    if (place >= len(times)).any():
        place = len(table) - steps
    if (place < 0).any():
        raise CaseError(
            f"config.json: denoising_step_list={shown(steps.tolist())} does not index a"
            f" table of {len(table)} entries"
        )
    return times[place]


def _compare_conversions(case: Case, checks: Checks, table: np.ndarray) -> None:
    """Compares noising, the conversions between flow and x0, and the Euler step."""
    names = ("x0", "xt", "flow", "noise")
    x0, xt, pred, noise = (jnp.asarray(case.inputs[name]) for name in names)
    time = jnp.asarray(case.inputs["timestep"])
    if time.ndim != 1 or not len({x.shape for x in (x0, xt, pred, noise)}) == 1:
        raise CaseError("inputs: x0, xt, flow and noise must have one shape")
    if x0.shape[:1] != time.shape:
        raise CaseError(f"inputs: {time.shape} timesteps for {x0.shape}")
    place = np.asarray(flow.nearest_entry(time, table))
    sigma = jnp.asarray(table)[place]
    after = np.append(table, np.float32(0))[place + 1]
    if (
        place == len(table) - 1
    ).any():  # Official behaviour: if one video ends, all end.
        after = np.zeros_like(after)
    step = flow.spread(jnp.asarray(after) - sigma, xt) * pred
    ours = {
        "sigma_used": sigma,
        "training_weight_used": flow.table_weights(table)[place],
        "training_target": noise - x0,
        "add_noise": flow.add_noise(x0, noise, sigma),
        "x0_from_flow": flow.x0_from_flow(pred, xt, sigma),
        "euler_step": xt + step,
    }
    if len(table) != flow.TRAIN_STEPS and "training_weight_used" not in checks.outputs:
        del ours["training_weight_used"]
    for name, value in ours.items():
        checks.compare(name, jax.device_get(value), absolute=CLOSE, relative=EXACT)
    _compare_flow(checks, flow.flow_from_x0(x0, xt, sigma), np.asarray(sigma))


def _compare_flow(checks: Checks, ours, sigma: np.ndarray) -> None:
    """Compares the flow to x0, which without noise is a division by 0."""
    name, ours = "flow_from_x0", np.array(ours)
    theirs = checks.outputs.get(name)
    if theirs is not None and theirs.shape == ours.shape and not sigma.all():
        ended = sigma == 0
        same = np.array_equal(ours[ended], theirs[ended], equal_nan=True)
        checks.equal("flow_from_x0 at sigma 0", same, True)
        ours, theirs = ours[~ended], theirs[~ended]
    # The flow grows as 1 / sigma, beyond a float32 spacing of `CLOSE`.
    checks.compare(name, ours, theirs, absolute=CLOSE, relative=EXACT)
