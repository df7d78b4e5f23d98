"""A small trainer: one jitted step in a resumable loop."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct
from optax.contrib import MuonDimensionNumbers, muon
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long and how fast a stage trains.

    `learning_rate` is Adam's; matrices of the transformer take Muon at
    `muon_factor` times as much.
    """

    steps: int
    batch: int = 32
    learning_rate: float = 2e-3
    muon_factor: float = 5.0
    warmup: int = 100
    decay: float = 0.4
    ema: float = 0.999
    clip: float = 1.0
    seed: int = 0
    save_every: int = 250
    log_every: int = 50


@struct.dataclass
class FitState:
    """All that the next step needs; batches and noise follow from the step."""

    step: jax.Array
    params: dict
    ema: dict
    opt_state: tuple


def optimizer(config: FitConfig) -> optax.GradientTransformation:
    """Returns Muon on the transformer's matrices and Adam on the rest, clipped.

    Source: Muon (arXiv:2502.16982), updates scaled to Adam's size.
    """
    hold = int(config.steps * (1 - config.decay))
    scale = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, config.warmup),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, max(1, config.steps - hold)),
        ],
        [config.warmup, hold],
    )
    adam = config.learning_rate
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        muon(
            lambda step: adam * config.muon_factor * scale(step),
            beta=0.95,
            adam_b2=0.99,
            adam_learning_rate=lambda step: adam * scale(step),
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        ),
    )


def _matrices(params):
    def choose(path, leaf):
        names = {key.key for key in path}
        stacked = bool(names & {"blocks", "context"}) and "generator" in names
        if stacked and "kernel" in names and leaf.ndim == 3:
            return MuonDimensionNumbers(1, 2)
        return None

    return jax.tree_util.tree_map_with_path(choose, params)


def fit(
    loss_fn: Callable,
    params,
    batches: Callable[[int], dict],
    config: FitConfig,
    folder: pathlib.Path,
    frozen=None,
):
    """Trains, resumes if `folder` holds a checkpoint, and returns the averaged params.

    Args:
      loss_fn: (params, batch, rng, frozen) -> scalar.
      params: where to start; a nested dict.
      batches: step number -> batch of numpy arrays; a pure function.
      config: lengths and rates.
      folder: checkpoints and `log.jsonl`.
      frozen: passed through to the loss.
    """
    tx = optimizer(config)
    state = FitState(
        step=jax.numpy.int32(0),
        params=jax.tree.map(jax.numpy.array, params),
        ema=jax.tree.map(jax.numpy.array, params),
        opt_state=tx.init(params),
    )
    folder.mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder.absolute() / "checkpoints", options=options) as m:
        if m.latest_step() is not None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = m.restore(m.latest_step(), args=ocp.args.StandardRestore(abstract))
        step_fn = _make_step(loss_fn, tx, config)
        state = _loop(step_fn, state, batches, config, folder, m, frozen)
    return jax.tree.map(np.asarray, state.ema)


def _make_step(loss_fn, tx, config: FitConfig):
    def step(state: FitState, batch, frozen):
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        loss, grads = jax.value_and_grad(loss_fn)(state.params, batch, rng, frozen)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jax.numpy.minimum(config.ema, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, state.ema, 1 - decay)
        return FitState(state.step + 1, params, ema, opt_state), loss

    return jax.jit(step, donate_argnums=0)


def _loop(step_fn, state, batches, config: FitConfig, folder, manager, frozen):
    first, losses = int(state.step), []
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps)
    for number in bar:
        state, loss = step_fn(state, batches(number), frozen)
        losses.append(loss)
        last = number + 1 == config.steps
        if last or (number + 1) % config.log_every == 0:
            mean = float(np.mean([float(x) for x in losses]))
            _check_finite(mean, number, len(losses))
            bar.set_postfix(loss=f"{mean:.4f}")
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": number + 1, "loss": mean}) + "\n")
            losses = []
        if last or (number + 1) % config.save_every == 0:
            manager.save(number + 1, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    return state


def _check_finite(loss: float, step: int, steps: int) -> None:
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"loss {loss} within the {steps} steps up to step {step}; resume from"
            " the last checkpoint with a lower learning_rate"
        )
