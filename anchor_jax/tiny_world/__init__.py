"""The tiny world: scenes, captions and scores with which everything can be tried.

A domain of `anchor_jax.plugins`: the core finds its parts here, by role and name.
"""

PARTS = {
    "codecs": {"linear": "anchor_jax.tiny_world.codec:LINEAR"},
}
