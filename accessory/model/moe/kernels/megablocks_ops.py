"""The seven functions of MegaBlocks' compiled extension, in plain torch.

Its CUDA source does not compile with CUDA 13, and there is none for CPUs. They work on a number for each expert or block,
not on activations. Each writes to ``out`` where it is given one, as those do.
"""

import torch
from torch import Tensor


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim) - x)


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    out.copy_(x.cumsum(dim))


def histogram(x: Tensor, bins: int) -> Tensor:
    """How often each of 0 .. bins - 1 stands in ``x``, int32."""
    return torch.bincount(x.flatten().long(), minlength=int(bins))[: int(bins)].int()


def sort(x: Tensor, end_bit: int, values: Tensor, order: Tensor) -> None:
    """``end_bit``: how many bits of ``x`` may be set; nothing here depends on it."""
    found = torch.sort(x.flatten(), stable=True)
    values.copy_(found.values)
    order.copy_(found.indices)


def indices(padded_ends: Tensor, block: int, block_rows: int, columns: int, out: Tensor) -> None:
    """The column of each block of a matrix in which the rows of expert e, up to ``padded_ends[e]``, have its ``columns``."""
    row = torch.arange(block_rows, device=out.device) * block
    expert = torch.searchsorted(padded_ends.long(), row, right=True)
    out.copy_((expert.unsqueeze(1) * columns + torch.arange(columns, device=out.device)).flatten())


def replicate_forward(x: Tensor, ends: Tensor, out: Tensor) -> None:
    """Each column e of ``x`` as often as bin e, up to ``ends[e]``, is long."""
    out.copy_(x[:, _bin_of(ends, out.shape[1])])


def replicate_backward(gradient: Tensor, ends: Tensor, out: Tensor) -> None:
    out.zero_().index_add_(1, _bin_of(ends, gradient.shape[1]), gradient)


def _bin_of(ends: Tensor, count: int) -> Tensor:
    return torch.searchsorted(ends.long(), torch.arange(count, device=ends.device), right=True)
