"""A few neighbouring experts after the other, so that intermediate values stay in cache; gradients are written by hand.

Runs in any dtype. Experts without rows are never asked for: reading, unpacking or fetching them is what one token pays
most for. What only the gradient of a frozen weight would need is neither computed nor kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from accessory.model.moe.kernels.rows import rows_in_cache, rows_of_experts
from accessory.model.moe.weights import ExpertWeights
from accessory.model.recompute import is_rerun

MEMORY_BOUND_ROWS = 64
"""Rows up to which a product takes the time of reading its matrix, so that padding costs nothing."""


def looped(x: Tensor, w1: ExpertWeights, w2: ExpertWeights, w3: ExpertWeights, weight: Tensor, row_ends: Tensor) -> Tensor:
    """Only the two up projections are kept for backward."""
    matrices = (w1, w2, w3)
    return _LoopedSwiGLU.apply(x, weight, row_ends, matrices, *(w.trained for w in matrices))


def looped_matmul(x: Tensor, w: ExpertWeights, row_ends: Tensor) -> Tensor:
    return _LoopedMatmul.apply(x, row_ends, w, w.trained)


@dataclass(frozen=True)
class _Block:
    """Neighbouring experts, whose products are one batched product: that costs one call, and each core has its matrices.

    Attributes:
        experts: they, k of them; each has rows.
        rows: theirs, among all sorted rows.
        row_counts: rows of each expert; R is the most of them, to which the others' are padded with zeros.
        padded_rows: where its k * R padded rows are among those of all blocks.
    """

    experts: slice
    rows: slice
    row_counts: list[int]
    padded_rows: slice

    def pad(self, x: Tensor) -> Tensor:
        """This block's rows of ``x`` [n, W], as [k, R, W]."""
        if min(self.row_counts) == max(self.row_counts):
            return x[self.rows].reshape(len(self.row_counts), self.row_counts[0], x.shape[1])
        return pad_sequence(x[self.rows].split(self.row_counts), batch_first=True)

    def unpad(self, batch: Tensor, out: Tensor) -> None:
        """Write [k, R, W] to this block's rows of ``out`` [n, W]."""
        torch.cat([rows[:count] for rows, count in zip(batch, self.row_counts, strict=True)], out=out[self.rows])

    def view(self, padded: Tensor) -> Tensor:
        """This block's part of ``padded`` [padded rows of all blocks, W], as [k, R, W]."""
        return padded[self.padded_rows].view(len(self.row_counts), max(self.row_counts), padded.shape[1])


def _blocks(row_ends: Tensor, total: int, max_rows: int, *matrices: ExpertWeights) -> list[_Block]:
    """All experts with some of the ``total`` rows, in blocks of as many as ``matrices`` are to be asked for at once, and of
    up to ``max_rows`` padded rows, where those of one expert are not more already."""
    at_once = min(w.at_once for w in matrices)
    blocks: list[_Block] = []
    for expert, rows in enumerate(rows_of_experts(row_ends, total)):
        if rows.start == rows.stop:
            continue
        is_neighbour = blocks and blocks[-1].experts.stop == expert and len(blocks[-1].row_counts) < at_once
        if is_neighbour and (joined := _join(blocks[-1], rows, max_rows)):
            blocks[-1] = joined
        else:
            first, count = blocks[-1].padded_rows.stop if blocks else 0, rows.stop - rows.start
            blocks.append(_Block(slice(expert, expert + 1), rows, [count], slice(first, first + count)))
    return blocks


def _join(block: _Block, rows: slice, max_rows: int) -> _Block | None:
    """``block`` and the next expert, if its ``rows`` fit without too much padding."""
    row_counts = [*block.row_counts, rows.stop - rows.start]
    real, padded = rows.stop - block.rows.start, len(row_counts) * max(row_counts)
    if padded > max_rows or (max(row_counts) > MEMORY_BOUND_ROWS and padded > 1.125 * real):
        return None
    first = block.padded_rows.start
    experts = slice(block.experts.start, block.experts.stop + 1)
    return _Block(experts, slice(block.rows.start, rows.stop), row_counts, slice(first, first + padded))


def _prefetch(blocks: list[_Block], *matrices: ExpertWeights) -> None:
    """Announce, in its order, what each block is about to ask for."""
    for block in blocks:
        for w in matrices:
            w.prefetch(block.experts)


def _zero_without_rows(gradient: Tensor, blocks: list[_Block]) -> Tensor:
    """``gradient`` [e, out, in] of a weight, not yet written: what no block will write is made zero."""
    written = 0
    for block in blocks:
        gradient[written : block.experts.start] = 0
        written = block.experts.stop
    gradient[written:] = 0
    return gradient


class _LoopedSwiGLU(torch.autograd.Function):
    """Legend: g = w1 x, u = w3 x, s = silu(g), y = weight * w2 (s * u); the weight is applied at width D, not F.

    Padding is zero in x and dy, so it is in all that follows from them, and adds nothing to any gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        row_ends: Tensor,
        matrices: tuple[ExpertWeights, ExpertWeights, ExpertWeights],
        *trained: Tensor | None,
    ) -> Tensor:
        """``trained``: of each of the ``matrices``, for autograd to see."""
        w1, w2, w3 = ctx.matrices = matrices
        hidden_dim = w1.shape[1]
        ctx.blocks = _blocks(row_ends, len(x), rows_in_cache(x, hidden_dim), w1, w2, w3)
        rerun = is_rerun()
        _prefetch(ctx.blocks, w1, w3, *(() if rerun else (w2,)))
        padded = ctx.blocks[-1].padded_rows.stop if ctx.blocks else 0
        gate, up = x.new_empty(padded, hidden_dim), x.new_empty(padded, hidden_dim)
        y = torch.empty_like(x)
        for block in ctx.blocks:
            x_b, g, u, e = block.pad(x), block.view(gate), block.view(up), block.experts
            torch.bmm(x_b, w1[e].mT, out=g)
            torch.bmm(x_b, w3[e].mT, out=u)
            if not rerun:
                block.unpad(torch.bmm(F.silu(g).mul_(u), w2[e].mT), out=y)
        needs_x = w1.trained is not None or w3.trained is not None
        # what trains is kept only for autograd to see that nobody changes it before backward
        ctx.save_for_backward(x if needs_x else None, weight, gate, up, *trained)
        return y if rerun else y.mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, up, *trained = ctx.saved_tensors
        w1, w2, w3 = ctx.matrices
        _prefetch(ctx.blocks, w2, w1, w3)
        dx, d_weight = torch.empty_like(dy, memory_format=torch.contiguous_format), torch.empty_like(weight)
        dw1, dw2, dw3 = (None if w is None else _zero_without_rows(torch.empty_like(w), ctx.blocks) for w in trained)
        for block in ctx.blocks:
            dy_b, weight_b, e = block.pad(dy), block.pad(weight), block.experts
            g, u = block.view(gate), block.view(up)
            s = F.silu(g)
            h, dh = s * u, torch.bmm(dy_b, w2[e])
            if dw2 is not None:
                torch.bmm((dy_b * weight_b).mT, h, out=dw2[e])
            block.unpad(torch.sum(h.mul_(dh), -1, keepdim=True), out=d_weight)
            du = s.mul_(dh)
            dg = torch.ops.aten.silu_backward(dh.mul_(u), g)
            if x is not None:
                weighted_x = block.pad(x) * weight_b
                if dw1 is not None:
                    torch.bmm(dg.mT, weighted_x, out=dw1[e])
                if dw3 is not None:
                    torch.bmm(du.mT, weighted_x, out=dw3[e])
            block.unpad(torch.bmm(dg, w1[e]).baddbmm_(du, w3[e]), out=dx)
        return dx.mul_(weight), d_weight, None, None, dw1, dw2, dw3


class _LoopedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row_ends: Tensor, w: ExpertWeights, trained: Tensor | None) -> Tensor:
        ctx.w, ctx.blocks = w, _blocks(row_ends, len(x), rows_in_cache(x, max(w.shape[1:])), w)
        _prefetch(ctx.blocks, w)
        y = x.new_empty(len(x), w.shape[1])
        for block in ctx.blocks:
            block.unpad(torch.bmm(block.pad(x), w[block.experts].mT), out=y)
        ctx.save_for_backward(None if trained is None else x, trained if ctx.needs_input_grad[0] else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        x, _ = ctx.saved_tensors
        w, blocks = ctx.w, ctx.blocks
        dx = dy.new_empty(len(dy), w.shape[2]) if ctx.needs_input_grad[0] else None
        dw = None if x is None else _zero_without_rows(dy.new_empty(w.shape), blocks)
        if dx is not None:
            _prefetch(blocks, w)
        for block in blocks:
            dy_b = block.pad(dy)
            if dx is not None:
                block.unpad(torch.bmm(dy_b, w[block.experts]), out=dx)
            if dw is not None:
                torch.bmm(dy_b.mT, block.pad(x), out=dw[block.experts])
        return dx, None, None, dw
