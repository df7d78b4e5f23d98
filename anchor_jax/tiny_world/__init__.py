"""The tiny world: scenes, captions and scores to try every part of the package.

A domain of `anchor_jax.plugins`: the core finds its parts here, by role and name.
"""

PARTS = {
    "codecs": {"linear": "anchor_jax.tiny_world.codec:LINEAR"},
    "prompts": {"world_prompts": "anchor_jax.tiny_world.prompts:PROMPTS"},
    "clips": {
        "world_clips": "anchor_jax.tiny_world.sources:CLIPS",
        "world_windows": "anchor_jax.tiny_world.sources:WINDOWS",
    },
    "metrics": {"world_match": "anchor_jax.tiny_world.metrics:world_match"},
    "trials": {
        "switch": "anchor_jax.tiny_world.trials:SWITCH",
        "events": "anchor_jax.tiny_world.trials:EVENTS",
        "minute": "anchor_jax.tiny_world.trials:MINUTE",
    },
    "ablations": {"paper": "anchor_jax.tiny_world.ablate:PAPER"},
    "initial weights": {"fresh": "anchor_jax.tiny_world.fresh:save_fresh"},
}
