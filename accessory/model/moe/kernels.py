"""How the experts' SwiGLU over sorted rows is computed. Every kernel takes the same and gives the same.

``x`` [n, D] holds the rows of expert 0, then of expert 1, ...; ``ends`` [e] (int32) says where each expert's rows end;
``w1, w3`` [e, F, D] and ``w2`` [e, D, F] are the experts' weights; ``weight`` [n, 1] is each row's routing weight.
The result is ``weight * w2(silu(w1 x) * (w3 x))``, [n, D]. Another kernel (block-sparse megablocks, say) is another
function here. Beside each stands its one product ``w x``, of which experts with adapters are composed.

What only the gradient of a frozen weight would need is neither computed nor kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    """A few neighbouring experts after the other, so that intermediate values stay in cache; gradients are written by hand.

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


CACHED = 2**22
"""Bytes of one intermediate value [rows, F] that still stay in cache through several passes over it."""
FEW = 64
"""Rows up to which a product takes the time of reading its matrix, so that padding costs nothing."""


@dataclass(frozen=True)
class _Block:
    """Neighbouring experts, whose products are one batched product: that costs one call, and each core has its matrices.

    Attributes:
        experts: they, k of them.
        rows: theirs, among all sorted rows.
        counts: rows of each expert.
        height: R, the most of them; to so many each expert's rows are padded, with zeros.
        kept: where its k * R padded rows are among those of all blocks.
    """

    experts: slice
    rows: slice
    counts: list[int]
    kept: slice

    @property
    def height(self) -> int:
        return max(self.counts)

    def batch(self, x: Tensor) -> Tensor:
        """This block's rows of ``x`` [n, W], as [k, R, W]."""
        if self._even:
            return x[self.rows].reshape(len(self.counts), self.height, x.shape[1])
        return pad_sequence(x[self.rows].split(self.counts), batch_first=True)

    def unpad(self, batch: Tensor, out: Tensor) -> None:
        """Write [k, R, W] to this block's rows of ``out`` [n, W]."""
        torch.cat([rows[:count] for rows, count in zip(batch, self.counts, strict=True)], out=out[self.rows])

    @property
    def _even(self) -> bool:
        return len(self.counts) * self.height == self.rows.stop - self.rows.start


def _blocks(ends: Tensor, most: int, weights_train: bool) -> list[_Block]:
    """All experts in blocks of up to ``most`` padded rows, where those of one expert are not more already.

    An expert without rows is in a block only if its weights train: a product over no rows gives it the zero gradient that it
    has. Otherwise its weights are not touched: reading them is what one token costs.
    """
    blocks: list[_Block] = []
    for e, (start, stop) in enumerate(_spans(ends)):
        if start == stop and not weights_train:
            continue
        neighbour = blocks and blocks[-1].experts.stop == e
        if neighbour and (joined := _join(blocks[-1], start, stop, most)):
            blocks[-1] = joined
        else:
            kept = blocks[-1].kept.stop if blocks else 0
            blocks.append(_Block(slice(e, e + 1), slice(start, stop), [stop - start], slice(kept, kept + stop - start)))
    return blocks


def _join(block: _Block, start: int, stop: int, most: int) -> _Block | None:
    """``block`` and the next expert, if its rows fit without too much padding."""
    counts = [*block.counts, stop - start]
    real, padded = stop - block.rows.start, len(counts) * max(counts)
    if padded > most or (max(counts) > FEW and padded > 1.125 * real):
        return None
    first = block.kept.start
    experts = slice(block.experts.start, block.experts.stop + 1)
    return _Block(experts, slice(block.rows.start, stop), counts, slice(first, first + padded))


class _Looped(torch.autograd.Function):
    """Legend: g = w1 x, u = w3 x, s = silu(g), y = weight * w2 (s * u); the weight is applied at width D, not F.

    Padding is zero in x and dy, so it is in all that follows from them, and adds nothing to any gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.blocks = _blocks(ends, _cached_rows(x, w1.shape[1]), any(ctx.needs_input_grad[1:4]))
        padded = ctx.blocks[-1].kept.stop if ctx.blocks else 0
        gate, up = (x.new_empty(padded, w1.shape[1]) for _ in range(2))
        y = torch.empty_like(x)
        for block in ctx.blocks:
            x_b, e = block.batch(x), block.experts
            g, u = (kept[block.kept].view(*x_b.shape[:2], kept.shape[1]) for kept in (gate, up))
            torch.bmm(x_b, w1[e].mT, out=g)
            torch.bmm(x_b, w3[e].mT, out=u)
            block.unpad(torch.bmm(F.silu(g).mul_(u), w2[e].mT), out=y)
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:4:2]) else None, w1, w2, w3, weight, gate, up)
        return y.mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, w3, weight, gate, up = ctx.saved_tensors
        dx, d_weight = torch.empty_like(dy, memory_format=torch.contiguous_format), torch.empty_like(weight)
        dw1, dw2, dw3 = (
            torch.empty_like(w) if need else None for w, need in zip((w1, w2, w3), ctx.needs_input_grad[1:4], strict=True)
        )
        for block in ctx.blocks:
            dy_b, weight_b, e = block.batch(dy), block.batch(weight), block.experts
            g, u = (kept[block.kept].view(*dy_b.shape[:2], kept.shape[1]) for kept in (gate, up))
            s = F.silu(g)
            h, dh = s * u, torch.bmm(dy_b, w2[e])
            if dw2 is not None:
                torch.bmm((dy_b * weight_b).mT, h, out=dw2[e])
            block.unpad(torch.sum(h.mul_(dh), -1, keepdim=True), out=d_weight)
            du = s.mul_(dh)
            dg = torch.ops.aten.silu_backward(dh.mul_(u), g)
            if x is not None:
                weighted_x = block.batch(x) * weight_b
                if dw1 is not None:
                    torch.bmm(dg.mT, weighted_x, out=dw1[e])
                if dw3 is not None:
                    torch.bmm(du.mT, weighted_x, out=dw3[e])
            block.unpad(torch.bmm(dg, w1[e]).baddbmm_(du, w3[e]), out=dx)
        return dx.mul_(weight), dw1, dw2, dw3, d_weight, None


class _LoopedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        y = x.new_empty(len(x), w.shape[1])
        needs_x, needs_w, _ = ctx.needs_input_grad
        ctx.blocks = _blocks(ends, _cached_rows(x, max(w.shape[1:])), needs_w)
        for block in ctx.blocks:
            block.unpad(torch.bmm(block.batch(x), w[block.experts].mT), out=y)
        ctx.save_for_backward(x if needs_w else None, w if needs_x else None)
        ctx.shape = w.shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        dx = dy.new_empty(len(dy), ctx.shape[2]) if w is not None else None
        dw = dy.new_empty(ctx.shape) if x is not None else None
        for block in ctx.blocks:
            dy_b = block.batch(dy)
            if dx is not None:
                block.unpad(torch.bmm(dy_b, w[block.experts]), out=dx)
            if dw is not None:
                torch.bmm(dy_b.mT, block.batch(x), out=dw[block.experts])
        return dx, dw, None


def weighted_swiglu(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """``silu(gate) * up * weight``, keeping only its inputs for backward."""
    return _WeightedSwiGLU.apply(gate, up, weight)


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        h = torch.empty_like(gate)
        for rows in _in_cache(gate):
            torch.mul(F.silu(gate[rows]), up[rows], out=h[rows]).mul_(weight[rows])
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight = ctx.saved_tensors
        d_gate, d_up, d_weight = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(weight)
        for rows in _in_cache(gate):
            ds = dh[rows] * F.silu(gate[rows])
            torch.sum(ds * up[rows], -1, keepdim=True, out=d_weight[rows])
            torch.mul(ds, weight[rows], out=d_up[rows])
            ds.copy_(dh[rows]).mul_(weight[rows]).mul_(up[rows])  # of silu(gate) now
            torch.ops.aten.silu_backward.grad_input(ds, gate[rows], grad_input=d_gate[rows])
        return d_gate, d_up, d_weight


def _in_cache(x: Tensor) -> Iterator[slice]:
    """All rows on GPU; on CPU as many at a time as stay in cache through several elementwise passes."""
    step = _cached_rows(x, x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
    return (slice(first, first + step) for first in range(0, len(x), step))


def _cached_rows(x: Tensor, width: int) -> int:
    """How many rows of ``width`` numbers like those of ``x`` stay in cache."""
    return max(1, CACHED // (width * x.element_size()))
