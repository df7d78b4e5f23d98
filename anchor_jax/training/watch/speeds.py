"""How fast a process multiplies matrices, reads and writes, and adds up with others."""

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from anchor_jax import io, places

_REPEATS = 3
_PRODUCTS = 20  # per measurement, in one program
_MIB = 2**20


class TooLate(Exception):
    """A measurement did not end in time."""


class WrongResult(Exception):
    """A device, network or disk gave a result that is not right."""


def within(seconds: float, measure: Callable[[], Any]) -> Any:
    """Returns the result of a measurement that a thread makes.

    Raises:
      TooLate: It has not ended. The thread continues.
    """
    results, errors = [], []

    def run() -> None:
        try:
            results.append(measure())
        except Exception as error:  # noqa: BLE001 - the caller raises it.
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TooLate(f"no result within {seconds:g} s")
    return results[0]


def matmul() -> list[float]:
    """Returns the bfloat16 operations per second of each device of this process."""
    size = 256 if jax.default_backend() == "cpu" else 8192

    @jax.jit
    def multiply(x):
        return jax.lax.fori_loop(0, _PRODUCTS, lambda _, y: x @ y, x)

    found = []
    for device in jax.local_devices():
        # Its powers are all equal.
        x = jax.device_put(jnp.full((size, size), 1 / size, jnp.bfloat16), device)
        seconds = _best(lambda x=x: multiply(x))
        found.append(2.0 * size**3 * _PRODUCTS / seconds)
    return found


def all_reduce() -> float:
    """Returns the bytes per second at which all devices add up arrays of one size.

    All processes must call it.

    Raises:
      WrongResult: The sum is wrong.
    """
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("all",))
    split = NamedSharding(mesh, P("all"))
    size = (1 if jax.default_backend() == "cpu" else 64) * _MIB // 4
    add = functools.partial(jax.lax.psum, axis_name="all")
    # Whole numbers whose sum is exact in float32.
    rows = np.arange(1.0, len(devices) + 1, dtype=np.float32)
    x = jax.make_array_from_callback(
        (len(devices), size),
        split,
        lambda index: np.broadcast_to(rows[index[0], None], (1, size)),
    )
    run = jax.jit(jax.shard_map(add, mesh=mesh, in_specs=P("all"), out_specs=P(None)))
    seconds = _best(lambda: run(x))
    for shard in run(x).addressable_shards:
        low, high = float(shard.data.min()), float(shard.data.max())
        if not low == high == rows.sum():
            raise WrongResult(
                f"the sum of 1 to {len(devices)} over all devices is {low:g} to"
                f" {high:g} on {shard.device}, expected {rows.sum():g}"
            )
    return 4 * size / seconds


def disk(folder: io.Place, name: str) -> tuple[float, float]:
    """Returns the bytes per second at which a file is written, and read again.

    Args:
      folder: the folder of the file.
      name: its name; it is removed.

    Raises:
      WrongResult: Other bytes are read.
      OSError: The file cannot be written or read.
    """
    size = (1 if jax.default_backend() == "cpu" else 64) * _MIB
    content, path = np.random.default_rng(0).bytes(size), folder / name
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            if not places.is_remote(path):
                _settle(file)
        written = time.perf_counter()
        found = path.read_bytes()
        seconds = time.perf_counter() - written
    finally:
        path.unlink(missing_ok=True)
    if found != content:
        raise WrongResult(f"{path}: other bytes are read than were written")
    return size / (written - began), size / seconds


def _settle(file) -> None:
    """Writes a file to its disk, and forgets what memory keeps of it."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _best(run: Callable[[], jax.Array]) -> float:
    """Returns the shortest seconds of some runs, after one that compiles."""
    run().block_until_ready()
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        run().block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
