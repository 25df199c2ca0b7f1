"""Sorted rows: whose they are, and how many of them stay in cache."""

from itertools import pairwise

from torch import Tensor

from accessory.parallel.planned import borders_on_host

CACHE_BYTES = 2**22
"""Size of one intermediate value [rows, F] that still stays in cache through several passes over it."""

MEMORY_BOUND_ROWS = 64
"""Rows up to which a product takes the time of reading its matrix, so that padding costs nothing."""
EVEN = 16


def even_count(rows: int) -> int:
    """So many rows, or the next multiple of EVEN where they are many.

    oneDNN prepares a product for each number of rows that it meets, which takes 0.3 to 1 ms and stays in memory. A router
    gives new numbers in every step, so most products would be prepared anew each time (benchmarks/README.md).
    """
    return rows if rows <= MEMORY_BOUND_ROWS else -(-rows // EVEN) * EVEN


def rows_of_experts(row_ends: Tensor, rows: int) -> list[slice]:
    """The rows of each expert, of so many; waits for ``row_ends`` on the host."""
    return [slice(start, stop) for start, stop in pairwise([0, *borders_on_host(row_ends, rows)])]


def rows_in_cache(x: Tensor, width: int) -> int:
    """How many rows of ``width`` numbers like those of ``x`` stay in cache, at least 1."""
    return max(1, CACHE_BYTES // (width * x.element_size()))
