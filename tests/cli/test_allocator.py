import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from anchor_jax.cli.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
usual = faults()
assert keep_freed_memory()
faults()
print(usual, faults())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="needs the GNU C library's malloc"
)
def test_freed_memory_is_used_again_without_asking_the_system():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )

    usual, kept = map(int, done.stdout.split())
    assert kept < usual / 10
