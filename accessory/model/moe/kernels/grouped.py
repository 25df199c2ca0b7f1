"""torch's grouped matmul (CUTLASS on Hopper): all experts at once, without waiting for the host.

It takes the weights as one tensor: all experts are asked for at once, and autograd keeps what they were made to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.model.moe.kernels.looped import looped_matmul
from accessory.model.moe.kernels.swiglu import weighted_swiglu
from accessory.model.moe.weights import ExpertWeights

GROUPED_NEEDS = "fp32, bf16 or fp16 on CPU or CUDA, and rows of a multiple of 16 bytes"


def grouped_runs(x: Tensor, hidden_dim: int) -> bool:
    return (
        x.device.type in ("cpu", "cuda")
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and _aligned(x, x.shape[1], hidden_dim)
    )


def grouped(x: Tensor, w1: ExpertWeights, w2: ExpertWeights, w3: ExpertWeights, weight: Tensor, row_ends: Tensor) -> Tensor:
    """The routing weight is applied before the down projection, so that the experts' output need not be kept. The gradient
    of the result must be contiguous, as ``combine`` hands it back.
    """
    gate = F.grouped_mm(x, w1[:].mT, offs=row_ends)
    up = F.grouped_mm(x, w3[:].mT, offs=row_ends)
    return F.grouped_mm(weighted_swiglu(gate, up, weight), w2[:].mT, offs=row_ends)


def grouped_matmul(x: Tensor, w: ExpertWeights, row_ends: Tensor) -> Tensor:
    """A LoRA rank that does not fit the strides is looped."""
    if not _aligned(x, *w.shape[1:]):
        return looped_matmul(x, w, row_ends)
    return F.grouped_mm(x, w[:].mT, offs=row_ends)


def _aligned(x: Tensor, *sizes: int) -> bool:
    return all(size * x.element_size() % 16 == 0 for size in sizes)
