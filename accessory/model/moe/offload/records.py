"""An expert's tensors as one row of bytes, so that one copy brings it; and where the rows of a layer lie."""

import errno
import os
import tempfile
import weakref
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from accessory.console import in_bytes
from accessory.errors import UserError

ALIGNED = 64
"""Each tensor begins at a multiple of so many bytes, whatever its dtype."""


class Record:
    """How an expert's ``tensors``, by name their shapes and dtypes, lie one behind the other in ``nbytes`` bytes."""

    def __init__(self, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]):
        self.tensors, self._starts, end = dict(tensors), dict[str, int](), 0
        for name, (shape, dtype) in tensors.items():
            self._starts[name] = end
            end += -(-prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
        self.nbytes = end

    def view(self, rows: Tensor, name: str) -> Tensor:
        """One of the tensors in ``rows`` of bytes, [nbytes] or [e, nbytes]: [...] or [e, ...]."""
        shape, dtype = self.tensors[name]
        start = self._starts[name]
        return rows[..., start : start + prod(shape) * dtype.itemsize].view(dtype).unflatten(-1, shape)


class ExpertStore(Protocol):
    """Where a layer's experts lie."""

    rows: Tensor
    """[e, nbytes], where they are put when the model is filled."""

    def read(self, expert: int, slot: Tensor) -> None:
        """Copy an expert to a slot [nbytes] of the device. Raises UserError: it cannot be read."""
        ...


class HostStore:
    """In host memory, from where a GPU copies by itself."""

    def __init__(self, experts: int, nbytes: int, device: torch.device):
        self.rows = torch.empty(experts, nbytes, dtype=torch.uint8)
        if device.type == "cuda":
            _pin(self, self.rows, device)

    def read(self, expert: int, slot: Tensor) -> None:
        slot.copy_(self.rows[expert], non_blocking=True)


def _pin(owner: object, rows: Tensor, device: torch.device) -> None:
    """Have a GPU copy from memory by itself while ``owner`` is there.

    Of torch's own such memory an allocation takes the next power of two of bytes: a third more for Mixtral's in 4 bits.
    """
    cudart, start = torch.cuda.cudart(), rows.data_ptr()
    if code := int(cudart.cudaHostRegister(start, rows.nbytes, 0)):
        raise UserError(
            f"offload: a layer's {in_bytes(rows.nbytes)} of experts cannot be locked in this machine's memory (CUDA error "
            f"{code}): allow more (ulimit -l, or the container's limits), or name a directory on a disk (offload.disk)"
        )

    def unpin() -> None:
        torch.cuda.synchronize(device)  # nothing is being copied any more
        cudart.cudaHostUnregister(start)

    weakref.finalize(owner, unpin)


class DiskStore:
    """In a file without a name, which goes with this process however that ends; free memory is the system's cache of it.

    It is filled as a part of memory, but read by calls: these say what is wrong, where a page would end the process.
    """

    def __init__(self, directory: Path, experts: int, nbytes: int, device: torch.device):
        self.directory, self._nbytes = directory, nbytes
        try:
            self._file, path = tempfile.mkstemp(prefix=".experts", dir=directory)
        except OSError as error:
            raise UserError(f"offload.disk: {directory}: {error.strerror}; name a directory that can be written") from error
        weakref.finalize(self, os.close, self._file)
        try:
            os.posix_fallocate(self._file, 0, experts * nbytes)  # a page that is written finds its room, or we say so now
            self.rows = torch.from_file(path, shared=True, size=experts * nbytes, dtype=torch.uint8).view(experts, nbytes)
        except OSError as error:
            why = "has no room" if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) else error.strerror
            raise UserError(
                f"offload.disk: {directory} {why} for a layer's {in_bytes(experts * nbytes)} of experts: name another disk"
            ) from error
        finally:
            os.unlink(path)
        self._staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def read(self, expert: int, slot: Tensor) -> None:
        done, view = 0, self._staging.numpy().data
        while done < self._nbytes:
            try:
                count = os.preadv(self._file, [view[done:]], expert * self._nbytes + done)
            except OSError as error:
                raise self._failed(f"it gives {error.strerror}") from error
            if not count:
                raise self._failed(f"it ends {self._nbytes - done} bytes too early")
            done += count
        slot.copy_(self._staging)  # waits: the next one is read to the same place

    def _failed(self, why: str) -> UserError:
        return UserError(
            f"offload.disk: an expert cannot be read back from {self.directory}: {why}; look at the disk, or leave disk out"
        )
