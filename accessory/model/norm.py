"""RMSNorm."""

from typing import Any

import torch
from torch import Tensor, nn

from accessory.dtypes import at_least_fp32
from accessory.model.few_rows import few_rows_norm, runs
from accessory.model.fused_passes import fused
from accessory.model.recompute import made_again


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension; statistics in at least fp32 (Zhang & Sennrich 2019)."""

    few_rows = False

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def pack(self, dtype: torch.dtype) -> None:
        """For a model that no longer trains."""
        self.few_rows = runs(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.few_rows:
            return few_rows_norm(x, self.weight, self.eps)
        y = _Normalise.apply(x, self.weight, self.eps)
        return made_again(y, lambda x: rms_norm(x, self.weight, self.eps)[0], x)


class _Normalise(torch.autograd.Function):
    """Keeps x and one number per row for backward; autograd would keep x in fp32, and the normalised x as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        return *rms_norm_backward(x, weight, scale, dy, with_weight=ctx.needs_input_grad[1]), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of ``x`` [..., D], and 1 / rms of each row [..., 1]."""
    if passes := fused(x):
        return passes.rms_norm(x, weight, eps)
    wide = at_least_fp32(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight, scale


def rms_norm_backward(
    x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, with_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``x`` and, if wanted, of ``weight``."""
    if passes := fused(x):
        return passes.rms_norm_backward(x, weight, scale, dy, with_weight)
    normed, dy = x * scale, dy.to(scale.dtype)
    d_weight = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype) if with_weight else None
    d_normed = dy * weight
    share = (d_normed * normed).mean(-1, keepdim=True)
    return d_normed.addcmul_(normed, share, value=-1).mul_(scale).to(x.dtype), d_weight
