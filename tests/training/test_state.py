"""Random numbers of a training's steps."""

import jax
import jax.numpy as jnp
import optax

from anchor_jax.training.state import init_state


def drawn(seed=0, step=0, purpose=(1,)):
    state = init_state(seed, {}, optax.identity(), has_ema=False)
    state = state.replace(step=jnp.int32(step))
    return float(jax.random.uniform(state.key(*purpose)))


def test_every_seed_step_and_purpose_has_random_numbers_of_its_own():
    cases = [{}, {"seed": 1}, {"step": 1}, {"purpose": (2,)}, {"purpose": (1, 1)}]

    assert len({drawn(**case) for case in cases}) == len(cases)
    assert drawn() == drawn()
