"""Checks that the requested devices and processes are present."""

import os

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


def check_processes() -> None:
    """Checks that this process has joined the cluster that its environment describes.

    Raises:
      UserError: The environment asks for several processes, but JAX has only this one.
    """
    count = os.environ.get("JAX_NUM_PROCESSES") or "1"
    if count != "1" and jax.process_count() == 1:
        raise UserError(
            f"JAX_NUM_PROCESSES={shown(count)}: this process has not joined the others,"
            " so each would work alone; use anchor-jax train, or call"
            " anchor_jax.processes.join() in a program of your own before a device is"
            " requested, or unset the variable to use one process"
        )


def _explain(wanted: str, reason: str) -> str:
    names = [name for name in wanted.split(",") if name != "cpu"]
    remedies = dict.fromkeys(
        f"install its extra: {extras.install(_EXTRAS[name])}"
        for name in names
        if name in _EXTRAS
    )
    # JAX adds advice of its own in brackets.
    reason = " ".join(reason.split()).partition(" (set JAX_PLATFORMS")[0][:300]
    return (
        f"JAX_PLATFORMS={shown(wanted)}: JAX cannot use this device on this machine"
        f"{f' ({reason})' if reason else ''}; {', or '.join(remedies) or _KNOWN}; or"
        " unset JAX_PLATFORMS to use the device that is present"
    )
