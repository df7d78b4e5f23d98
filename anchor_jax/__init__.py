"""Anchor Forcing in JAX/Flax: interactive streaming text-to-video."""

__version__ = "0.1.0"
