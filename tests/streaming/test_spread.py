"""Streams on a mesh: each device has its own videos, tokens and heads."""

import jax
import numpy as np
import pytest
import tiny

from anchor_jax import sharding
from anchor_jax.streaming import stream
from anchor_jax.streaming.types import PromptChange


def play(settings, variables, batch=2):
    """Returns the latents of three blocks with a prompt switch, and the state."""
    rows = batch * settings.copies
    contexts = [
        stream.project(variables, tiny.embedding(n, rows), setup=settings)
        for n in range(2)
    ]
    state = stream.start(contexts[0], setup=settings)
    made = stream.run(
        variables,
        state,
        jax.random.key(3),
        range(0, 9, settings.policy.block),
        {6: PromptChange(contexts[1])},
        setup=settings,
    )
    latents = []
    for after, block, _ in made:
        latents.append(np.asarray(block))
        state = after
    return np.concatenate(latents, axis=1), state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "guidance"),
    [((1, 2, 2, 1), 1.0), ((2, 1, 1, 2), 1.0), ((1, 2, 1, 2), 2.5)],
    ids=["context", "tensor", "guided"],
)
def test_a_stream_on_a_mesh_is_the_stream_of_one_device(mesh, guidance):
    settings = tiny.setup(guidance=guidance)
    expected, _ = play(settings, tiny.variables())
    on = sharding.make_mesh(mesh)
    params = tiny.variables()["params"]
    places = sharding.shardings(params, sharding.GENERATOR, on)

    with jax.set_mesh(on):
        variables = {"params": jax.device_put(params, places)}
        found, state = play(settings, variables)

    np.testing.assert_allclose(found, expected, atol=2e-5)
    keys = state.cache.slots.k
    shard = keys.sharding.shard_shape(keys.shape)
    assert shard[-1] == keys.shape[-1] // (mesh[2] * mesh[3])
    assert shard[1] == keys.shape[1] // (mesh[0] * mesh[1] if guidance == 1 else 1)


@pytest.mark.slow
def test_a_clip_is_continued_on_a_mesh():
    settings = tiny.setup()
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 6, 4, 4, 4)).astype(np.float32)

    def continued(variables):
        context = stream.project(variables, tiny.embedding(0, 2), setup=settings)
        state = stream.start(context, setup=settings)
        state = stream.resume(variables, state, latents, setup=settings)
        return np.asarray(state.cache.slots.v)

    expected = continued(tiny.variables())
    with jax.set_mesh(sharding.make_mesh((1, 2, 1, 2))):
        found = continued(tiny.variables())

    np.testing.assert_allclose(found, expected, atol=1e-5)
