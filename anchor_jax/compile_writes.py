"""Lets every process of a job keep the programs that it compiled.

In jax only process 0 writes to the cache of compiled programs. Other processes find its
programs only if they share its folder and if the keys agree. On the CPU no key agrees,
because each process has a topology of its own; programs of one device have another key
in each process also on a TPU. Without this module such programs are compiled again at
every start.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

# There is no public way to write from processes other than the first.
from jax._src import compilation_cache, compiler, config, distributed, lru_cache

from anchor_jax import io

_LOG = logging.getLogger(__name__)
_WRITE = [
    *("cache_key", "compile_time_secs", "module_name"),
    *("backend", "executable", "host_callbacks"),
]
_PUT = ["self", "key", "value"]
_SUFFIX = "-cache"


def install() -> bool:
    """Makes all processes write, and each program appear whole; returns whether.

    A version of jax whose functions differ stays unchanged. Then process 0 writes
    alone.
    """
    write = getattr(compiler, "_cache_write", None)
    put = getattr(lru_cache.LRUCache, "put", None)
    if _is_ours(write):
        return True
    if _names(write) != _WRITE or _names(put) != _PUT:
        _LOG.info("only process 0 keeps compiled programs with this version of jax")
        return False
    compiler._cache_write = _writing(write)  # noqa: SLF001
    lru_cache.LRUCache.put = _putting(put)
    return True


def _is_ours(function: Any) -> bool:
    return getattr(function, "__module__", None) == __name__


def _names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters) if function else []


def _writing(write: Callable[..., None]) -> Callable[..., None]:
    """Returns jax's function, extended to the processes that it leaves out."""

    def of_every_process(
        cache_key, compile_time_secs, module_name, backend, executable, host_callbacks
    ):
        if not distributed.global_state.process_id:
            write(
                *(cache_key, compile_time_secs, module_name),
                *(backend, executable, host_callbacks),
            )
            return
        least = config.persistent_cache_min_compile_time_secs.value
        # A callback is an address in this process.
        if host_callbacks or compile_time_secs < least:
            return
        try:
            compilation_cache.put_executable_and_time(
                cache_key, module_name, executable, backend, int(compile_time_secs)
            )
        # A full disk must not end a training. The program is compiled already.
        except Exception as error:  # noqa: BLE001
            _LOG.warning("%s is not kept: %s", module_name, error)

    return of_every_process


def _putting(put: Callable[..., None]) -> Callable[..., None]:
    """Returns jax's function, which then writes a local file whole or not at all.

    Processes that share a folder compile the same programs at the same time.
    """

    def whole(self, key, value):
        place = self.path / f"{key}{_SUFFIX}"
        # Objects of a bucket appear whole, and a cache with a limit has a lock.
        if self.eviction_enabled or "://" in str(place):
            put(self, key, value)
        elif not place.exists():
            with io.replacing(place) as part:
                part.write_bytes(value)

    return whole
