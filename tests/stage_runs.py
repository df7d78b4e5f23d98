"""Small stages of both kinds, with their data, and runs of them."""

import copy
import dataclasses
import functools

import bundles
import jax
import numpy as np
import optax
import tiny

from anchor_jax import sharding
from anchor_jax.training.checkpoints import Checkpoints
from anchor_jax.training.loop import Loop, train
from anchor_jax.training.monitor import Monitor
from anchor_jax.training.stages import build
from anchor_jax.training.stages.base import Cursor
from anchor_jax.training.stages.build import TrainConfig
from anchor_jax.training.stages.distillation import DistillationConfig
from anchor_jax.training.stages.regression import RegressionConfig
from anchor_jax.training.state import (
    Ema,
    Optimizer,
)

BATCH = 4


FRAMES = 6


FAST = Optimizer(learning_rate=1e-3, betas=(0.9, 0.99))


DISTILL = TrainConfig(
    steps=20,
    batch=BATCH,
    distillation=DistillationConfig(
        steps=(1000, 500), frames=FRAMES, length=12, switches=(6,), every=2
    ),
    optimizer=FAST,
    critic_optimizer=FAST,
    ema=Ema(0.5, 0),
)


REGRESS = dataclasses.replace(
    DISTILL,
    stage="regression",
    regression=RegressionConfig(forcing="teacher", block=3, blocks=2),
)


GUIDED = dataclasses.replace(
    REGRESS,
    regression=dataclasses.replace(REGRESS.regression, guidance=2.5),
)


def embeddings(number):
    return {
        name: np.asarray(tiny.embedding(10 * number + place, batch=BATCH))
        for place, name in enumerate(("prompt", "switch", "negative"))
    }


def clips(number):
    rng = np.random.default_rng((3, number))
    latents = rng.standard_normal((BATCH, FRAMES, 4, 4, 4)).astype(np.float32)
    prompt, negative = (
        np.asarray(tiny.embedding(seed, batch=BATCH)) for seed in (number, 99)
    )
    return {"latents": latents, "embedding": prompt[:, None], "negative": negative}


def make(config, mesh=(1, 1, 1, 1)):
    config = dataclasses.replace(config, mesh=mesh)
    kept = _prepared(config, build.make_mesh(config))
    return dataclasses.replace(
        kept,
        compiled=copy.copy(kept.compiled),
        # A copy without a program for each shape.
        state=jax.tree.map(
            lambda x: jax.device_put(x, x.sharding, may_alias=False), kept.state
        ),
    )


@functools.cache
def _prepared(config, mesh):
    """Returns a stage whose programs all tests of a process share."""
    del mesh
    bundle = bundles.load()
    batches = clips if config.stage == "regression" else embeddings
    kept = build.prepare(config, bundle, batches, bundle)
    for name in ("_step", "_update_generator", "_update_critic"):
        getattr(kept.compiled, name, None)  # Made here, so that copies share them.
    return kept


def on_one_device(monkeypatch):
    """A mesh of the first device, though tests have four."""
    one = jax.make_mesh(
        (1, 1, 1, 1),
        sharding.MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * 4,
        devices=jax.devices()[:1],
    )
    monkeypatch.setattr(sharding, "make_mesh", lambda shape, devices: one)


def steps(prepared, count, state=None, cursor=None):
    state, cursor = state or prepared.state, cursor or Cursor()
    watched = []
    for step in range(int(state.step), count):
        state, cursor, watch = prepared.compiled.advance(state, cursor, step)
        watched.append({name: float(value) for name, value in watch.items()})
    return state, cursor, watched


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(jax.device_get(state))]


def gradients(state):
    """Returns the gradients of the first step: all that Adam's first means hold."""
    means = (
        optax.tree.get(one, "mu")
        for one in (state.opt_generator, state.opt_fake_score)
        if one is not None
    )
    return jax.tree.map(lambda x: np.asarray(x) / (1 - FAST.betas[0]), list(means))


def run(config, folder, until, tell=lambda line: None):
    """Trains to a step as the command does, and returns the last state."""
    prepared = make(config)
    checkpoints = Checkpoints(folder, {"training": {}}, 2, tell)
    state, cursor = prepared.state, Cursor()
    found = checkpoints.restore(state, prepared.compiled.places)
    state, cursor = found or (state, cursor)
    monitor = Monitor(folder, until, int(state.step), 1, quiet=True)
    loop = Loop(until, save_every=2, log_every=1)
    try:
        return train(prepared.compiled, state, cursor, loop, checkpoints, monitor)
    finally:
        monitor.close()
        checkpoints.close()
