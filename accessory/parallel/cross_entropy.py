"""Cross-entropy of a vocabulary-cut output layer, in chunks: the full logits never exist."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from accessory.dtypes import at_least, at_least_fp32
from accessory.parallel.mesh import Axis

CHUNK = {"cpu": 256, "cuda": 2048}
"""Rows of logits alive at a time: on CPU few enough to stay in cache, on GPU enough to fill it."""


def linear_cross_entropy(factors: Sequence[tuple[Tensor, Tensor]], targets: Tensor, mp: Axis) -> Tensor:
    """Sum over rows of ``-log softmax(logits)[target]``, with logits ``x @ W.T`` cut by columns over model-parallel ranks.

    Args:
        factors: pairs of ``x`` [n, D], only the rows that have a target (n may be 0), and this rank's ``W`` [V / mp, D].
            The products of several pairs (the output layer's and its adapter's) are summed. The caller has let each
            ``x`` enter the region.
        targets: [n] token ids in the whole vocabulary.
        mp: the ranks that hold the vocabulary's columns.

    Returns:
        A scalar in at least fp32. Gradients are computed chunk by chunk in the forward, so nothing of size n x V is kept.
    """
    return _LinearCrossEntropy.apply(targets, mp, *(tensor for pair in factors for tensor in pair))


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same of one pair on one rank, in plain torch."""
    return torch.nn.functional.cross_entropy(at_least_fp32(hidden @ weight.T), targets, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, targets: Tensor, mp: Axis, *tensors: Tensor) -> Tensor:
        inputs, weights = tensors[::2], tensors[1::2]
        hidden, weight = inputs[0], weights[0]
        needs = ctx.needs_input_grad[2:]
        wide = at_least(hidden.dtype)
        d_inputs = [torch.empty_like(x) if need else None for x, need in zip(inputs, needs[::2], strict=True)]
        d_weights = [torch.zeros_like(w, dtype=wide) if need else None for w, need in zip(weights, needs[1::2], strict=True)]
        start = mp.rank * len(weight)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        chunk = CHUNK[hidden.device.type]
        # one buffer for all chunks, and one in the model's dtype if that is narrower; everything happens in place
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(weight), dtype=wide)
        narrow = buffer if hidden.dtype == wide else torch.empty_like(buffer, dtype=hidden.dtype)
        for first in range(0, len(hidden), chunk):
            rows = slice(first, min(first + chunk, len(hidden)))
            logits, product = buffer[: rows.stop - first], narrow[: rows.stop - first]
            torch.mm(hidden[rows], weight.T, out=product)
            for x, w in zip(inputs[1:], weights[1:], strict=True):
                product.addmm_(x[rows], w.T)
            if product is not logits:
                logits.copy_(product)
            local = targets[rows] - start
            mine = ((local >= 0) & (local < len(weight))).to(wide)
            local = local.clamp(0, len(weight) - 1).unsqueeze(1)
            target_logit = logits.gather(1, local).squeeze(1) * mine
            largest = mp.all_reduce(logits.amax(1), ReduceOp.MAX)
            exp_sum = logits.sub_(largest.unsqueeze(1)).exp_().sum(1)
            exp_sum, target_logit = mp.all_reduce(torch.stack([exp_sum, target_logit]))
            loss += (exp_sum.log() + largest - target_logit).sum()
            if not any(needs):
                continue
            d_logits = logits.div_(exp_sum.unsqueeze(1)).scatter_add_(1, local, -mine.unsqueeze(1))  # softmax - one hot
            if product is not logits:
                d_logits = product.copy_(d_logits)
            for x, w, d_x, d_w in zip(inputs, weights, d_inputs, d_weights, strict=True):
                if d_x is not None:
                    torch.mm(d_logits, w, out=d_x[rows])
                if d_w is not None and d_w.dtype == d_logits.dtype:
                    d_w.addmm_(d_logits.T, x[rows])
                elif d_w is not None:
                    d_w += d_logits.T @ x[rows]
        pairs = zip(d_inputs, weights, d_weights, strict=True)
        ctx.gradients = [d for d_x, w, d_w in pairs for d in (d_x, None if d_w is None else d_w.to(w.dtype))]
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g.mul_(grad) for g in ctx.gradients]
        del ctx.gradients  # scaled in place: good for one backward
        return None, None, *gradients
