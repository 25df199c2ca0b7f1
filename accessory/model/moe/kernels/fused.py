"""Experts of a few operations over sorted rows, with gradients written by hand: x, gate and up are all that is kept.

The weights are taken as one tensor for all experts, and asked for again in backward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from accessory.model.moe.weights import ExpertWeights
from accessory.model.recompute import is_rerun


class SwiGLUBackward(Protocol):
    def __call__(
        self, gate: Tensor, up: Tensor, weight: Tensor, dh: Tensor, with_h: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """d_gate, d_up, d_weight and, if wanted, what ``swiglu`` gives."""
        ...


@dataclass(frozen=True)
class Operations:
    """What experts are made of. Every tensor that is given lies contiguous, and there are rows.

    Attributes:
        times: of (x [n, in], w [e, out, in], row_ends): each row times its expert's matrix, [n, out].
        times_transposed: of (y [n, out], w [e, out, in], row_ends): the same with the transposed matrix, [n, in].
        outer: of (y [n, out], x [n, in], row_ends): the sum of y x^T over each expert's rows, [e, out, in]; zero of none.
        swiglu: of (gate, up [n, F], weight [n, 1]): ``silu(gate) * up * weight``.
    """

    times: Callable[[Tensor, Tensor, Tensor], Tensor]
    times_transposed: Callable[[Tensor, Tensor, Tensor], Tensor]
    outer: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu_backward: SwiGLUBackward


def fused_swiglu(
    operations: Operations,
    x: Tensor,
    w1: ExpertWeights,
    w2: ExpertWeights,
    w3: ExpertWeights,
    weight: Tensor,
    row_ends: Tensor,
) -> Tensor:
    """The experts' output [n, D]; the routing weight is applied before the down projection, so that it need not be kept."""
    matrices = (w1, w2, w3)
    return _FusedSwiGLU.apply(operations, x.contiguous(), weight, row_ends, matrices, *(w.trained for w in matrices))


def fused_matmul(operations: Operations, x: Tensor, w: ExpertWeights, row_ends: Tensor) -> Tensor:
    return _FusedMatmul.apply(operations, x.contiguous(), row_ends, w, w.trained)


class _FusedSwiGLU(torch.autograd.Function):
    """Legend: g = w1 x, u = w3 x, h = weight * silu(g) * u, y = w2 h."""

    @staticmethod
    def forward(
        ctx: Any,
        operations: Operations,
        x: Tensor,
        weight: Tensor,
        row_ends: Tensor,
        matrices: tuple[ExpertWeights, ExpertWeights, ExpertWeights],
        *trained: Tensor | None,
    ) -> Tensor:
        """``trained``: of each of the ``matrices``, for autograd to see."""
        ctx.operations, ctx.matrices = operations, matrices
        w1, w2, w3 = matrices
        gate, up = (operations.times(x, w[:], row_ends) for w in (w1, w3))
        needs_x = w1.trained is not None or w3.trained is not None
        ctx.save_for_backward(x if needs_x else None, weight, row_ends, gate, up, *trained)
        if is_rerun():
            return torch.empty_like(x)
        return operations.times(operations.swiglu(gate, up, weight), w2[:], row_ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, row_ends, gate, up, *trained = ctx.saved_tensors
        (w1, w2, w3), operations = ctx.matrices, ctx.operations
        dy = dy.contiguous()
        dh = operations.times_transposed(dy, w2[:], row_ends)
        dg, du, d_weight, h = operations.swiglu_backward(gate, up, weight, dh, with_h=trained[1] is not None)
        dw1, dw3 = (None if w is None else operations.outer(d, x, row_ends) for w, d in ((trained[0], dg), (trained[2], du)))
        dw2 = None if h is None else operations.outer(dy, h, row_ends)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = operations.times_transposed(dg, w1[:], row_ends).add_(operations.times_transposed(du, w3[:], row_ends))
        return None, dx, d_weight, None, None, dw1, dw2, dw3


class _FusedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operations: Operations, x: Tensor, row_ends: Tensor, w: ExpertWeights, trained: Tensor | None
    ) -> Tensor:
        ctx.operations, ctx.w, ctx.row_ends = operations, w, row_ends
        ctx.save_for_backward(None if trained is None else x, trained if ctx.needs_input_grad[1] else None)
        return operations.times(x, w[:], row_ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, _ = ctx.saved_tensors
        dy, row_ends = dy.contiguous(), ctx.row_ends
        dx = ctx.operations.times_transposed(dy, ctx.w[:], row_ends) if ctx.needs_input_grad[1] else None
        return None, dx, None, None, None if x is None else ctx.operations.outer(dy, x, row_ends)
