"""The borders of the region in which model-parallel ranks compute different parts (Shoeybi et al. 2019, Megatron-LM).

What crosses one is communicated in one direction: an operator whose forward is the identity has a collective as its
backward, and the other way round. fairscale's operators of these names (0.4.13) work in place, on whatever strides, over
one group of the whole process; here a tensor that others still read stays as it is, and the axis is named.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.parallel.mesh import Axis


def copy_to_model_parallel_region(x: Tensor, mp: Axis) -> Tensor:
    """Enter: identity forward, all-reduce backward. For what is whole on every rank, but has a partial gradient on each."""
    return _CopyTo.apply(x, mp) if mp.size > 1 else x


def reduce_from_model_parallel_region(x: Tensor, mp: Axis) -> Tensor:
    """Leave: all-reduce forward (partial sums become the whole), identity backward."""
    return _ReduceFrom.apply(x, mp) if mp.size > 1 else x


def gather_from_model_parallel_region(x: Tensor, mp: Axis) -> Tensor:
    """Leave: all-gather along the last dimension forward, own slice backward."""
    return _GatherFrom.apply(x, mp) if mp.size > 1 else x


def _summed(x: Tensor, mp: Axis) -> Tensor:
    return mp.all_reduce(x.clone(memory_format=torch.contiguous_format))  # gloo misreads other strides


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mp: Axis) -> Tensor:
        ctx.mp = mp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.mp), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mp: Axis) -> Tensor:
        return _summed(x, mp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mp: Axis) -> Tensor:
        ctx.mp, x = mp, x.contiguous()
        parts = [torch.empty_like(x) for _ in range(mp.size)]
        dist.all_gather(parts, x, group=mp.group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.mp.size, -1)[ctx.mp.rank].contiguous(), None
