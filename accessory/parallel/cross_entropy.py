"""Log-probabilities of a vocabulary-cut output layer, in chunks: the full logits never exist."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from accessory.dtypes import at_least, at_least_fp32
from accessory.parallel.mesh import Axis
from accessory.parallel.planned import device_type

CHUNK = {"cpu": 256, "cuda": 2048}
"""Rows of logits alive at a time: on CPU few enough to stay in cache, on GPU enough to fill it."""
PART = {"cpu": 2048, "cuda": 2**17}
"""Tokens of the vocabulary that are multiplied at a time, for the same reason."""


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


def linear_log_probs(factors: Sequence[tuple[Tensor, Tensor]], targets: Tensor, mp: Axis) -> Tensor:
    """``log softmax(logits)[target]`` of each row, where ``linear_cross_entropy`` gives minus their sum.

    For a loss that is more than their sum. The gradient of each is known only behind it, so backward computes the logits
    of each chunk again.

    Returns:
        [n] in at least fp32.
    """
    return _LinearLogProbs.apply(targets, mp, *(tensor for pair in factors for tensor in pair))


@torch.no_grad()
def linear_predictions(factors: Sequence[tuple[Tensor, Tensor]], targets: Tensor, mp: Axis) -> Tensor:
    """How each row predicts its target, where nothing is to be learnt of it.

    Returns:
        [2, n] in at least fp32: ``log softmax(logits)[target]``, and 1 where the target is the likeliest token, else 0.
    """
    tensors = [tensor for pair in factors for tensor in pair]
    predictions = torch.empty(2, len(targets), dtype=at_least(tensors[0].dtype), device=targets.device)
    for chunk in _chunks(targets, mp, tensors):
        likeliest = chunk.likeliest(mp)
        target_logit, log_sum, _ = chunk.statistics(mp)
        predictions[0, chunk.rows] = target_logit - log_sum
        predictions[1, chunk.rows] = (likeliest == targets[chunk.rows]).to(predictions)
    return predictions


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same of one pair on one rank, in plain torch."""
    return torch.nn.functional.cross_entropy(at_least_fp32(hidden @ weight.T), targets, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, targets: Tensor, mp: Axis, *tensors: Tensor) -> Tensor:
        needs = ctx.needs_input_grad[2:]
        gradients = _Gradients(tensors, needs)
        loss = torch.zeros((), dtype=at_least(tensors[0].dtype), device=targets.device)
        for chunk in _chunks(targets, mp, tensors):
            target_logit, log_sum, exp_sum = chunk.statistics(mp)
            loss += (log_sum - target_logit).sum()
            if any(needs):
                gradients.add(chunk, chunk.minus_one_hot(chunk.logits.div_(exp_sum.unsqueeze(1))))
        ctx.gradients = gradients.in_order()
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g.mul_(grad) for g in ctx.gradients]
        del ctx.gradients  # scaled in place: good for one backward
        return None, None, *gradients


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, targets: Tensor, mp: Axis, *tensors: Tensor) -> Tensor:
        log_sums, log_probs = torch.empty(2, len(targets), dtype=at_least(tensors[0].dtype), device=targets.device)
        for chunk in _chunks(targets, mp, tensors):
            target_logit, log_sums[chunk.rows], _ = chunk.statistics(mp)
            log_probs[chunk.rows] = target_logit - log_sums[chunk.rows]
        ctx.mp = mp
        ctx.save_for_backward(targets, log_sums, *tensors)
        return log_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        targets, log_sums, *tensors = ctx.saved_tensors
        gradients = _Gradients(tensors, ctx.needs_input_grad[2:])
        for chunk in _chunks(targets, ctx.mp, tensors):
            softmax = chunk.logits.sub_(log_sums[chunk.rows].unsqueeze(1)).exp_()
            gradients.add(chunk, chunk.minus_one_hot(softmax).mul_(-grad[chunk.rows].unsqueeze(1)))
        return None, None, *gradients.in_order()


@dataclass(frozen=True)
class _Chunk:
    """Some of the rows; their logits are good until the next chunk's are computed, and may be changed."""

    rows: slice
    logits: Tensor  # [c, V / mp] in at least fp32
    narrow: Tensor  # [c, V / mp] room in the model's dtype: the same, if that is no narrower
    column: Tensor  # [c, 1] of the target among this rank's
    mine: Tensor  # [c] 1 where it is among them, else 0

    def statistics(self, mp: Axis) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row [c]: the target's logit, log sum exp of the logits, and the sum of what then stands in their place,
        ``exp(logits - largest)``; all over the whole vocabulary (collectives)."""
        target_logit = self.logits.gather(1, self.column).squeeze(1) * self.mine
        largest = mp.all_reduce(self.logits.amax(1), ReduceOp.MAX)
        exp_sum = self.logits.sub_(largest.unsqueeze(1)).exp_().sum(1)
        exp_sum, target_logit = mp.all_reduce(torch.stack([exp_sum, target_logit]))
        return target_logit, exp_sum.log() + largest, exp_sum

    def likeliest(self, mp: Axis) -> Tensor:
        """[c] the token of the largest logit, of equal ones the first (collectives)."""
        largest, column = self.logits.max(1)
        width = self.logits.shape[1]
        is_less = largest < mp.all_reduce(largest.clone(), ReduceOp.MAX)
        token = (column + mp.rank * width).masked_fill(is_less, mp.size * width)
        return mp.all_reduce(token, ReduceOp.MIN)

    def minus_one_hot(self, softmax: Tensor) -> Tensor:
        """The gradient of ``-log softmax(logits)[target]``, in place of ``softmax``."""
        return softmax.scatter_add_(1, self.column, -self.mine.unsqueeze(1))


def _chunks(targets: Tensor, mp: Axis, tensors: Sequence[Tensor]) -> Iterator[_Chunk]:
    """All rows, whose logits are the summed products of ``tensors``: x, W, x, W, ..."""
    (hidden, *more), (weight, *more_weights) = tensors[::2], tensors[1::2]
    wide, device, start = at_least(hidden.dtype), device_type(hidden), mp.rank * len(weight)
    size = CHUNK[device]
    # one buffer for all chunks, and one in the model's dtype if that is narrower; everything happens in place
    buffer = hidden.new_empty(min(size, len(hidden)), len(weight), dtype=wide)
    narrow = buffer if hidden.dtype == wide else torch.empty_like(buffer, dtype=hidden.dtype)
    for first in range(0, len(hidden), size):
        rows = slice(first, min(first + size, len(hidden)))
        logits, product = buffer[: rows.stop - first], narrow[: rows.stop - first]
        for part, w in zip(product.split(PART[device], 1), weight.split(PART[device]), strict=True):
            torch.mm(hidden[rows], w.T, out=part)
        for x, w in zip(more, more_weights, strict=True):
            product.addmm_(x[rows], w.T)
        if product.dtype != wide:
            logits.copy_(product)
        local = targets[rows] - start
        mine = ((local >= 0) & (local < len(weight))).to(wide)
        yield _Chunk(rows, logits, product, local.clamp(0, len(weight) - 1).unsqueeze(1), mine)


class _Gradients:
    """Of what the logits are made of, added up chunk by chunk: of weights in at least fp32."""

    def __init__(self, tensors: Sequence[Tensor], needs: Sequence[bool]):
        self.inputs, self.weights = tensors[::2], tensors[1::2]
        pairs = zip(self.inputs, needs[::2], strict=True), zip(self.weights, needs[1::2], strict=True)
        self.d_inputs = [torch.empty_like(x) if need else None for x, need in pairs[0]]
        self.d_weights = [torch.zeros_like(w, dtype=at_least(w.dtype)) if need else None for w, need in pairs[1]]

    def add(self, chunk: _Chunk, d_logits: Tensor) -> None:
        rows = chunk.rows
        if chunk.narrow.dtype != d_logits.dtype:
            d_logits = chunk.narrow.copy_(d_logits)
        for x, w, d_x, d_w in zip(self.inputs, self.weights, self.d_inputs, self.d_weights, strict=True):
            if d_x is not None:
                torch.mm(d_logits, w, out=d_x[rows])
            if d_w is not None and d_w.dtype == d_logits.dtype:
                d_w.addmm_(d_logits.T, x[rows])
            elif d_w is not None:
                size = PART[device_type(d_w)]
                for part, d_columns in zip(d_w.split(size), d_logits.split(size, 1), strict=True):
                    part += d_columns.T @ x[rows]

    def in_order(self) -> list[Tensor | None]:
        """As the tensors came, each in its tensor's dtype."""
        pairs = zip(self.d_inputs, self.weights, self.d_weights, strict=True)
        return [d for d_x, w, d_w in pairs for d in (d_x, None if d_w is None else d_w.to(w.dtype))]
