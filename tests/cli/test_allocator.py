import platform
import subprocess
import sys

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
can = keep_freed_memory()
faults()
print(int(can), usual, faults())
"""


def test_freed_memory_is_used_again_without_asking_the_system():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )

    can, usual, kept = map(int, done.stdout.split())
    assert can == (platform.libc_ver()[0] == "glibc")
    assert not can or kept < usual / 10
