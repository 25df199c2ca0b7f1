"""Experts of our own Triton kernels: for GPUs on which torch's grouped matmul waits for the host once a product."""

import functools

import torch
from torch import Tensor

from accessory.errors import needs
from accessory.model import triton_here
from accessory.model.moe.kernels.fused import Operations, fused_matmul, fused_swiglu
from accessory.model.moe.kernels.grouped import grouped_waits
from accessory.model.moe.kernels.looped import looped, looped_matmul
from accessory.model.moe.weights import ExpertWeights

TRITON_EXPERTS_NEEDS = f"fp32, fp16 or bf16 and {triton_here.NEEDS}"
MANY_ROWS = 2**15
"""Rows from which products are so long that waiting for the host costs less than what cuBLAS is faster."""


def triton_experts_run(x: Tensor, hidden_dim: int) -> bool:
    """fp64 is for proofs: Triton's products of it are only interpreted."""
    return triton_here.triton_runs(x) and (x.dtype != torch.float64 or triton_here.is_interpreted())


def triton_experts_suit(x: Tensor) -> bool:
    """Where the host waits for torch's grouped matmul."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    if x.device.type != "cuda" or not half or not triton_here.is_installed("triton") or x.shape[0] >= MANY_ROWS:
        return False
    return grouped_waits(x)


@functools.cache
def load_triton() -> Operations:
    """What the experts are made of.

    Raises:
        UserError: Triton is not installed.
    """
    with needs("model.kernel=triton", "pip install triton"):
        from accessory.model.moe.kernels import triton_products as products
        from accessory.model.moe.kernels import triton_swiglu
    return Operations(
        times=products.times,
        times_transposed=products.times_transposed,
        outer=products.outer,
        swiglu=triton_swiglu.swiglu,
        swiglu_backward=triton_swiglu.swiglu_backward,
    )


def triton_experts(
    x: Tensor, w1: ExpertWeights, w2: ExpertWeights, w3: ExpertWeights, weight: Tensor, row_ends: Tensor
) -> Tensor:
    if not len(x):
        return looped(x, w1, w2, w3, weight, row_ends)
    return fused_swiglu(load_triton(), x, w1, w2, w3, weight, row_ends)


def triton_matmul(x: Tensor, w: ExpertWeights, row_ends: Tensor) -> Tensor:
    return fused_matmul(load_triton(), x, w, row_ends) if len(x) else looped_matmul(x, w, row_ends)
