"""Products of a few rows by quantised matrices in Triton: numbers are made of the codes where they are multiplied.

A row needs each number once: reading its four bits is reading a quarter of what bf16 has. With many rows numbers that are
made once, and multiplied by as any, are faster. ``Codec.decode`` is the definition of a number.
"""

import triton
import triton.language as tl
from torch import Tensor

from accessory.model.codecs import Codec, Parts, nf4_levels
from accessory.model.triton_here import wide_type

# rows, columns and depth of a tile, warps, stages: from a table, as tuning asks for a GPU; 16 rows are a tensor core's least
TILE = (16, 32, 128, 4, 3)


@triton.jit
def _rows_times_codes(
    x,
    codes,
    scales,
    zeros,
    levels,
    y,
    row_ends,
    rows,
    columns,
    depth,
    group,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    LEVELS: tl.constexpr,
    ENDS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    used, matrix_row = column < columns, expert * columns + column
    start = tl.load(row_ends + expert - 1, mask=expert > 0, other=0) if ENDS else 0
    end = tl.load(row_ends + expert) if ENDS else rows
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        real = row < end
        total = tl.zeros((ROWS, COLUMNS), WIDE)
        for first_deep in range(0, depth, DEPTH):
            deep = first_deep + tl.arange(0, DEPTH)
            here = used[:, None] & (deep < depth)[None, :]
            bit = deep * BITS
            at = codes + matrix_row[:, None] * (depth * BITS // 8) + (bit // 8)[None, :]
            code = tl.load(at, mask=here, other=0).to(tl.int32)
            if 8 % BITS != 0:  # one may reach into the next byte
                reaches = (bit % 8 + BITS > 8)[None, :]
                code |= tl.load(at + 1, mask=here & reaches, other=0).to(tl.int32) << 8
            code = (code >> (bit % 8)[None, :]) & ((1 << BITS) - 1)
            block = matrix_row[:, None] * (depth // group) + (deep // group)[None, :]
            if LEVELS:
                value = tl.load(levels + code)
            elif ZEROS:
                value = (code - tl.load(zeros + block, mask=here, other=0).to(tl.int32)).to(tl.float32)
            else:
                value = (code - 128).to(tl.float32)
            w = (value * tl.load(scales + block, mask=here, other=0.0).to(tl.float32)).to(x.dtype.element_ty)
            at = x + row.to(tl.int64)[:, None] * depth + deep[None, :]
            a = tl.load(at, mask=real[:, None] & (deep < depth)[None, :], other=0.0)
            total = tl.dot(a, tl.trans(w), total, input_precision="ieee", out_dtype=WIDE)
        at = y + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(at, total.to(y.dtype.element_ty), mask=real[:, None] & used[None, :])


def times_codes(x: Tensor, codec: Codec, parts: Parts, row_ends: Tensor | None = None) -> Tensor:
    """Each row times its expert's matrix: ``x`` [n, in] and the parts of [e, out, in] -> [n, out]; no gradients.

    Args:
        row_ends: [e] int32, where the rows of each end; None: there is one matrix.
    """
    rows, columns, depth, warps, stages = TILE
    x, codes = x.contiguous(), parts["codes"].contiguous()
    experts, out, _ = codes.shape
    y = x.new_empty(len(x), out)
    _rows_times_codes[(triton.cdiv(out, columns), experts)](
        x,
        codes,
        parts["scales"].contiguous().view(codec.scale_dtype),
        parts["zeros"].contiguous() if codec.has_zeros else codes,
        nf4_levels(x.device) if codec.kind == "nf4" else codes,
        y,
        codes if row_ends is None else row_ends,
        len(x),
        out,
        x.shape[1],
        codec.group or x.shape[1],
        BITS=codec.bits,
        ZEROS=codec.has_zeros,
        LEVELS=codec.kind == "nf4",
        ENDS=row_ends is not None,
        WIDE=wide_type(x),
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        num_warps=warps,
        num_stages=stages,
    )
    return y
