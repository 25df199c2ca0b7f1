"""The experts' maths: a grouped SwiGLU over rows sorted by expert, and the sort itself.

Legend of shape suffixes in the MoE path:

    T tokens     D model width    F FFN width (this rank's)    E experts    e this rank's experts
    K experts per token           N = T * K routed rows        n this rank's rows             R LoRA rank
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.moe.kernels import pick_kernel


@dataclass(frozen=True)
class Plan:
    """Where every routed row goes: the rows of the local experts, sorted by expert."""

    token_n: Tensor  # [n] the token of each local row
    choice_n: Tensor  # [n] the same row's place among the N = T * K choices
    place_TK: Tensor  # [T, K] where each choice stands among the local rows; n if it is another rank's
    ends_e: Tensor  # [e] int32: where each local expert's rows end


def make_plan(experts_TK: Tensor, local: range, num_experts: int) -> Plan:
    """Sort the N choices by expert and keep those of the ``local`` experts."""
    top_k = experts_TK.shape[1]
    expert_N = experts_TK.flatten()
    order = expert_N.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    ends = (expert_N.unsqueeze(1) == torch.arange(num_experts, device=order.device)).sum(0).cumsum(0)
    if len(local) < num_experts:
        # the number of local rows depends on the routing, so its shape must come to the host
        start, stop = F.pad(ends, (1, 0))[[local.start, local.stop]].tolist()
        order, place, ends = order[start:stop], place - start, ends[local.start : local.stop] - start
        place = torch.where((place >= 0) & (place < stop - start), place, stop - start)
    return Plan(order // top_k, order, place.view_as(experts_TK), ends.int())


class _Dispatch(torch.autograd.Function):
    """``x_TD[token_n]``; the backward is ``combine``, a fixed order of additions on every device."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return x_TD.index_select(0, plan.token_n)

    @staticmethod
    def backward(ctx, grad_nD: Tensor) -> tuple[Tensor, None]:
        return _sum_choices(grad_nD, ctx.plan), None


class _Combine(torch.autograd.Function):
    """Each token's sum over its local rows; the backward is ``dispatch``."""

    @staticmethod
    def forward(ctx, y_nD: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _sum_choices(y_nD, plan)

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD.index_select(0, ctx.plan.token_n), None


def _sum_choices(y_nD: Tensor, plan: Plan) -> Tensor:
    if len(y_nD) < plan.place_TK.numel():
        y_nD = F.pad(y_nD, (0, 0, 0, 1))  # a zero row for choices that are another rank's
    places = plan.place_TK.unbind(1)
    out_TD = y_nD.index_select(0, places[0])
    for place_T in places[1:]:
        out_TD += y_nD.index_select(0, place_T)
    return out_TD


def dispatch(x_TD: Tensor, plan: Plan) -> Tensor:
    """Copy each token's activation to its local rows: [T, D] -> [n, D]."""
    return _Dispatch.apply(x_TD, plan)


def combine(y_nD: Tensor, plan: Plan) -> Tensor:
    """Sum the (already weighted) outputs of a token's local rows: [n, D] -> [T, D]."""
    return _Combine.apply(y_nD, plan)


class GroupedExperts(nn.Module):
    """``w2(silu(w1 x) * (w3 x))`` with one set of weights per local expert.

    The weights of all experts are stored as one matrix each, ``w1, w3 [e*F, D]`` and ``w2 [e*D, F]`` (the logical tensor
    with its first two dimensions merged), so that FSDP can cut dim 0 evenly however few experts a rank holds.
    """

    def __init__(self, num_local: int, dim: int, hidden_dim: int, kernel: str):
        super().__init__()
        self.num_local, self.kernel = num_local, kernel
        self.w1 = nn.Parameter(torch.empty(num_local * hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_local * dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_local * hidden_dim, dim))

    def forward(self, x_nD: Tensor, weight_n1: Tensor, ends_e: Tensor) -> Tensor:
        """Rows sorted by expert [n, D] -> their experts' outputs, times the routing weight [n, D]."""
        w1, w2, w3 = (w.unflatten(0, (self.num_local, -1)) for w in (self.w1, self.w2, self.w3))
        return pick_kernel(self.kernel, x_nD, w1.shape[1])(x_nD, w1, w2, w3, weight_n1, ends_e)
