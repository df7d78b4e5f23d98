"""Settings of every test: the CPU, seen as four devices."""

import os
import pathlib
import platform

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA: collectives of simulated devices block one each, and with as many
# threads as a small machine has cores they wait for one another for ever.
os.environ.setdefault("NPROC", "16")

import jax
import pytest

DEVICES = 4

if jax.config.jax_num_cpu_devices != DEVICES:
    # Refused once a device has been used, hence before any test is imported.
    jax.config.update("jax_num_cpu_devices", DEVICES)

# Compiled programs are kept in the checkout: a second run starts sooner. They hold
# for one kind of machine only.
_kept = pathlib.Path(__file__).parents[1] / ".jax_cache" / platform.machine()
_kept.mkdir(parents=True, exist_ok=True)
_kept.chmod(0o700)
jax.config.update("jax_compilation_cache_dir", str(_kept))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Compiling, not running, is what takes the time; see `optimized_compilation`.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A process may map only a limited number of compiled programs at once."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def optimized_compilation():
    """Programs as users have them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
