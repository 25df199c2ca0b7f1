"""A GPU that is not there: a step that is traced for one computes shapes alone, on the CPU (``train.trace``)."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_planned: ContextVar[bool] = ContextVar("planned", default=False)


@contextmanager
def planned_for_gpu() -> Iterator[None]:
    """Inside, what chooses by device chooses as on a GPU of compute capability 8.0 or above with Triton."""
    token = _planned.set(True)
    try:
        yield
    finally:
        _planned.reset(token)


def is_planned() -> bool:
    """Whether shapes alone are computed, for a GPU."""
    return _planned.get()


def borders_on_host(borders: Tensor, total: int) -> list[int]:
    """Where the rows of n experts end, of ``total``, as numbers, for which the host waits; planned: each has as many."""
    if is_planned():
        return [total * (place + 1) // len(borders) for place in range(len(borders))]
    numbers: list[int] = borders.tolist()
    return numbers


def device_type(x: Tensor) -> str:
    """What ``x`` is computed on, or planned to be."""
    return "cuda" if is_planned() else x.device.type
