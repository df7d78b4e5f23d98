"""The names of `anchor_jax.weights` that a program imports; the package does not."""

from anchor_jax.weights.bundle import Bundle, PromptEncoder
from anchor_jax.weights.load import load_bundle
from anchor_jax.weights.single_file import save_bundle, save_loaded

__all__ = ["Bundle", "PromptEncoder", "load_bundle", "save_bundle", "save_loaded"]
