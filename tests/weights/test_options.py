import jax
import numpy as np
import pytest

from anchor_jax.errors import UserError
from anchor_jax.wan.spec import LatentGrid
from anchor_jax.weights.load import load_bundle


@pytest.mark.slow
def test_the_shipped_bundle_takes_the_same_arguments():
    grid = LatentGrid(4, 6)
    plain = load_bundle("tiny")
    loaded = load_bundle("tiny", grid=grid, dtype="bfloat16", text_encoder="free")

    assert (plain.grid, loaded.grid) == (LatentGrid(8, 8), grid)
    leaves = jax.tree.leaves(loaded.variables)
    assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}
    text = "a red ring moves up"
    near = np.asarray(plain.encode_prompts([text]), np.float32)
    found = np.asarray(loaded.encode_prompts([text]), np.float32)
    np.testing.assert_allclose(found, near, atol=0.1 * np.abs(near).max())


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ({"text_encoder": "disk"}, "text_encoder='disk'.*device, free, sharded"),
        ({"lora": "merge"}, "lora='merge'.*did you mean 'merged'"),
        ({"dtype": "float64"}, "dtype='float64'"),
        ({"grid": LatentGrid(5, 4)}, "grid: .*must divide by the patch"),
    ],
)
def test_a_wrong_argument_is_named(argument, part):
    with pytest.raises(UserError, match=part):
        load_bundle("tiny", **argument)
