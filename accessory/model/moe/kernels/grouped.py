"""torch's grouped matmul (CUTLASS on Hopper): all experts at once, in bf16 there without waiting for the host."""

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.model import triton_here
from accessory.model.moe.kernels.fused import Operations, fused_matmul, fused_swiglu
from accessory.model.moe.kernels.looped import looped, looped_matmul
from accessory.model.moe.kernels.swiglu import swiglu, swiglu_backward
from accessory.model.moe.weights import ExpertWeights

GROUPED_NEEDS = "fp32, bf16 or fp16 on CPU or CUDA, and rows of a multiple of 16 bytes"


def grouped_runs(x: Tensor, hidden_dim: int) -> bool:
    return (
        x.device.type in ("cpu", "cuda")
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and _aligned(x, x.shape[1], hidden_dim)
    )


def grouped_waits(x: Tensor) -> bool:
    """Where it is a loop, for which the host waits once a product: not for bf16 of sm90 and sm100, which are Hopper and the
    data centre's Blackwell.
    """
    return x.dtype != torch.bfloat16 or triton_here.capability(x.device) not in ((9, 0), (10, 0))


def _outer(y: Tensor, x: Tensor, row_ends: Tensor) -> Tensor:
    """torch leaves what is in memory for an expert without rows on Blackwell (pytorch#172439): it is made zero."""
    gradient = F.grouped_mm(y.T, x, offs=row_ends)
    without_rows = torch.diff(row_ends, prepend=row_ends.new_zeros(1)) == 0
    return gradient.masked_fill_(without_rows[:, None, None], 0)


OPERATIONS = Operations(
    times=lambda x, w, row_ends: F.grouped_mm(x, w.mT, offs=row_ends),
    times_transposed=lambda y, w, row_ends: F.grouped_mm(y, w, offs=row_ends),
    outer=_outer,
    swiglu=swiglu,
    swiglu_backward=swiglu_backward,
)


def grouped(x: Tensor, w1: ExpertWeights, w2: ExpertWeights, w3: ExpertWeights, weight: Tensor, row_ends: Tensor) -> Tensor:
    if not len(x):  # a rank without rows: CUTLASS is not asked what it makes of that
        return looped(x, w1, w2, w3, weight, row_ends)
    return fused_swiglu(OPERATIONS, x, w1, w2, w3, weight, row_ends)


def grouped_matmul(x: Tensor, w: ExpertWeights, row_ends: Tensor) -> Tensor:
    """A LoRA rank that does not fit the strides is looped."""
    if not len(x) or not _aligned(x, *w.shape[1:]):
        return looped_matmul(x, w, row_ends)
    return fused_matmul(OPERATIONS, x, w, row_ends)


def _aligned(x: Tensor, *sizes: int) -> bool:
    return all(size * x.element_size() % 16 == 0 for size in sizes)
