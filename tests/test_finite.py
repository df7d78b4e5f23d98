"""What is not finite is counted, and weights that hold it are not sampled from."""

import bundles
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from anchor_jax import finite
from anchor_jax.errors import UserError
from anchor_jax.weights import single_file
from anchor_jax.weights.load import load_bundle


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int32]
)
def test_counts_are_those_of_numpy(dtype):
    array = np.zeros((3, 5), dtype)
    assert finite.count(array) == 0
    assert finite.count(np.full((3,), 60000, dtype)) == 0
    if dtype != np.int32:
        array[1, :4] = [np.nan, np.inf, -np.inf, -np.nan]
        assert finite.count(array) == 4
        assert finite.count(array.T) == 4
        assert finite.count(array[1, 3:]) == 1


def test_a_tree_is_refused_by_the_first_name():
    tree = {"a": jnp.zeros(3), "b": {"c": np.full((2,), np.nan, np.float32)}}

    with pytest.raises(UserError, match=r"mine: 2 values.*1 of 2 arrays, first b/c; x"):
        finite.check(tree, "mine", "x")
    finite.check(jax.tree.map(jnp.nan_to_num, tree), "mine", "x")


def test_the_reduction_of_an_accelerator_agrees():
    leaves = [jnp.asarray([1.0, np.inf, np.nan]), jnp.ones(3, jnp.bfloat16)]

    assert [int(one) for one in finite._counts(leaves)] == [2, 0]


@pytest.mark.parametrize("part", ["generator", "text", "codec"])
def test_weights_that_are_not_finite_are_refused_when_they_are_loaded(
    tmp_path, part, monkeypatch
):
    params = jax.tree.map(np.array, bundles.params())
    leaf = jax.tree.leaves(params[part])[0]
    leaf.flat[0] = np.nan
    # Saving refuses such weights too.
    monkeypatch.setattr(single_file, "_half", lambda _, x: np.asarray(x, np.float16))
    bundles.save(tmp_path / "made", params)
    loaded = load_bundle(str(tmp_path / "made"))

    with pytest.raises(UserError, match="1 values are not finite"):
        jax.block_until_ready(
            (loaded.variables, loaded.codec_params, loaded.encode_prompts.params)
        )
