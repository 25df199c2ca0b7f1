"""``silu(gate) * up * weight``, for kernels whose products are apart from it: in torch, and fused where Triton compiles."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.model.fused_passes import fused
from accessory.model.moe.kernels.rows import rows_in_cache


def weighted_swiglu(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """``silu(gate) * up * weight``, keeping only its inputs for backward."""
    return _WeightedSwiGLU.apply(gate, up, weight)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return swiglu(gate, up, weight)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight = ctx.saved_tensors
        d_gate, d_up, d_weight, _ = swiglu_backward(gate, up, weight, dh, with_h=False)
        return d_gate, d_up, d_weight


def swiglu(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """``gate``, ``up`` [n, F] and ``weight`` [n, 1] -> [n, F]."""
    if passes := fused(gate):
        return passes.swiglu(gate, up, weight)
    h = torch.empty_like(gate)
    for rows in _in_cache(gate):
        torch.mul(F.silu(gate[rows]), up[rows], out=h[rows]).mul_(weight[rows])
    return h


def swiglu_backward(
    gate: Tensor, up: Tensor, weight: Tensor, dh: Tensor, with_h: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of ``gate``, ``up`` and ``weight`` from that of the result, and the result again if wanted."""
    if passes := fused(gate):
        return passes.swiglu_backward(gate, up, weight, dh, with_h)
    d_gate, d_up, d_weight = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(weight)
    for rows in _in_cache(gate):
        ds = dh[rows] * F.silu(gate[rows])
        torch.sum(ds * up[rows], -1, keepdim=True, out=d_weight[rows])
        torch.mul(ds, weight[rows], out=d_up[rows])
        ds.copy_(dh[rows]).mul_(weight[rows]).mul_(up[rows])  # of silu(gate) now
        torch.ops.aten.silu_backward.grad_input(ds, gate[rows], grad_input=d_gate[rows])
    return d_gate, d_up, d_weight, swiglu(gate, up, weight) if with_h else None


def _in_cache(x: Tensor) -> Iterator[slice]:
    """All rows on GPU; on CPU as many at a time as stay in cache through several elementwise passes."""
    step = rows_in_cache(x, x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
    return (slice(first, first + step) for first in range(0, len(x), step))
