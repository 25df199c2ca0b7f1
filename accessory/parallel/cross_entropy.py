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

CHUNK = 1024  # rows of logits alive at a time


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
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=at_least(weight.dtype)) if needs_weight else None
        start = get_model_parallel_rank() * len(weight)
        loss = torch.zeros((), dtype=at_least(hidden.dtype), device=hidden.device)
        for first in range(0, len(hidden), CHUNK):
            rows = slice(first, first + CHUNK)
            logits = at_least_fp32(hidden[rows] @ weight.T)
            local = targets[rows] - start
            mine = (local >= 0) & (local < len(weight))
            local = local.clamp(0, len(weight) - 1).unsqueeze(1)
            target_logit = logits.gather(1, local).squeeze(1) * mine
            log_sum, target_logit = _across_vocabulary(logits, target_logit)
            loss += (log_sum - target_logit).sum()
            if needs_hidden or needs_weight:
                d_logits = logits.sub_(log_sum.unsqueeze(1)).exp_()  # softmax - one hot
                d_logits.scatter_add_(1, local, -mine.to(logits.dtype).unsqueeze(1))
                d_logits = d_logits.to(hidden.dtype)
                if d_hidden is not None:
                    torch.mm(d_logits, weight, out=d_hidden[rows])
                if d_weight is not None and d_weight.dtype == hidden.dtype:
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


def _across_vocabulary(logits: Tensor, target_logit: Tensor) -> tuple[Tensor, Tensor]:
    """log(sum(exp)) of each row over the whole vocabulary, and the target's logit, from this rank's columns."""
    if get_model_parallel_world_size() == 1:
        return logits.logsumexp(1), target_logit
    group = get_model_parallel_group()
    largest = logits.amax(1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(logits - largest.unsqueeze(1)).exp_().sum(1), target_logit])
    dist.all_reduce(sums, group=group)
    return sums[0].log() + largest, sums[1]
