"""``silu(gate) * up * weight`` forward and backward, each in one pass over memory. ``swiglu.py`` is the definition."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.model.triton_here import wide_type

FORWARD_BLOCK, BACKWARD_BLOCK = 1024, 2048
"""Columns at a time, of one row; a power of two."""


@triton.jit
def _forward(gate, up, weight, h, width, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < width, row * width + column
    g, u = tl.load(gate + at, mask=inside).to(WIDE), tl.load(up + at, mask=inside).to(WIDE)
    value = g * tl.sigmoid(g) * u * tl.load(weight + row).to(WIDE)
    tl.store(h + at, value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate,
    up,
    weight,
    dh,
    d_gate,
    d_up,
    d_weight,
    h,
    width,
    WITH_H: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    w, total = tl.load(weight + row).to(WIDE), tl.zeros((BLOCK,), WIDE)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside, at = column < width, row * width + column
        g, u = tl.load(gate + at, mask=inside, other=0.0).to(WIDE), tl.load(up + at, mask=inside, other=0.0).to(WIDE)
        d = tl.load(dh + at, mask=inside, other=0.0).to(WIDE)
        sigmoid = tl.sigmoid(g)
        s = g * sigmoid
        total += d * s * u
        d *= w
        tl.store(d_up + at, (d * s).to(d_up.dtype.element_ty), mask=inside)
        slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
        tl.store(d_gate + at, (d * u * slope).to(d_gate.dtype.element_ty), mask=inside)
        if WITH_H:
            tl.store(h + at, (s * u * w).to(h.dtype.element_ty), mask=inside)
    tl.store(d_weight + row, tl.sum(total, 0).to(d_weight.dtype.element_ty))


def swiglu(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    gate, up, weight = gate.contiguous(), up.contiguous(), weight.contiguous()
    n, width = gate.shape
    h = torch.empty_like(gate)
    if n:
        grid = (n, triton.cdiv(width, FORWARD_BLOCK))
        _forward[grid](gate, up, weight, h, width, WIDE=wide_type(gate), BLOCK=FORWARD_BLOCK)
    return h


def swiglu_backward(
    gate: Tensor, up: Tensor, weight: Tensor, dh: Tensor, with_h: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    gate, up, weight, dh = gate.contiguous(), up.contiguous(), weight.contiguous(), dh.contiguous()
    d_gate, d_up, d_weight = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(weight)
    h = torch.empty_like(gate) if with_h else None
    if len(gate):
        _backward[(len(gate),)](
            gate,
            up,
            weight,
            dh,
            d_gate,
            d_up,
            d_weight,
            h if h is not None else gate,
            gate.shape[1],
            WITH_H=with_h,
            WIDE=wide_type(gate),
            BLOCK=BACKWARD_BLOCK,
            num_warps=8,
        )
    return d_gate, d_up, d_weight, h
