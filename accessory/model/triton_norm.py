"""RMSNorm forward and backward, each in one pass over memory. ``norm.py`` is the definition."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.model.triton_here import wide_type

STRIPES = 512
"""Programs of the backward pass, each with every so many-th row: their shares of the weight's gradient are then added up."""


@triton.jit
def _forward(x, weight, y, scale, dim, eps, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < dim
    value = tl.load(x + row * dim + column, mask=inside, other=0.0).to(WIDE)
    s = 1.0 / tl.sqrt(tl.sum(value * value, 0) / dim + eps)
    tl.store(scale + row, s)
    normed = (value * s).to(y.dtype.element_ty) * tl.load(weight + column, mask=inside)
    tl.store(y + row * dim + column, normed.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, weight, scale, dy, dx, d_weight, rows, dim, WITH_WEIGHT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    stripe, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < dim
    w, total = tl.load(weight + column, mask=inside, other=0.0).to(WIDE), tl.zeros((BLOCK,), WIDE)
    for number in range(stripe, rows, tl.num_programs(0)):
        at = tl.cast(number, tl.int64) * dim + column
        s, d = tl.load(scale + number), tl.load(dy + at, mask=inside, other=0.0).to(WIDE)
        normed = tl.load(x + at, mask=inside, other=0.0).to(WIDE) * s
        if WITH_WEIGHT:
            total += d * normed
        d *= w
        d = s * (d - normed * (tl.sum(d * normed, 0) / dim))
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    if WITH_WEIGHT:
        tl.store(d_weight + stripe.to(tl.int64) * dim + column, total, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, dim = x.contiguous(), x.shape[-1]
    y, scale = torch.empty_like(x), _wide(x, *x.shape[:-1], 1)
    if x.numel():
        _forward[(x.numel() // dim,)](x, weight, y, scale, dim, eps, WIDE=wide_type(x), **_block(dim))
    return y, scale


def rms_norm_backward(
    x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor | None]:
    x, dy, dim = x.contiguous(), dy.contiguous(), x.shape[-1]
    rows = x.numel() // dim
    stripes = max(1, min(STRIPES, rows))
    dx, shares = torch.empty_like(x), _wide(x, stripes, dim) if with_weight else scale
    options = {"WITH_WEIGHT": with_weight, "WIDE": wide_type(x), **_block(dim)}
    _backward[(stripes,)](x, weight, scale, dy, dx, shares, rows, dim, **options)
    return dx, shares.sum(0).to(weight.dtype) if with_weight else None


def _wide(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _block(dim: int) -> dict[str, int]:
    """A whole row at once, and the warps for it."""
    block = triton.next_power_of_2(dim)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
