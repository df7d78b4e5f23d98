"""Computes how much memory a stream needs, before anything is allocated."""

import dataclasses
import math
import os
import pathlib
import resource

import jax

from anchor_jax import parallel, trees
from anchor_jax.errors import UserError
from anchor_jax.streaming.types import StreamSetup

MOST_FRAMES = 4096
"""Largest window and block in latent frames: 17 minutes."""
MOST_LEVELS = 1024
"""Largest number of noise levels of a sampler."""

_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclasses.dataclass(frozen=True)
class Need:
    """Minimum memory of a stream in bytes, by part.

    Attributes:
      cache: keys and values of past frames.
      context: keys and values of the prompt.
      latents: stored clean latents, and the noise of a block.
      pixels: a decoded block.
    """

    cache: int
    context: int
    latents: int
    pixels: int

    @property
    def total(self) -> int:
        return self.cache + self.context + self.latents + self.pixels

    @property
    def lower(self) -> str:
        """The fields to reduce, with those of the largest part first."""
        if self.cache >= max(self.latents, self.pixels):
            return "window, size or batch"
        return "block, size, batch or the number of noise levels"


def need(setup: StreamSetup, batch: int = 1) -> Need:
    """Returns the memory that a stream needs, without allocating it.

    Weights and activations are not included.
    """
    model, policy = setup.model, setup.policy
    rows_cols = setup.tokens
    tokens = rows_cols[0] * rows_cols[1]
    prior = policy.junction_frames if policy.keeps_prior else 0
    # Keys and values of one token, of all layers.
    token = 2 * model.num_layers * model.dim * trees.itemsize(model.dtype)
    rows = batch * setup.copies
    values = batch * setup.grid.height * setup.grid.width
    noise = (
        len(setup.levels)
        * policy.block
        * trees.itemsize(setup.solver.dtype(model.dtype))
    )
    recent = setup.recent * trees.itemsize(model.dtype)
    # Without a cache no block stores the keys and values of all layers.
    held = policy.slots + prior + policy.block if policy.remembers else 0
    return Need(
        cache=token * rows * tokens * held,
        context=token * rows * model.text_len,
        latents=values * model.latent_channels * (noise + recent),
        # Three channels per pixel.
        pixels=values * policy.block * math.prod(model.family.strides) * 3,
    )


def check(setup: StreamSetup, batch: int = 1, where: str = "") -> None:
    """Raises UserError if a stream cannot fit into memory.

    Args:
      setup: the stream's setup.
      batch: number of videos generated together.
      where: the name of the setup in messages, such as a file, or "".
    """
    start = f"{where}: " if where else ""
    policy = setup.policy
    needed = need(setup, batch)
    takes = f"at least {needed.total} bytes ({_gigabytes(needed.total)}) of memory"
    for name, value, most in (
        ("window", policy.window, MOST_FRAMES),
        ("block", policy.block, MOST_FRAMES),
        ("the number of noise levels", len(setup.levels), MOST_LEVELS),
    ):
        if value > most:
            raise UserError(
                f"{start}{name}={value}: must be at most {most}; it would take"
                f" {takes}; reduce it"
            )
    available = available_bytes()
    if needed.total > available:
        height, width = setup.model.family.pixel_size(setup.grid)
        size = f"{height}x{width}"
        raise UserError(
            f"{start}window={policy.window}, block={policy.block}, size={size} and"
            f" batch={batch} take {takes}, {_gigabytes(needed.cache)} of it for the"
            f" cache, but {available} bytes ({_gigabytes(available)}) are available;"
            f" reduce {needed.lower}"
        )


def available_bytes() -> float:
    """Returns the bytes available to a stream, on its devices or on the host.

    For a device this is all memory that JAX may use, or infinity if JAX reports none.
    For the host it is the free memory within the process's limits.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return _host_bytes()
    limit = (device.memory_stats() or {}).get("bytes_limit") or math.inf
    return limit * (jax.device_count() if parallel.is_on_mesh() else 1)


def _host_bytes() -> float:
    found = [math.inf, *map(_number, _CGROUPS)]
    known = _lines("/proc/meminfo")
    if "MemAvailable" in known:
        found.append(1024 * int(known["MemAvailable"].split()[0]))
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY:
        used = _lines("/proc/self/status").get("VmSize", "0 kB")
        found.append(max(0, allowed - 1024 * int(used.split()[0])))
    least = min(found)
    if least < math.inf:
        return least
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _lines(path: str) -> dict[str, str]:
    """Returns the lines `NAME: VALUE` of a system file, or {} if it is missing."""
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name: rest for name, _, rest in (line.partition(":") for line in lines)}


def _number(path: str) -> float:
    """Returns the number in a system file, or infinity if there is none."""
    try:
        return int(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return math.inf


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
