"""Memory that is read over and over, in pages of 2 MiB: with those of 4 KiB a core looks pages up half of the time."""

import ctypes
import sys

HUGE = 2**21
MADV_COLLAPSE = 25


def into_huge_pages(address: int, nbytes: int) -> None:
    """Bring what lies there together in huge pages, as far as Linux (6.1) has them; what is written there stays."""
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for page in range(address // HUGE * HUGE, address + nbytes, HUGE):
        madvise(page, HUGE, MADV_COLLAPSE)  # fails where there is a hole in it, or none are left: then nothing is lost
