"""Cross-entropy of a vocabulary-cut output layer, in chunks: the full logits never exist."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.dtypes import at_least, at_least_fp32
from accessory.parallel.tensor import (
    copy_to_model_parallel_region,
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)

CHUNK = {"cpu": 256, "cuda": 2048}
"""Rows of logits alive at a time: on CPU few enough to stay in cache, on GPU enough to fill it."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of ``-log softmax(hidden @ W.T)[target]``, with ``W`` [V, D] cut on dim 0 over model-parallel ranks.

    Args:
        hidden: [n, D], only the rows that have a target; n may be 0.
        weight: [V / mp, D], this rank's rows of the output layer.
        targets: [n] token ids in the whole vocabulary.

    Returns:
        A scalar in at least fp32. Gradients are computed chunk by chunk in the forward, so nothing of size n x V is kept.
    """
    return _LinearCrossEntropy.apply(copy_to_model_parallel_region(hidden), weight, targets)


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same on one rank, in plain torch."""
    return torch.nn.functional.cross_entropy(at_least_fp32(hidden @ weight.T), targets, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = at_least(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        start = get_model_parallel_rank() * len(weight)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        chunk = CHUNK[hidden.device.type]
        # one buffer for all chunks, and one in the model's dtype if that is narrower; everything happens in place
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=wide)
        narrow = buffer if hidden.dtype == wide else torch.empty_like(buffer, dtype=hidden.dtype)
        for first in range(0, len(hidden), chunk):
            rows = slice(first, min(first + chunk, len(hidden)))
            logits, product = buffer[: rows.stop - first], narrow[: rows.stop - first]
            torch.mm(hidden[rows], weight.T, out=product)
            if product is not logits:
                logits.copy_(product)
            local = targets[rows] - start
            mine = ((local >= 0) & (local < len(weight))).to(wide)
            local = local.clamp(0, len(weight) - 1).unsqueeze(1)
            target_logit = logits.gather(1, local).squeeze(1) * mine
            largest = _all_reduce(logits.amax(1), dist.ReduceOp.MAX)
            exp_sum = logits.sub_(largest.unsqueeze(1)).exp_().sum(1)
            exp_sum, target_logit = _all_reduce(torch.stack([exp_sum, target_logit]), dist.ReduceOp.SUM)
            loss += (exp_sum.log() + largest - target_logit).sum()
            if d_hidden is None and d_weight is None:
                continue
            d_logits = logits.div_(exp_sum.unsqueeze(1)).scatter_add_(1, local, -mine.unsqueeze(1))  # softmax - one hot
            if product is not logits:
                d_logits = product.copy_(d_logits)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_weight is not None and d_weight.dtype == d_logits.dtype:
                d_weight.addmm_(d_logits.T, hidden[rows])
            elif d_weight is not None:
                d_weight += d_logits.T @ hidden[rows]
        ctx.gradients = d_hidden, None if d_weight is None else d_weight.to(weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        d_hidden, d_weight = (None if g is None else g.mul_(grad) for g in ctx.gradients)
        del ctx.gradients  # scaled in place: good for one backward
        return d_hidden, d_weight, None


def _all_reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """Over the ranks that hold the other columns of the vocabulary."""
    if get_model_parallel_world_size() > 1:
        dist.all_reduce(x, operation, group=get_model_parallel_group())
    return x
