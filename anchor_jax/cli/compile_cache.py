"""The cache of compiled programs, with its warnings on standard error."""

from anchor_jax.cli.output import to_stderr
from anchor_jax.places import Place


def enable() -> Place | None:
    """Turns on the cache of compiled programs and returns its folder, or None.

    Raises:
      UserError: The device that `JAX_PLATFORMS` names is missing.
    """
    from anchor_jax import compile_cache, devices

    devices.check()
    return compile_cache.enable(to_stderr)
