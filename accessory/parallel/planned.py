"""Planning for a GPU that is not there: a step is traced with shapes only, on the CPU (``train.trace``)."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_planned: ContextVar[bool] = ContextVar("planned", default=False)


@contextmanager
def planned_for_gpu() -> Iterator[None]:
    """Inside, code that chooses by device chooses as on a GPU of compute capability 8.0 or above with Triton."""
    token = _planned.set(True)
    try:
        yield
    finally:
        _planned.reset(token)


def is_planned() -> bool:
    """Whether a step is being traced with shapes only, for a GPU."""
    return _planned.get()


def borders_on_host(borders: Tensor, total: int) -> list[int]:
    """Where the rows of n experts end, as host numbers (the host waits); when planning: ``total`` rows shared evenly."""
    if is_planned():
        return [total * (place + 1) // len(borders) for place in range(len(borders))]
    numbers: list[int] = borders.tolist()
    return numbers


def device_type(x: Tensor) -> str:
    """The type of device that ``x`` is on, or is planned to be on."""
    return "cuda" if is_planned() else x.device.type
