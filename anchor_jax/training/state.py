"""The state of a training between steps, and the updates of parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from optax.contrib import MuonDimensionNumbers, muon

from anchor_jax.training.rollout import Rollout

OPTIMIZERS = ("adamw", "muon")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer of one network; static.

    Attributes:
      name: "adamw" or "muon". With "muon" the matrices of the transformer's layers take
        Muon at `muon_factor` times the rate, and all other parameters Adam.
      learning_rate: learning rate between the warmup and the decay.
      betas: decay rates of Adam's two means.
      eps: Adam's epsilon.
      weight_decay: decoupled weight decay on every parameter; only for AdamW.
      clip: largest global norm of a gradient.
      warmup: number of steps in which the rate rises linearly from 0.
      decay: fraction of all steps, at the end, in which the rate falls linearly to 0.
      muon_factor: rate of the matrices under Muon, relative to `learning_rate`.

    Source: training/README.md, "Optimizers"; Muon (arXiv:2502.16982).
    """

    name: str = "adamw"
    learning_rate: float = 2e-6
    betas: tuple[float, float] = (0.0, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 10.0
    warmup: int = 0
    decay: float = 0.0
    muon_factor: float = 5.0

    def __post_init__(self):
        problem = self._problem()
        if problem:
            raise ValueError(f"optimizer: {problem}")

    def _problem(self) -> str | None:
        if self.name not in OPTIMIZERS:
            return f"name={self.name!r} must be one of {OPTIMIZERS}"
        for field in ("learning_rate", "eps", "clip", "muon_factor"):
            if not 0 < getattr(self, field) < float("inf"):
                return f"{field}={getattr(self, field)} must be above 0"
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            return f"betas={self.betas} must be two numbers in [0, 1)"
        if not 0 <= self.decay <= 1:
            return f"decay={self.decay} must lie between 0 and 1"
        if self.warmup < 0 or self.weight_decay < 0:
            return "warmup and weight_decay must be at least 0"
        return None

    def scale(self, steps: int):
        """Returns the factor of the learning rate as a function of the update's number.

        Args:
          steps: total number of updates.
        """
        hold = max(self.warmup, round(steps * (1 - self.decay)))
        parts = [optax.constant_schedule(1.0)]
        bounds = []
        if self.warmup:
            parts.insert(0, optax.linear_schedule(0.0, 1.0, self.warmup))
            bounds.append(self.warmup)
        if hold < steps:
            parts.append(optax.linear_schedule(1.0, 0.0, steps - hold))
            bounds.append(hold)
        return optax.join_schedules(parts, bounds)

    def transform(self, steps: int) -> optax.GradientTransformation:
        """Returns the gradient transformation for a training of `steps` updates."""
        scale = self.scale(steps)

        def rate(factor: float):
            return lambda count: self.learning_rate * factor * scale(count)

        if self.name == "muon":
            moved = muon(
                rate(self.muon_factor),
                beta=0.95,
                adam_b1=self.betas[0],
                adam_b2=self.betas[1],
                adam_learning_rate=rate(1.0),
                muon_weight_dimension_numbers=_matrices,
                consistent_rms=0.2,
            )
        else:
            b1, b2 = self.betas
            moved = optax.adamw(
                rate(1.0), b1, b2, self.eps, weight_decay=self.weight_decay
            )
        return optax.chain(optax.clip_by_global_norm(self.clip), moved)


def _matrices(params):
    """Returns the axes along which Muon orthogonalizes the layers' matrices."""

    def choose(path, leaf):
        names = [key.key for key in path]
        stacked = names[0] == "params" and names[1] in ("blocks", "context")
        if stacked and names[-1] == "kernel" and leaf.ndim == 3:
            return MuonDimensionNumbers(1, 2)
        return None

    return jax.tree_util.tree_map_with_path(choose, params)


@dataclasses.dataclass(frozen=True)
class Ema:
    """A running mean of the generator; static.

    Attributes:
      decay: weight of the old mean in an update; 0 turns the mean off.
      start: trainer step at which the mean starts, as a copy of the parameters.
      warm: whether the weight is smaller at first, (1 + n) / (10 + n) after n updates.

    Source: training/README.md, "Optimizers".
    """

    decay: float = 0.99
    start: int = 200
    warm: bool = False

    def __post_init__(self):
        if not 0 <= self.decay < 1 or self.start < 0:
            raise ValueError(
                f"ema: decay={self.decay} must be in [0, 1) and start={self.start}"
                " must be at least 0"
            )

    def next(self, mean, params, number, step):
        """Returns the mean after update `number`, in zero-based trainer step `step`."""
        number = jnp.asarray(number, jnp.float32)
        keep = jnp.float32(self.decay)
        if self.warm:
            keep = jnp.minimum(keep, (1 + number) / (10 + number))
        keep = jnp.where(step > self.start, keep, 0.0)
        return optax.incremental_update(params, mean, 1 - keep)


@struct.dataclass
class TrainState:
    """Everything that the next step needs except frozen weights and data.

    Attributes:
      step: number of trainer steps so far.
      rng: key data of the run. Every random number is a function of it and the step.
      updates: number of generator updates so far.
      sound: whether every loss and gradient so far was finite. Once false, no parameter
        changes.
      generator: trained collections of the generator, float32.
      opt_generator: state of the generator's optimizer.
      ema: the running mean of `generator`, or None.
      fake_score: trained collections of the critic, or None.
      opt_fake_score: state of the critic's optimizer, or None.
      rollout: the current sequence, or None.
    """

    step: jax.Array
    rng: jax.Array
    updates: jax.Array
    sound: jax.Array
    generator: dict[str, Any]
    opt_generator: Any
    ema: dict[str, Any] | None = None
    fake_score: dict[str, Any] | None = None
    opt_fake_score: Any = None
    rollout: Rollout | None = None

    def key(self, *numbers: int) -> jax.Array:
        """Returns the random key of a purpose in this step."""
        key = jax.random.wrap_key_data(self.rng)
        for number in (self.step, *numbers):
            key = jax.random.fold_in(key, number)
        return key


def init_state(
    seed: int,
    generator,
    generator_tx: optax.GradientTransformation,
    *,
    has_ema: bool,
    fake_score=None,
    fake_score_tx: optax.GradientTransformation | None = None,
    rollout: Rollout | None = None,
) -> TrainState:
    """Returns the state before the first step; parameters are copied as float32."""

    def master(tree):
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32), tree)

    generator = master(generator)
    state = TrainState(
        step=jnp.int32(0),
        rng=jax.random.key_data(jax.random.key(seed)),
        updates=jnp.int32(0),
        sound=jnp.array(True),
        generator=generator,
        opt_generator=generator_tx.init(generator),
        ema=master(generator) if has_ema else None,
        rollout=rollout,
    )
    if fake_score is None:
        return state
    fake_score = master(fake_score)
    return state.replace(
        fake_score=fake_score, opt_fake_score=fake_score_tx.init(fake_score)
    )


def moved(tx, gradient, opt_state, params, loss, sound):
    """Returns parameters, optimizer state, the gradient's norm and soundness.

    Nothing changes if the loss or the gradient is not finite.
    """
    norm = optax.tree.norm(gradient)
    sound = sound & jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, after = tx.update(gradient, opt_state, params)
    new = optax.apply_updates(params, updates)
    params, opt_state = where(sound, (new, after), (params, opt_state))
    return params, opt_state, norm, sound


def checked(state: TrainState, gradient, loss) -> TrainState:
    """Returns the state; `sound` is false if the gradient or the loss is not finite."""
    sound = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
    return state.replace(sound=state.sound & sound)


def move_generator(state: TrainState, gradient, loss, tx, ema: Ema | None):
    """Returns the state after an update of the generator and its mean, and the norm."""
    generator, opt_state, norm, sound = moved(
        tx, gradient, state.opt_generator, state.generator, loss, state.sound
    )
    mean = state.ema
    if ema is not None:
        after = ema.next(mean, generator, state.updates, state.step)
        mean = where(sound, after, mean)
    state = state.replace(
        generator=generator,
        opt_generator=opt_state,
        ema=mean,
        updates=state.updates + sound,
        sound=sound,
    )
    return state, norm


def where(condition, new, old):
    """Returns one of two trees of the same shapes."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
