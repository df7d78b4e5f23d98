import functools

import bundles
import chex
import jax
import pytest
import tiny
from ported import SMALL_VAE

from anchor_jax.wan import dit, shapes
from anchor_jax.wan.vae import WanVae


@pytest.mark.slow
def test_shapes_are_those_of_the_initialisation():
    init = functools.partial(dit.init_params, tiny.MODEL)
    made = jax.eval_shape(init, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes.of(tiny.MODEL), made)
    # The temporal layers of a VAE have parameters even where one frame is encoded.
    pixels = jax.ShapeDtypeStruct((1, 5, 4, 4, 3), "float32")
    made = jax.eval_shape(WanVae(SMALL_VAE).init, jax.random.key(0), pixels)
    found = shapes.of(SMALL_VAE)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, made["params"])


@pytest.mark.parametrize("config", [tiny.MODEL, bundles.TEXT, SMALL_VAE])
def test_each_caller_has_a_tree_of_its_own(config):
    first = shapes.of(config)
    expected = jax.tree.structure(first)

    first.clear()

    assert jax.tree.structure(shapes.of(config)) == expected


def test_a_network_of_no_known_kind_is_refused():
    with pytest.raises(TypeError, match="expected"):
        shapes.of("1.3B")
