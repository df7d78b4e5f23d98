"""Settings of this process's memory allocator."""

import ctypes

# Options in malloc.h of the GNU C library.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**28), (_ARENA_MAX, 1))


def keep_freed_memory() -> bool:
    """Lets the process keep what it frees, and returns whether it can.

    A program that jax compiled for a CPU takes new working memory for each call;
    requesting gigabytes from the system takes a tenth of a training step. Call it
    before threads start.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # This is not the GNU C library.
    return all([mallopt(name, value) == 1 for name, value in _SETTINGS])
