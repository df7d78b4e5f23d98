"""Settings of every test: the CPU, seen as four devices."""

import collections
import os
import pathlib
import platform
import shutil

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling, not running, takes the time. Programs that tests start inherit this.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Threads of XLA: collectives of simulated devices block one each, and with as many
# threads as a small machine has cores they wait for one another without end.
os.environ.setdefault("NPROC", "16")
# The fusion emitters, and splitting the code, take half of the time that these small
# programs compile.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)

import array_checks
import jax
import pytest

array_checks.install()

from anchor_jax import processes  # noqa: E402

# Otherwise two collectives of a simulated device may start at once, and XLA mixes them.
processes.keep_order()

DEVICES = 4
MAPS = 12_000  # of memory; a process may have 65,530, and a program takes dozens.
GIGABYTE = 2**30

if jax.config.jax_num_cpu_devices != DEVICES:
    # Refused once a device has been used, hence before any test is imported.
    jax.config.update("jax_num_cpu_devices", DEVICES)

# A checkpoint is hundreds of files that are synced one by one. In memory that takes
# a fifth of the time.
MEMORY = "/dev/shm"
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * GIGABYTE:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

# Compiled programs are kept in the checkout: a second run starts sooner. They hold
# for one kind of machine only.
_kept = pathlib.Path(__file__).parents[1] / ".jax_cache" / platform.machine()
_kept.mkdir(parents=True, exist_ok=True)
_kept.chmod(0o700)
jax.config.update("jax_compilation_cache_dir", str(_kept))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def pytest_xdist_auto_num_workers():
    """Returns one worker more than cores, since some tests wait for processes."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """Puts files with many slow tests first, so that all workers end together."""
    slow = collections.Counter(
        item.path for item in items if item.get_closest_marker("slow")
    )
    items.sort(key=lambda item: (-slow[item.path], item.path))


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees compiled programs before there are too many to map."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or len(maps.read_text().splitlines()) > MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def optimized_compilation():
    """Programs optimized as for users, apart from the fusion emitters."""
    # Compiled programs are forgotten: the two kinds differ in the last bits, and what
    # another test compares would depend on the order of the tests.
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
