"""What a training step frees on a CPU, the next one has again."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have malloc keep what is freed from now on; where it is not glibc's, nothing changes.

    Large blocks it would give back to the system at once, and have every page of the next one made anew: a fifth of a step
    in bf16.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # no block is one that can only be given back
        mallopt(M_TRIM_THRESHOLD, -1)  # and the heap's end stays
