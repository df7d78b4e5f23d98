import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from anchor_jax.wan import dit, lora
from anchor_jax.wan.attention import bidirectional
from anchor_jax.wan.spec import WAN_1_3B


def flow(**variables):
    text = jax.random.normal(jax.random.key(1), (1, 6, 8))
    latents = jax.random.normal(jax.random.key(2), (1, 2, 4, 4, 4))
    model = dit.WanDit(tiny.MODEL)

    @jax.jit
    def run(variables):
        context = model.apply(variables, text, method="project")
        times, place = jnp.full((1, 2), 500.0), jnp.arange(2)
        return model.apply(variables, latents, times, context, bidirectional(2), place)[
            0
        ]

    return np.asarray(run(variables))


@pytest.mark.slow
def test_fresh_updates_change_nothing_and_trained_ones_equal_their_merge():
    params = tiny.params()
    adapters = lora.init(params, 3, jax.random.key(0))

    fresh = flow(params=params, lora=adapters)
    np.testing.assert_array_equal(fresh, flow(params=params))

    moved = jax.tree.map(lambda x: x + 0.05 * jnp.ones_like(x), adapters)
    apart = flow(params=params, lora=moved)
    assert np.abs(apart - flow(params=params)).max() > 1e-2
    np.testing.assert_allclose(apart, flow(params=lora.merge(params, moved)), atol=1e-4)


def test_rank_256_trains_as_many_parameters_as_the_release():
    params = jax.eval_shape(lambda r: dit.init_params(WAN_1_3B, r), jax.random.key(0))

    adapters = jax.eval_shape(lambda p: lora.init(p, 256, jax.random.key(0)), params)

    leaves = jax.tree.leaves(adapters)
    assert sum(x.size for x in leaves) == 349_962_240
    assert sum(x.shape[0] for x in leaves) == 2 * 300
