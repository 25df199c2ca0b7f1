"""One expert with rows after the other, by matrices that are packed (``accessory.model.packed``); knows no gradients."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.model.moe.kernels.rows import even_count, rows_of_experts
from accessory.model.moe.weights import ExpertWeights, PackedWeights
from accessory.model.packed import PackedCodes, product


def packed_suit(x: Tensor, matrices: Sequence[ExpertWeights]) -> bool:
    """Whatever the rows: packed weights are no others' any more."""
    return any(isinstance(w, PackedWeights) for w in matrices)


def packed_swiglu(
    x: Tensor, w1: ExpertWeights, w2: ExpertWeights, w3: ExpertWeights, weight: Tensor, row_ends: Tensor
) -> Tensor:
    y = torch.empty_like(x)
    for expert, rows in enumerate(rows_of_experts(row_ends, len(x))):
        if rows.start < rows.stop:
            some, own = _evened(rows, len(x))
            gate, up = (product(x[some], _matrix(w, expert)) for w in (w1, w3))
            out = product(F.silu(gate, inplace=True).mul_(up), _matrix(w2, expert))
            torch.mul(out[own], weight[rows], out=y[rows])
    return y


def packed_matmul(x: Tensor, w: ExpertWeights, row_ends: Tensor) -> Tensor:
    y = x.new_empty(len(x), w.shape[1])
    for expert, rows in enumerate(rows_of_experts(row_ends, len(x))):
        if rows.start < rows.stop:
            some, own = _evened(rows, len(x))
            y[rows] = product(x[some], _matrix(w, expert))[own]
    return y


def _evened(rows: slice, total: int) -> tuple[slice, slice]:
    """``rows`` with neighbours that make an ``even_count``, as far as there are any, and where they stand among these."""
    count = even_count(rows.stop - rows.start)
    start = max(0, min(rows.start, total - count))
    return slice(start, min(total, start + count)), slice(rows.start - start, rows.stop - start)


def _matrix(w: ExpertWeights, expert: int) -> Tensor | PackedCodes:
    """An expert's, [out, in]; an adapter's are not packed."""
    return w.matrices[expert] if isinstance(w, PackedWeights) else w[expert : expert + 1][0]
