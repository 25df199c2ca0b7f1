"""Our own grouped products in Triton: rows are taken from, and put to, where they lie, and nothing waits for the host.

What each computes is a line of ``reference_matmul`` and of its gradients; tests hold them to it. Products of fp32 are of
fp32, not of TF32.
"""

import triton
import triton.language as tl
from torch import Tensor

from accessory.model.triton_here import wide_type

# rows, columns and depth of a tile, warps, stages, by the bytes of a number: from a table, as tuning asks for a GPU
TILES = {2: (128, 128, 64, 8, 3), 4: (64, 64, 32, 4, 2), 8: (32, 32, 32, 4, 1)}
NEIGHBOURS = 8
"""Tiles of rows that run over all columns together, so that what they share stays in the L2 cache."""


@triton.jit
def _rows_times_matrices(
    x,
    w,
    y,
    take,
    put,
    row_ends,
    tiles,
    experts,
    columns,
    depth,
    expert_stride,
    column_stride,
    depth_stride,
    TAKE: tl.constexpr,
    PUT: tl.constexpr,
    WIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # which tile of rows and of columns: NEIGHBOURS of the former over all of the latter, then the next
    together = NEIGHBOURS * tl.cdiv(columns, COLUMNS)
    first_tile = tl.program_id(0) // together * NEIGHBOURS
    beside = tl.minimum(tiles - first_tile, NEIGHBOURS)
    tile = first_tile + tl.program_id(0) % together % beside
    column = tl.program_id(0) % together // beside * COLUMNS + tl.arange(0, COLUMNS)
    # whose rows these are: each expert has tiles of its own, and behind the last one's there may be some of none
    each = tl.arange(0, EXPERTS)
    ends = tl.load(row_ends + each, mask=each < experts, other=0)
    starts = tl.load(row_ends + each - 1, mask=(each > 0) & (each < experts), other=0)
    tiles_of = (ends - starts + ROWS - 1) // ROWS
    tiles_to = tl.cumsum(tiles_of, 0)
    expert = tl.sum((tiles_to <= tile).to(tl.int32), 0)
    own = each == expert
    end = tl.sum(tl.where(own, ends, 0), 0)
    row = tl.sum(tl.where(own, starts - (tiles_to - tiles_of) * ROWS, 0), 0) + tile * ROWS + tl.arange(0, ROWS)
    real, used = row < end, column < columns
    if tl.max(real.to(tl.int32), 0) > 0:
        source = tl.load(take + row, mask=real, other=0) if TAKE else row
        total = tl.zeros((ROWS, COLUMNS), WIDE)
        x_row = x + source.to(tl.int64)[:, None] * depth
        w_column = w + expert.to(tl.int64) * expert_stride + column.to(tl.int64)[None, :] * column_stride
        for first in range(0, depth, DEPTH):
            deep = first + tl.arange(0, DEPTH)
            a = tl.load(x_row + deep[None, :], mask=real[:, None] & (deep < depth)[None, :], other=0.0)
            b = tl.load(w_column + deep[:, None] * depth_stride, mask=(deep < depth)[:, None] & used[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee", out_dtype=WIDE)
        target = tl.load(put + row, mask=real, other=0) if PUT else row
        at = y + target.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(at, total.to(y.dtype.element_ty), mask=real[:, None] & used[None, :])


@triton.jit
def _outer_of_rows(
    y,
    x,
    w,
    take,
    row_ends,
    columns,
    depth,
    TAKE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert = tl.program_id(2)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    deep = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    start = tl.load(row_ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(row_ends + expert)
    total = tl.zeros((COLUMNS, DEPTH), WIDE)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        real = row < end
        source = tl.load(take + row, mask=real, other=0) if TAKE else row
        at = y + row.to(tl.int64)[None, :] * columns + column[:, None]
        a = tl.load(at, mask=(column < columns)[:, None] & real[None, :], other=0.0)
        at = x + source.to(tl.int64)[:, None] * depth + deep[None, :]
        b = tl.load(at, mask=real[:, None] & (deep < depth)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=WIDE)
    at = w + expert.to(tl.int64) * columns * depth + column.to(tl.int64)[:, None] * depth + deep[None, :]
    tl.store(at, total.to(w.dtype.element_ty), mask=(column < columns)[:, None] & (deep < depth)[None, :])


def times(x: Tensor, w: Tensor, row_ends: Tensor, take: Tensor | None = None, put: Tensor | None = None) -> Tensor:
    """Each row times its expert's matrix: ``x`` [n, in] and ``w`` [e, out, in] -> [n, out].

    Args:
        take: [n] where in ``x`` [any, in] each row lies. put: [n] where in the result each goes, each once.
    """
    rows, columns, depth, warps, stages = TILES[x.element_size()]
    experts, out, n = w.shape[0], w.shape[1], len(x) if take is None else len(take)
    y = x.new_empty(n, out)
    tiles = n // rows + experts  # at most: that of each expert which is not full
    _rows_times_matrices[(tiles * triton.cdiv(out, columns),)](
        x,
        w,
        y,
        x if take is None else take,
        x if put is None else put,
        row_ends,
        tiles,
        experts,
        out,
        w.shape[2],
        *(w.stride(0), w.stride(1), w.stride(2)),
        TAKE=take is not None,
        PUT=put is not None,
        WIDE=wide_type(x),
        EXPERTS=triton.next_power_of_2(experts),
        NEIGHBOURS=NEIGHBOURS,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        num_warps=warps,
        num_stages=stages,
    )
    return y


def times_transposed(y: Tensor, w: Tensor, row_ends: Tensor) -> Tensor:
    """Each row times its expert's matrix transposed: ``y`` [n, out] and ``w`` [e, out, in] -> [n, in]."""
    return times(y, w.mT, row_ends)


def outer(y: Tensor, x: Tensor, row_ends: Tensor, take: Tensor | None = None) -> Tensor:
    """The sum of y x^T over each expert's rows: ``y`` [n, out], ``x`` [n, in] -> [e, out, in]; ``take`` as in ``times``."""
    rows, columns, depth, warps, stages = TILES[x.element_size()]
    rows, depth = depth, rows
    w = x.new_empty(len(row_ends), y.shape[1], x.shape[1])
    _outer_of_rows[(triton.cdiv(y.shape[1], columns), triton.cdiv(x.shape[1], depth), len(row_ends))](
        y,
        x,
        w,
        x if take is None else take,
        row_ends,
        y.shape[1],
        x.shape[1],
        TAKE=take is not None,
        WIDE=wide_type(x),
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        num_warps=warps,
        num_stages=stages,
    )
    return w
