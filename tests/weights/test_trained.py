import jax
import numpy as np
import pytest
from ported import SMALL_VAE, draw_items

from anchor_jax.weights import checkpoint, options
from anchor_jax.weights.lineage import write_run
from anchor_jax.weights.load import load_bundle


@pytest.mark.slow
def test_updates_that_a_training_continued_are_added_once(ported, tmp_path):
    given, base = draw_items(SMALL_VAE)["generator"], str(ported)
    for number in (2, 3):
        folder = tmp_path / str(number)
        update = jax.tree.map(lambda x, by=number: by * x, given["lora"])
        checkpoint.write(folder, {"generator": {"lora": update}}, {"training": {}})
        write_run(folder, base)
        base = str(folder)

    separate, merged, none = (
        load_bundle(base, dtype="float32", lora=how).variables
        for how in options.ADAPTERS
    )

    plain, update = (tree["blocks"]["self_attn"]["q"] for tree in given.values())
    assert set(separate) == {"params", "lora"} and set(none) == {"params"}
    np.testing.assert_allclose(
        separate["lora"]["blocks"]["self_attn"]["q"]["a"], 3 * update["a"], rtol=1e-6
    )
    for tree, by in ((separate, 0), (none, 0), (merged, 9)):
        kernel = tree["params"]["blocks"]["self_attn"]["q"]["kernel"]
        expected = plain["kernel"] + by * update["a"] @ update["b"]
        np.testing.assert_allclose(kernel, expected, atol=1e-5)
