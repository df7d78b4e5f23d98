"""One host of a TPU slice alone: the variables that tell the library for TPUs.

Otherwise the library makes one machine of all hosts of the slice. Then jax shows every
process the devices of all hosts, and the loss of one process disturbs the others.

Source: jax/_src/test_multiprocess.py, which starts processes that own some chips of a
host, and https://gist.github.com/skye/f82ba45d2445bb19d53545538754f9a3.
"""

from collections.abc import MutableMapping

from anchor_jax.errors import UserError

_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
_PORT = 8491  # not the one of coordinators
_GIVEN = (
    *("TPU_PROCESS_BOUNDS", "TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_VISIBLE_CHIPS"),
    "TPU_VISIBLE_DEVICES",
)
# Kubernetes sets these for the whole slice; without them the chips are asked.
_OF_SLICE = ("TPU_TOPOLOGY", "TPU_TOPOLOGY_WRAP", "TPU_TOPOLOGY_ALT")
_OF_SLICES = "MEGASCALE_"


def separate(environ: MutableMapping[str, str], chips: int) -> None:
    """Sets the variables with which a process uses the chips of its own host only.

    It does nothing without chips, or if the user has chosen chips by these variables.
    Call it before a device is requested.

    Args:
      environ: variables, which are changed.
      chips: number of TPU chips of this host.

    Raises:
      UserError: The arrangement of this number of chips is not known.
    """
    if not chips or any(environ.get(name) for name in _GIVEN):
        return
    if chips not in _BOUNDS:
        raise UserError(
            f"this host has {chips} TPU chips, whose arrangement is unknown (known are"
            f" {', '.join(map(str, _BOUNDS))}); set {', '.join(_GIVEN[:3])} for one"
            " process that uses all of them"
        )
    for name in [*environ]:
        if name in _OF_SLICE or name.startswith(_OF_SLICES):
            del environ[name]
    bounds = _BOUNDS[chips]
    environ |= {
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": bounds,
        "TPU_VISIBLE_CHIPS": ",".join(map(str, range(chips))),
        "TPU_PROCESS_ADDRESSES": f"localhost:{_PORT}",
        "TPU_PROCESS_PORT": str(_PORT),
        "CLOUD_TPU_TASK_ID": "0",
        # Names that Kubernetes sets for the whole slice.
        "TPU_HOST_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_HOST_BOUNDS": bounds,
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def chips_of_host() -> int:
    """Returns the number of TPU chips of this host."""
    from jax._src import hardware_utils

    return hardware_utils.num_available_tpu_chips_and_device_id()[0]


def check() -> None:
    """Raises UserError if jax shows this process the devices of other hosts."""
    import jax

    if jax.process_count() > 1:
        raise UserError(
            f"jax shows this process the devices of {jax.process_count()} hosts, but"
            " each process of this command computes on its own; set"
            f" {', '.join(_GIVEN[:3])} so that a process uses only chips of its host"
        )
