"""A few neighbouring experts after the other, so that intermediate values stay in cache; gradients are written by hand.

Runs in any dtype. Experts without rows are never asked for: reading, unpacking or fetching them is what one token pays
most for. What only the gradient of a frozen weight would need is neither computed nor kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.model.moe.kernels.rows import MEMORY_BOUND_ROWS, even_count, rows_in_cache, rows_of_experts
from accessory.model.moe.weights import NOTHING_ADDED, AdaptedWeights, ExpertWeights, MaybeAdapted
from accessory.model.recompute import is_rerun


def looped(x: Tensor, w1: MaybeAdapted, w2: MaybeAdapted, w3: MaybeAdapted, weight: Tensor, row_ends: Tensor) -> Tensor:
    """Only the two up projections are kept for backward, beside x."""
    matrices = tuple(_Matrix(w) for w in (w1, w2, w3))
    return _LoopedSwiGLU.apply(x, weight, row_ends, matrices, *(tensor for each in matrices for tensor in each.trained))


def looped_matmul(x: Tensor, w: ExpertWeights, row_ends: Tensor) -> Tensor:
    return _LoopedMatmul.apply(x, row_ends, w, w.trained)


@dataclass(frozen=True)
class _Block:
    """Neighbouring experts, whose products are one batched product: that costs one call, and each core has its matrices.

    Attributes:
        experts: they, k of them; each has rows.
        rows: theirs, among all sorted rows.
        row_counts: rows of each expert.
        padded_rows: where its k * R padded rows are among those of all blocks.
    """

    experts: slice
    rows: slice
    row_counts: list[int]
    padded_rows: slice

    @property
    def padded_count(self) -> int:
        """R: to so many rows those of each expert are padded with zeros."""
        return (self.padded_rows.stop - self.padded_rows.start) // len(self.row_counts)

    def pad(self, x: Tensor) -> Tensor:
        """This block's rows of ``x`` [n, W], as [k, R, W]."""
        shape = (len(self.row_counts), self.padded_count, x.shape[1])
        if min(self.row_counts) == self.padded_count:
            return x[self.rows].reshape(shape)
        padded = x.new_empty(shape)
        for own, count, rows in zip(padded, self.row_counts, x[self.rows].split(self.row_counts), strict=True):
            own[:count], own[count:] = rows, 0
        return padded

    def fill(self, out: Tensor, make: Callable[[Tensor | None], Tensor]) -> None:
        """Have this block's rows of ``out`` [n, W] be what ``make`` gives, [k, R, W], in the place it is told, if any."""
        if min(self.row_counts) == self.padded_count:
            make(out[self.rows].view(len(self.row_counts), self.padded_count, out.shape[1]))
        else:
            batch = make(None)
            torch.cat([rows[:count] for rows, count in zip(batch, self.row_counts, strict=True)], out=out[self.rows])

    def view(self, padded: Tensor) -> Tensor:
        """This block's part of ``padded`` [padded rows of all blocks, W], as [k, R, W]."""
        return padded[self.padded_rows].view(len(self.row_counts), self.padded_count, padded.shape[1])


def _blocks(row_ends: Tensor, x: Tensor, width: int, *matrices: ExpertWeights) -> list[_Block]:
    """All experts with some of the rows ``x``, in blocks of as many as ``matrices`` are to be asked for at once, and of as
    many padded rows of ``width`` as stay in cache, where those of one expert are not more already."""
    at_once, max_rows = min(w.at_once for w in matrices), rows_in_cache(x, width)
    padded_count = even_count if x.element_size() == 2 and x.device.type == "cpu" else int  # MKL takes any number as it is
    blocks: list[_Block] = []
    for expert, rows in enumerate(rows_of_experts(row_ends, len(x))):
        if rows.start == rows.stop:
            continue
        is_neighbour = blocks and blocks[-1].experts.stop == expert and len(blocks[-1].row_counts) < at_once
        if is_neighbour and (joined := _join(blocks[-1], rows, max_rows, padded_count)):
            blocks[-1] = joined
        else:
            first, count = blocks[-1].padded_rows.stop if blocks else 0, rows.stop - rows.start
            blocks.append(_Block(slice(expert, expert + 1), rows, [count], slice(first, first + padded_count(count))))
    return blocks


def _join(block: _Block, rows: slice, max_rows: int, padded_count: Callable[[int], int]) -> _Block | None:
    """``block`` and the next expert, if its ``rows`` fit without too much padding."""
    row_counts = [*block.row_counts, rows.stop - rows.start]
    real, padded = rows.stop - block.rows.start, len(row_counts) * padded_count(max(row_counts))
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


def _product(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """``x`` [k, R, in] times ``w`` [k, in, out]. Of one expert as a plain product, which is the faster one in bf16."""
    if len(x) > 1:
        return torch.bmm(x, w) if out is None else torch.bmm(x, w, out=out)
    return torch.mm(x[0], w[0], out=None if out is None else out[0]).unsqueeze(0)


def _add_product(to: Tensor, x: Tensor, w: Tensor) -> Tensor:
    if len(x) > 1:
        return to.baddbmm_(x, w)
    to[0].addmm_(x[0], w[0])
    return to


class _Matrix:
    """One of the matrices of all experts, which gives W x or, adapted, W x + scaling * B A x + bias; each method is of a
    block's experts ``e``.

    ``trained``: of W, A, B and the bias the tensors that want gradients, for autograd to see.
    """

    def __init__(self, given: MaybeAdapted):
        self.w, added = (given.weights, given.added) if isinstance(given, AdaptedWeights) else (given, NOTHING_ADDED)
        self.a, self.b, self.bias, self.scaling = added
        of_adapter = (None if tensor is None or not tensor.requires_grad else tensor for tensor in added[:3])
        self.trained = (self.w.trained, *of_adapter)

    def times(self, e: slice, x: Tensor, out: Tensor | None = None) -> Tensor:
        y = _product(x, self.w[e].mT, out)
        if self.b is not None:
            _add_product(y, self._low(e, x), self.b[e].mT)
        return y if self.bias is None else y.add_(self.bias[e].unsqueeze(1))

    def _low(self, e: slice, x: Tensor) -> Tensor:
        """``scaling * A x`` [k, R, rank]."""
        assert self.a is not None
        return _product(x, self.a[e].mT).mul_(self.scaling)

    def low_transposed(self, e: slice, dy: Tensor) -> Tensor | None:
        """``scaling * B^T dy`` [k, R, rank], which the next two take; None: there is no B."""
        return None if self.b is None else _product(dy, self.b[e]).mul_(self.scaling)

    def add_transposed(self, e: slice, dy: Tensor, low_dy: Tensor | None, dx: Tensor | None, out: Tensor | None) -> Tensor:
        """The gradient of x, added to ``dx`` or, without one, written to ``out`` or anywhere."""
        dx = _product(dy, self.w[e], out) if dx is None else _add_product(dx, dy, self.w[e])
        return dx if low_dy is None or self.a is None else _add_product(dx, low_dy, self.a[e])

    def weight_gradient(self, e: slice, x: Tensor, dx: Tensor, dy: Tensor, out: Tensor | None) -> Tensor:
        """Of what y counts [k, R, 1]: y times ``dy``, which is ``x`` (changed) times ``dx`` and what the bias adds."""
        total = torch.sum(x.mul_(dx), -1, keepdim=True, out=out)
        return total if self.bias is None else _add_product(total, dy, self.bias[e].unsqueeze(2))

    def write_gradients(
        self, e: slice, dy: Tensor, low_dy: Tensor | None, x: Tensor, weight: Tensor, gradients: Sequence[Tensor | None]
    ) -> None:
        """Those of ``trained`` that are wanted, for y that counts ``weight``."""
        dw, da, db, d_bias = gradients
        if dw is not None:
            narrow_dy = dy.shape[2] < x.shape[2]
            _product((dy * weight if narrow_dy else dy).mT, x if narrow_dy else x * weight, out=dw[e])
        if da is not None and low_dy is not None:
            _product((low_dy * weight).mT, x, out=da[e])
        if db is not None:
            _product(dy.mT, self._low(e, x).mul_(weight), out=db[e])
        if d_bias is not None:
            _product(dy.mT, weight, out=d_bias[e].unsqueeze(2))


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
        matrices: tuple[_Matrix, _Matrix, _Matrix],
        *trained: Tensor | None,
    ) -> Tensor:
        """``trained``: of each of the ``matrices``, for autograd to see."""
        m1, m2, m3 = ctx.matrices = matrices
        hidden_dim = m1.w.shape[1]
        ctx.blocks = _blocks(row_ends, x, hidden_dim, *(m.w for m in matrices))
        rerun = is_rerun()
        _prefetch(ctx.blocks, m1.w, m3.w, *(() if rerun else (m2.w,)))
        padded = ctx.blocks[-1].padded_rows.stop if ctx.blocks else 0
        gate, up = x.new_empty(padded, hidden_dim), x.new_empty(padded, hidden_dim)
        y = torch.empty_like(x)
        for block in ctx.blocks:
            x_b, e = block.pad(x), block.experts
            g, u = m1.times(e, x_b, block.view(gate)), m3.times(e, x_b, block.view(up))
            if not rerun:
                h = F.silu(g).mul_(u)
                block.fill(y, lambda out, e=e, h=h: m2.times(e, h, out))
        needs_x = any(tensor is not None for tensor in (*m1.trained, *m3.trained))
        # what trains is kept only for autograd to see that nobody changes it before backward
        ctx.save_for_backward(x if needs_x else None, weight, gate, up, *trained)
        return y if rerun else y.mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gate, up, *trained = ctx.saved_tensors
        m1, m2, m3 = ctx.matrices
        _prefetch(ctx.blocks, m2.w, m1.w, m3.w)
        dx, d_weight = torch.empty_like(dy, memory_format=torch.contiguous_format), torch.empty_like(weight)
        gradients = [None if t is None else _zero_without_rows(torch.empty_like(t), ctx.blocks) for t in trained]
        d1, d2, d3 = (gradients[first : first + 4] for first in (0, 4, 8))
        for block in ctx.blocks:
            dy_b, weight_b, e = block.pad(dy), block.pad(weight), block.experts
            g, u = block.view(gate), block.view(up)
            s = F.silu(g)
            h, low_dy = s * u, m2.low_transposed(e, dy_b)
            dh = m2.add_transposed(e, dy_b, low_dy, None, None)
            m2.write_gradients(e, dy_b, low_dy, h, weight_b, d2)
            block.fill(d_weight, partial(m2.weight_gradient, e, h, dh, dy_b))
            du = s.mul_(dh)
            dg = torch.ops.aten.silu_backward(dh.mul_(u), g)
            low_dg, low_du = m1.low_transposed(e, dg), m3.low_transposed(e, du)
            if x is not None:
                x_b = block.pad(x)
                m1.write_gradients(e, dg, low_dg, x_b, weight_b, d1)
                m3.write_gradients(e, du, low_du, x_b, weight_b, d3)

            def into(out: Tensor | None, e=e, dg=dg, du=du, low_dg=low_dg, low_du=low_du) -> Tensor:
                return m3.add_transposed(e, du, low_du, m1.add_transposed(e, dg, low_dg, None, out), None)

            block.fill(dx, into)
        return dx.mul_(weight), d_weight, None, None, *gradients


class _LoopedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row_ends: Tensor, w: ExpertWeights, trained: Tensor | None) -> Tensor:
        ctx.w, ctx.blocks = w, _blocks(row_ends, x, max(w.shape[1:]), w)
        _prefetch(ctx.blocks, w)
        y = x.new_empty(len(x), w.shape[1])
        for block in ctx.blocks:
            block.fill(y, partial(_product, block.pad(x), w[block.experts].mT))
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
                block.fill(dx, partial(_product, dy_b, w[block.experts]))
            if dw is not None:
                _product(dy_b.mT, block.pad(x), out=dw[block.experts])
        return dx, None, None, dw
