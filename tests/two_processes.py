"""A process of a job of two, which counts programs that it finds in the cache.

Run as `python two_processes.py PORT NUMBER`. The last line that it prints has the
programs that were requested, and those that were found.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from anchor_jax import compile_cache

_EVENTS = "/jax/compilation_cache/"


def main():
    port, number = sys.argv[1:]
    counts = dict.fromkeys(("compile_requests_use_cache", "cache_hits"), 0)

    def count(event, **more):
        name = event.removeprefix(_EVENTS)
        if name in counts:
            counts[name] += 1

    jax.monitoring.register_event_listener(count)
    compile_cache.enable(print)
    jax.distributed.initialize(
        f"localhost:{port}", 2, int(number), cluster_detection_method="deactivate"
    )
    mesh = jax.make_mesh((2,), ("data",))
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    split = NamedSharding(mesh, PartitionSpec("data"))
    both = jax.make_array_from_callback(rows.shape, split, lambda where: rows[where])
    total = jax.jit(lambda x: (x * 2).sum())(both)  # over both processes
    alone = jax.jit(lambda x: jnp.sin(x).sum())(jnp.arange(5.0))  # on one device
    np.testing.assert_allclose(float(total), 56)
    np.testing.assert_allclose(float(alone), np.sin(np.arange(5)).sum(), rtol=1e-5)
    sys.stdout.write(f"{' '.join(map(str, counts.values()))}\n")


if __name__ == "__main__":
    main()
