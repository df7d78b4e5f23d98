"""How the processes of a job reach process 0, and why they may not."""

import ipaddress
import os
import re
import socket
import time
from collections.abc import Callable

from anchor_jax import clusters, interrupts
from anchor_jax.errors import UserError, shown

_BIND = "JAX_COORDINATOR_BIND_ADDRESS"
_ADDRESS = re.compile(r"(\[[^\[\]]+\]|[^\[\]:]+)(?::(\d{1,5}))?")
_CHECKS = (
    "check that process 0 runs on that host, that the port is free there and open"
    " between the hosts, and that every process has its own --process_id"
)


def failed(place: clusters.Place, what: str) -> str:
    """Returns the message for a failure to meet: the given values, and what to check.

    Args:
      place: the place of this process.
      what: the failure.
    """
    return f"{_given(place)}: {what}; {_CHECKS}"


def _given(place: clusters.Place) -> str:
    return (
        f"--coordinator={place.coordinator} --num_processes={place.count}"
        f" --process_id={place.index} (from {place.found_in})"
    )


def own_address(place: clusters.Place, tell: Callable[[str], None]) -> str:
    """Returns HOST:PORT where process 0 listens.

    Args:
      place: the place of this process.
      tell: called with a warning if the address is public.

    Raises:
      UserError: The variable JAX_COORDINATOR_BIND_ADDRESS has no valid address.
    """
    found = clusters.bind_address(place.coordinator, os.environ, tell)
    if not os.environ.get(_BIND):
        return found
    if _is_ipv6(found):
        found = f"[{found}]"
    parts = _ADDRESS.fullmatch(found)
    port = clusters.split_address(place.coordinator)[1]
    if not parts or not 0 < int(parts[2] or port) < 2**16:
        raise UserError(
            f"{_BIND}={shown(found)}: give ADDRESS or ADDRESS:PORT of process 0's host,"
            " such as 10.0.0.1:1234 or [fd00::1]:1234, or remove the variable"
        )
    return f"{parts[1]}:{parts[2] or port}"


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def check_free(place: clusters.Place, bind: str) -> None:
    """Raises UserError if another program uses the coordinator's port."""
    host, port = bind.rpartition(":")[::2]
    family = socket.AF_INET6 if "[" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise UserError(
                f"{_given(place)}: process 0 cannot open {bind} ({error.strerror});"
                " choose another port, and give an address of process 0's host"
            ) from error


def await_coordinator(place: clusters.Place, wait: int) -> None:
    """Waits until process 0 listens.

    Jax itself would end the process with messages of its network library.

    Args:
      place: the place of this process.
      wait: seconds to wait.

    Raises:
      UserError: Process 0 does not answer.
    """
    deadline = time.monotonic() + wait
    while True:
        interrupts.check()
        try:
            socket.create_connection(
                clusters.split_address(place.coordinator), timeout=5
            ).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                what = f"no answer within {wait} s ({error})"
                raise UserError(failed(place, what)) from error
        time.sleep(0.2)
