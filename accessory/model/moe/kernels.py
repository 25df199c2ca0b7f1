"""How the experts' SwiGLU over sorted rows is computed. Every kernel takes the same and gives the same.

``x`` [n, D] holds the rows of expert 0, then of expert 1, ...; ``ends`` [e] (int32) says where each expert's rows end;
``w1, w3`` [e, F, D] and ``w2`` [e, D, F] are the experts' weights; ``weight`` [n, 1] is each row's routing weight.
The result is ``weight * w2(silu(w1 x) * (w3 x))``, [n, D]. Another kernel (block-sparse megablocks, say) is another
function here. Beside each stands its one product ``w x``, of which experts with adapters are composed.

What only the gradient of a frozen weight would need is neither computed nor kept.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ExpertKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
GroupedMatmul = Callable[[Tensor, Tensor, Tensor], Tensor]


def reference(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The definition: one expert after the other, differentiated by autograd."""
    out = []
    for (start, stop), a, b, c in zip(_spans(ends), w1.unbind(), w2.unbind(), w3.unbind(), strict=True):
        rows = x[start:stop]
        out.append((F.silu(rows @ a.T) * (rows @ c.T)) @ b.T)
    return torch.cat(out) * weight


def looped(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """One expert after the other, so that its intermediate values stay in cache; gradients are written by hand.

    Only the two up projections are kept for backward. Runs in any dtype; waits for ``ends`` on the host.
    """
    return _Looped.apply(x, w1, w2, w3, weight, ends)


def grouped(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """torch's grouped matmul (CUTLASS on Hopper) for all experts at once, without waiting for the host; not in fp64.

    The routing weight is applied before the down projection, so that the experts' output need not be kept. The gradient
    of the result must be contiguous, as ``combine`` hands it back.
    """
    gate = F.grouped_mm(x, w1.mT, offs=ends)
    up = F.grouped_mm(x, w3.mT, offs=ends)
    return F.grouped_mm(weighted_swiglu(gate, up, weight), w2.mT, offs=ends)


def reference_matmul(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Each row times its expert's matrix: ``x`` [n, in], ``w`` [e, out, in] -> [n, out]. The definition."""
    return torch.cat([x[start:stop] @ matrix.T for (start, stop), matrix in zip(_spans(ends), w.unbind(), strict=True)])


def looped_matmul(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """The same, written into one tensor. Runs in any dtype; waits for ``ends`` on the host."""
    return _LoopedMatmul.apply(x, w, ends)


def grouped_matmul(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """The same by torch's grouped matmul, which needs strides of 16 bytes: a LoRA rank that does not fit is looped."""
    if not _aligned(x, *w.shape[1:]):
        return looped_matmul(x, w, ends)
    return F.grouped_mm(x, w.mT, offs=ends)


KERNELS: dict[str, ExpertKernel] = {"reference": reference, "looped": looped, "grouped": grouped}
MATMULS: dict[str, GroupedMatmul] = {
    "reference": reference_matmul,
    "looped": looped_matmul,
    "grouped": grouped_matmul,
}


def pick_kernel(name: str, x: Tensor, hidden_dim: int) -> str:
    """``name``, or what "auto" means: "looped" on CPU, "grouped" on GPU wherever dtype and strides let it run."""
    if name == "auto":
        can_group = x.is_cuda and _aligned(x, x.shape[1], hidden_dim) and x.dtype != torch.float64
        name = "grouped" if can_group else "looped"
    return name


def _aligned(x: Tensor, *sizes: int) -> bool:
    return all(size * x.element_size() % 16 == 0 for size in sizes)


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *ends.tolist()]))


BLOCK = 512
"""Rows that ``looped`` takes at once: few enough to stay in cache, enough to outweigh the calls (an expert is never cut)."""


class _Looped(torch.autograd.Function):
    """Legend: g = w1 x, u = w3 x, s = silu(g), y = weight * w2 (s * u); the weight is applied at width D, not F."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        gate, up = x.new_empty(len(x), w1.shape[1]), x.new_empty(len(x), w1.shape[1])
        y = torch.empty_like(x)
        ctx.spans = _spans(ends)
        for rows, experts in _blocks(ctx.spans):
            for e, span in experts:
                torch.mm(x[span], w1[e].T, out=gate[span])
                torch.mm(x[span], w3[e].T, out=up[span])
            h = F.silu(gate[rows]).mul_(up[rows])
            for e, span in experts:
                torch.mm(h[_within(span, rows)], w2[e].T, out=y[span])
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:4:2]) else None, w1, w2, w3, weight, gate, up)
        return y.mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, w3, weight, gate, up = ctx.saved_tensors
        dx, d_weight = torch.empty_like(dy, memory_format=torch.contiguous_format), torch.empty_like(weight)
        dw1, dw2, dw3 = (
            torch.empty_like(w) if need else None for w, need in zip((w1, w2, w3), ctx.needs_input_grad[1:4], strict=True)
        )
        for rows, experts in _blocks(ctx.spans):
            g, u = gate[rows], up[rows]
            s = F.silu(g)
            h, dh = s * u, torch.empty_like(g)
            weighted_dy = dy[rows] * weight[rows] if dw2 is not None else None
            weighted_x = x[rows] * weight[rows] if x is not None else None
            for e, span in experts:
                local = _within(span, rows)
                torch.mm(dy[span], w2[e], out=dh[local])
                if dw2 is not None and weighted_dy is not None:
                    torch.mm(weighted_dy[local].T, h[local], out=dw2[e])
            torch.sum(h.mul_(dh), -1, keepdim=True, out=d_weight[rows])
            du = s.mul_(dh)
            dg = torch.ops.aten.silu_backward(dh.mul_(u), g)
            for e, span in experts:
                local = _within(span, rows)
                if dw1 is not None and weighted_x is not None:
                    torch.mm(dg[local].T, weighted_x[local], out=dw1[e])
                if dw3 is not None and weighted_x is not None:
                    torch.mm(du[local].T, weighted_x[local], out=dw3[e])
                torch.mm(dg[local], w1[e], out=dx[span]).addmm_(du[local], w3[e])
        return dx.mul_(weight), dw1, dw2, dw3, d_weight, None


def _blocks(spans: list[tuple[int, int]]) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Neighbouring experts together, up to BLOCK rows: (rows of the block, [(expert, its rows)]).

    Experts without rows are in it too: a product over no rows gives them the zero gradient that they have.
    """
    block: list[tuple[int, slice]] = []
    for e, (start, stop) in enumerate(spans):
        if block and stop - block[0][1].start > BLOCK:
            yield slice(block[0][1].start, start), block
            block = []
        block.append((e, slice(start, stop)))
    yield slice(block[0][1].start, spans[-1][1]), block


def _within(span: slice, rows: slice) -> slice:
    return slice(span.start - rows.start, span.stop - rows.start)


class _LoopedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        y = x.new_empty(len(x), w.shape[1])
        ctx.spans = _spans(ends)
        for (start, stop), matrix in zip(ctx.spans, w.unbind(), strict=True):
            torch.mm(x[start:stop], matrix.T, out=y[start:stop])
        needs_x, needs_w, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_w else None, w if needs_x else None)
        ctx.shape = w.shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        dx = dy.new_empty(len(dy), ctx.shape[2]) if w is not None else None
        dw = dy.new_empty(ctx.shape) if x is not None else None
        for e, (start, stop) in enumerate(ctx.spans):
            if dx is not None:
                torch.mm(dy[start:stop], w[e], out=dx[start:stop])
            if dw is not None:
                torch.mm(dy[start:stop].T, x[start:stop], out=dw[e])
        return dx, dw, None


def weighted_swiglu(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """``silu(gate) * up * weight``, keeping only its inputs for backward."""
    return _WeightedSwiGLU.apply(gate, up, weight)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        h = torch.empty_like(gate)
        for rows in _cached_rows(gate):
            torch.mul(F.silu(gate[rows]), up[rows], out=h[rows]).mul_(weight[rows])
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight = ctx.saved_tensors
        d_gate, d_up, d_weight = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(weight)
        for rows in _cached_rows(gate):
            ds = dh[rows] * F.silu(gate[rows])
            torch.sum(ds * up[rows], -1, keepdim=True, out=d_weight[rows])
            torch.mul(ds, weight[rows], out=d_up[rows])
            ds.copy_(dh[rows]).mul_(weight[rows]).mul_(up[rows])  # of silu(gate) now
            torch.ops.aten.silu_backward.grad_input(ds, gate[rows], grad_input=d_gate[rows])
        return d_gate, d_up, d_weight


def _cached_rows(x: Tensor) -> Iterator[slice]:
    """All rows on GPU; on CPU as many at a time as stay in cache through several elementwise passes."""
    step = BLOCK if x.device.type == "cpu" else max(1, len(x))
    return (slice(first, first + step) for first in range(0, len(x), step))
