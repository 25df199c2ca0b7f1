"""RMSNorm."""

import torch
from torch import Tensor, nn

from accessory.dtypes import at_least_fp32


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension; statistics in at least fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_fp32(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight
