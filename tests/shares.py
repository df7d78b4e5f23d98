"""A check of batches that several processes make together."""

import numpy as np

from anchor_jax.training.data.order import SHARED, Share


def assert_shared(draw):
    """Two shares of a batch of four, made by `draw(share)`, are the whole batch."""
    whole = draw(None)
    parts = [draw(Share(4, np.asarray(rows))) for rows in ((0, 2), (1, 3))]

    assert whole.keys() == parts[0].keys() == parts[1].keys()
    for name, value in whole.items():
        for start, part in enumerate(parts):
            expected = value if name in SHARED else value[start::2]
            # Prompts may be encoded together with others.
            np.testing.assert_allclose(part[name], expected, atol=1e-6, err_msg=name)
