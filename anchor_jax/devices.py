"""Checks that the requested device is present."""

import jax

from anchor_jax import extras
from anchor_jax.errors import UserError, shown

_KNOWN = "give cpu, cuda or tpu"
_EXTRAS = {"cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}


def check(wanted: str | None = None) -> None:
    """Checks that the requested devices can be used.

    Args:
      wanted: the value of `JAX_PLATFORMS`; None takes that of this process. The
        named devices are initialised. If it is empty, nothing happens.

    Raises:
      UserError: JAX cannot use such a device. The message names the extra to install.
    """
    wanted = jax.config.jax_platforms if wanted is None else wanted
    if not wanted:
        return
    try:
        jax.devices()
    # Without a GPU some versions of jax raise an AssertionError.
    except (AssertionError, RuntimeError) as error:
        raise UserError(_explain(wanted, str(error))) from error


def _explain(wanted: str, reason: str) -> str:
    names = [name for name in wanted.split(",") if name != "cpu"]
    remedies = dict.fromkeys(
        f"install its extra: {extras.install(_EXTRAS[name])}"
        for name in names
        if name in _EXTRAS
    )
    reason = " ".join(reason.split())[:300]
    return (
        f"JAX_PLATFORMS={shown(wanted)}: JAX cannot use this device on this machine"
        f"{f' ({reason})' if reason else ''}; {', or '.join(remedies) or _KNOWN}; or"
        " unset JAX_PLATFORMS to use the device that is present"
    )
