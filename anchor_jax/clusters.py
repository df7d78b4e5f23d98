"""Finds the place of this process in a job: from flags, variables or the scheduler."""

import dataclasses
import glob
import importlib.util
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Mapping

from anchor_jax.errors import UserError, shown

WAIT = 300
"""Seconds to wait for the first process's host and for all processes to join."""

COORDINATOR, COUNT, INDEX = "coordinator", "num_processes", "process_id"
VARIABLES = {
    COORDINATOR: "JAX_COORDINATOR_ADDRESS",
    COUNT: "JAX_NUM_PROCESSES",
    INDEX: "JAX_PROCESS_ID",
}
"""The variable that is read for each flag that is not given."""
PORT = "JAX_COORDINATOR_PORT"

_MEANING = {
    COORDINATOR: "address of process 0's host and a free port on it, such as"
    " 10.0.0.1:1234",
    COUNT: "number of processes, at least 1",
    INDEX: "number of this process, from 0",
}
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
_PORTS = 4096  # highest ports, which Linux does not give to other programs by itself
_KUBERNETES = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")
_FROM_JAX = {
    "GkeTpuCluster": "TPU slice",
    "GceTpuCluster": "TPU slice",
    "K8sCluster": "Kubernetes",
}


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process in a job.

    Attributes:
      found_in: source of the values, for messages.
      count: number of processes in the job.
      index: number of this process.
      coordinator: HOST:PORT of process 0, where the processes meet; "" if this is the
        only process.
      devices: numbers of this host's accelerators that this process uses. None uses all
        that it sees.
    """

    found_in: str
    count: int
    index: int
    coordinator: str = ""
    devices: tuple[int, ...] | None = None


def find(
    given: Mapping[str, str | int | None],
    environ: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Place | None:
    """Returns the place of this process, or None outside a job.

    Flags come before jax's variables, and these before the values of the scheduler.

    Args:
      given: the flags `coordinator`, `num_processes` and `process_id`; None if absent.
      environ: variables. None takes those of this process.
      tell: called with a warning.

    Raises:
      UserError: Values are missing or wrong, or the scheduler's cannot be read.
    """
    environ = os.environ if environ is None else environ
    values = explicit(given, environ)
    if len(values) == len(VARIABLES) or values.get(COUNT) == 1:
        return _checked(values, "flags and variables", None)
    found = in_slurm(environ) or _by_jax(environ, tell)
    if found is None:
        return _checked(values, "flags and variables", None) if values else None
    known = {COORDINATOR: found.coordinator, COUNT: found.count, INDEX: found.index}
    return _checked(known | values, found.found_in, found.devices)


def explicit(
    given: Mapping[str, str | int | None], environ: Mapping[str, str]
) -> dict[str, str | int]:
    """Returns the values that flags and jax's variables give; absent ones are left out.

    Raises:
      UserError: A variable is not a number.
    """
    values = {}
    for name, variable in VARIABLES.items():
        value = given.get(name)
        if value is None:
            value = environ.get(variable) or None
            if value is not None and name != COORDINATOR:
                value = _number(variable, value)
        if value is not None:
            values[name] = value
    return values


def may_be_several(
    given: Mapping[str, str | int | None], environ: Mapping[str, str]
) -> bool:
    """Returns whether `find` may find several processes; asks no server."""
    values = explicit(given, environ)
    if COUNT in values:
        return values[COUNT] > 1
    slurm = in_slurm(environ)
    if slurm is not None:
        return slurm.count > 1
    tpu = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(tpu) or all(name in environ for name in _KUBERNETES)


def split_address(address: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT; an IPv6 address is in brackets.

    Raises:
      UserError: It has another form, or no process could connect to it.
    """
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^:\s/\[\]]+):(\d{1,5})", address)
    if not found or not 0 < int(found[2]) < 65536:
        raise UserError(
            f"--coordinator={shown(address)}: must be HOST:PORT with a port from 1 to"
            " 65535, such as 10.0.0.1:1234"
        )
    host = found[1].strip("[]")
    if host in ("0.0.0.0", "::", "*"):
        raise UserError(
            f"--coordinator={shown(address)}: other processes cannot connect to this"
            " address; give the private address of process 0's host"
        )
    return host, int(found[2])


def bind_address(
    coordinator: str, environ: Mapping[str, str], tell: Callable[[str], None]
) -> str:
    """Returns where process 0 listens: the one address of this host that others use.

    The port takes commands from everyone who reaches it. So it is not opened on every
    network of the host.

    Args:
      coordinator: HOST:PORT.
      environ: variables; `JAX_COORDINATOR_BIND_ADDRESS` takes precedence.
      tell: called with a warning if the address is public.
    """
    chosen = environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    if chosen:
        return chosen
    host, port = split_address(coordinator)
    address = _resolve(host)
    named = host != "localhost" and not _is_loopback(host)
    if address is None or (_is_loopback(address) and named):
        # Some systems map a host's own name to the loopback interface.
        address = _private_address()
    if address is None:
        tell(_open_port(f"port {port} of every network of this host"))
        return f"[::]:{port}"
    if ipaddress.ip_address(address).is_global:
        tell(_open_port(f"{address}:{port}, a public address,"))
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _open_port(where: str) -> str:
    return (
        f"warning: {where} takes commands of this job without a password; close it to"
        " other networks, or give a private address with --coordinator"
    )


def in_slurm(environ: Mapping[str, str]) -> Place | None:
    """Returns the place in a Slurm step, or None outside one.

    Source: jax's Slurm detection, except that a task that sees several GPUs and is
    alone on its host gets all of them, and that a step with one task is one process.

    Raises:
      UserError: A variable of Slurm is not a number.
    """
    if not all(environ.get(name) for name in _SLURM):
        return None
    total = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1"
    count = _number("SLURM_STEP_NUM_TASKS", total)
    index = _number("SLURM_PROCID", environ["SLURM_PROCID"])
    step = _number("SLURM_STEP_ID", environ.get("SLURM_STEP_ID") or "0")
    job = _number("SLURM_JOB_ID", environ["SLURM_JOB_ID"])
    port = environ.get(PORT) or 65536 - _PORTS + (job + 7 * step) % _PORTS
    host = _first_host(environ["SLURM_STEP_NODELIST"])
    devices = _slurm_devices(environ) if count > 1 else None
    return Place("Slurm", count, index, f"{host}:{port}", devices)


def _first_host(nodes: str) -> str:
    """Returns the first name of a list such as `node[001-008,012],login`."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    if not found:
        raise UserError(
            f"SLURM_STEP_NODELIST={shown(nodes)} is not a list of hosts; give"
            " --coordinator=HOST:PORT"
        )
    return "".join(part or "" for part in found.groups())


def _slurm_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Returns the GPUs of this task, or None if Slurm shows it only its own ones."""
    if environ.get("JAX_LOCAL_DEVICE_IDS"):
        return tuple(
            _number("JAX_LOCAL_DEVICE_IDS", one)
            for one in environ["JAX_LOCAL_DEVICE_IDS"].split(",")
        )
    tasks, local = _tasks_on_host(environ), int(environ["SLURM_LOCALID"])
    seen = _seen_gpus(environ)
    on_host = environ.get("SLURM_GPUS_ON_NODE") or ""
    on_host = int(on_host) if on_host.isdecimal() else seen
    if tasks == 1 or seen < on_host or seen < tasks:
        return None
    each = seen // tasks
    return tuple(range(local * each, (local + 1) * each))


def _tasks_on_host(environ: Mapping[str, str]) -> int:
    """Returns the tasks of the step on this host, from a text such as `2(x3),1`."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = environ.get(name) or environ.get("SLURM_TASKS_PER_NODE") or "1"
    counts = []
    for part in text.split(","):
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [_number(name, tasks)] * _number(name, times or "1")
    node = _number("SLURM_NODEID", environ.get("SLURM_NODEID") or "0")
    return counts[node] if node < len(counts) else counts[-1]


def _seen_gpus(environ: Mapping[str, str]) -> int:
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip()])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _by_jax(environ: Mapping[str, str], tell: Callable[[str], None]) -> Place | None:
    """Returns the place that jax finds on TPU hosts and in Kubernetes jobs, or None."""
    in_kubernetes = all(name in environ for name in _KUBERNETES)
    can_ask = importlib.util.find_spec("kubernetes") is not None
    from jax._src import clusters

    for kind in clusters.ClusterEnv._cluster_types:  # noqa: SLF001
        name = _FROM_JAX.get(kind.__name__)
        if name and (kind.__name__ != "K8sCluster" or (in_kubernetes and can_ask)):
            found = _ask(kind, name, environ)
            if found is not None:
                return found
    if in_kubernetes and not can_ask:
        tell(
            "warning: this pod belongs to an indexed job of Kubernetes, but jax cannot"
            " ask for its other pods; this process works alone. Set"
            f" {', '.join(VARIABLES.values())}, or install jax[k8s] and let the pods"
            " read jobs and pods"
        )
    return None


def _ask(kind, name: str, environ: Mapping[str, str]) -> Place | None:
    """Returns the place that one of jax's classes finds, or None."""
    try:
        if not kind.is_env_present():
            return None
        count = kind.get_process_count()
        if count == 1:
            return Place(name, 1, 0)
        index = kind.get_process_id()
        address = kind.get_coordinator_address(WAIT, environ.get(PORT))
        return Place(name, count, index, address)
    # Jax asks a server of the cluster, and raises the errors of its clients.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{name}: jax cannot find the other processes ({reason}); give"
            " --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error


def _checked(values, found_in: str, devices: tuple[int, ...] | None) -> Place:
    """Returns a place, after checking that it is complete and in range."""
    count = values.get(COUNT)
    if count is not None and count < 1:
        raise UserError(f"--num_processes={count}: must be at least 1")
    if count == 1:
        return _alone(values, found_in)
    missing = [name for name in VARIABLES if not values.get(name) and name != INDEX]
    missing += [INDEX] if INDEX not in values else []
    if missing:
        raise UserError(_incomplete(values, missing))
    index = values[INDEX]
    if not 0 <= index < count:
        raise UserError(
            f"--process_id={index}: must be from 0 to {count - 1}, because"
            f" --num_processes={count}"
        )
    split_address(values[COORDINATOR])
    return Place(found_in, count, index, values[COORDINATOR], devices)


def _alone(values, found_in: str) -> Place:
    if values.get(INDEX, 0) != 0:
        raise UserError(
            f"--process_id={values[INDEX]}: must be 0, because --num_processes=1"
        )
    return Place(found_in, 1, 0)


def _incomplete(values, missing: list[str]) -> str:
    have = ", ".join(f"--{name}={value}" for name, value in values.items())
    need = "; ".join(
        f"--{name} (or {VARIABLES[name]}): {_MEANING[name]}" for name in missing
    )
    return (
        f"{have} alone does not describe a job of several processes; give also {need}."
        " For one process give none of them"
    )


def _number(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise UserError(f"{name}={shown(text)}: must be a whole number of at least 0")
    return int(text)


def _resolve(host: str) -> str | None:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return None


def _private_address() -> str | None:
    """Returns this host's address on its private network, or None if unknown."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # Sends nothing.
            address = probe.getsockname()[0]
        except OSError:
            return None
    return None if _is_loopback(address) else address


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
