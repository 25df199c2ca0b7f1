"""Dispatch: from tokens to the rows of this rank's experts, and back. Shape suffixes as in ``accessory.model.moe``."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.model.adapter import TokenAdapters
from accessory.model.moe.router import Routing
from accessory.model.recompute import decided, made_again
from accessory.parallel.mesh import Axis
from accessory.parallel.planned import borders_on_host
from accessory.parallel.regions import copy_to_model_parallel_region, reduce_from_model_parallel_region


@dataclass(frozen=True)
class SortedRows:
    """The rows of this rank's experts, sorted by expert."""

    x_nD: Tensor  # the activation of each row's token
    weight_n1: Tensor  # its routing weight for this expert
    ends_e: Tensor  # [e] int32: where each expert's rows end
    adapters: TokenAdapters  # of each row's token
    plan: "DispatchPlan"


class Experts(Protocol):
    """Computes the rows of this rank's experts (``GroupedExperts``)."""

    def __call__(self, rows: SortedRows) -> Tensor:
        """The output of each row's expert, times the routing weight, [n, D]."""
        ...

    def takes_few(self, choices: int, adapters: TokenAdapters) -> bool:
        """Whether ``few`` can compute so many choices (tokens x experts per token)."""
        ...

    def few(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, local: range) -> Tensor:
        """For a few tokens: each token's weighted sum over its ``local`` experts, [T, D], without sorting rows first."""
        ...


class Dispatcher(Protocol):
    local_experts: range
    """The experts whose rows this rank computes."""

    def run(self, experts: Experts, x_TD: Tensor, routing: Routing, adapters: TokenAdapters) -> Tensor:
        """Bring every token to its experts, and sum their outputs for each token: [T, D]."""
        ...


class Replicated:
    """Every rank has every token and computes the rows of its experts; one all-reduce sums the ranks' outputs.

    Each rank's gradients of the activations and of the routing weights are partial, so both enter the region. The router
    itself runs on every rank in full, and stays outside.
    """

    def __init__(self, local_experts: range, num_experts: int, mp: Axis):
        self.local_experts, self.num_experts, self.mp = local_experts, num_experts, mp

    def run(self, experts: Experts, x_TD: Tensor, routing: Routing, adapters: TokenAdapters) -> Tensor:
        if experts.takes_few(routing.experts.numel(), adapters):
            y_TD = experts.few(x_TD, routing.experts, routing.weights, self.local_experts)
        else:
            rows = self._sorted(x_TD, routing, adapters)
            y_TD = tokens_of_rows(experts(rows), rows.plan)
        return reduce_from_model_parallel_region(y_TD, self.mp)

    def _sorted(self, x_TD: Tensor, routing: Routing, adapters: TokenAdapters) -> SortedRows:
        plan = decided(lambda: make_plan(routing.experts, self.local_experts, self.num_experts))
        x_nD = rows_of_tokens(copy_to_model_parallel_region(x_TD, self.mp), plan)
        weight_TK = copy_to_model_parallel_region(routing.weights.to(x_TD.dtype), self.mp)
        weight_n1 = weight_TK.flatten()[plan.choice_n].unsqueeze(1)
        return SortedRows(x_nD, weight_n1, plan.ends_e, adapters.of(plan.token_n), plan)


@dataclass(frozen=True)
class DispatchPlan:
    """Where every routed row goes among the rows of the local experts, which are sorted by expert."""

    token_n: Tensor  # [n] the token of each local row
    choice_n: Tensor  # [n] the same row's place among the N = T * K choices
    place_TK: Tensor  # [T, K] where each choice stands among the local rows; n if it is another rank's
    ends_e: Tensor  # [e] int32: where each local expert's rows end


def make_plan(experts_TK: Tensor, local: range, num_experts: int) -> DispatchPlan:
    """Sort the N choices by expert and keep those of the ``local`` experts."""
    top_k = experts_TK.shape[1]
    expert_N = experts_TK.flatten()
    order = expert_N.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    ends = (expert_N.unsqueeze(1) == torch.arange(num_experts, device=order.device)).sum(0).cumsum(0)
    if len(local) < num_experts:
        # the number of local rows depends on the routing, so its shape must come to the host
        borders = [0, *borders_on_host(ends, len(order))]
        start, stop = borders[local.start], borders[local.stop]
        order, place, ends = order[start:stop], place - start, ends[local.start : local.stop] - start
        place = torch.where((place >= 0) & (place < stop - start), place, stop - start)
    return DispatchPlan(order // top_k, order, place.view_as(experts_TK), ends.int())


class _RowsOfTokens(torch.autograd.Function):
    """``x_TD[token_n]``; the backward is ``tokens_of_rows``, a fixed order of additions on every device."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return x_TD.index_select(0, plan.token_n)

    @staticmethod
    def backward(ctx, grad_nD: Tensor) -> tuple[Tensor, None]:
        return _sum_choices(grad_nD, ctx.plan), None


class _TokensOfRows(torch.autograd.Function):
    """Each token's sum over its local rows; the backward is ``rows_of_tokens``."""

    @staticmethod
    def forward(ctx, y_nD: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return _sum_choices(y_nD, plan)

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD.index_select(0, ctx.plan.token_n), None


def _sum_choices(y_nD: Tensor, plan: DispatchPlan) -> Tensor:
    if len(y_nD) < plan.place_TK.numel():
        y_nD = F.pad(y_nD, (0, 0, 0, 1))  # a zero row for choices that are another rank's
    places = plan.place_TK.unbind(1)
    out_TD = y_nD.index_select(0, places[0])
    for place_T in places[1:]:
        out_TD += y_nD.index_select(0, place_T)
    return out_TD


def rows_of_tokens(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Copy each token's activation to its local rows: [T, D] -> [n, D]."""
    return made_again(_RowsOfTokens.apply(x_TD, plan), lambda x_TD: x_TD.index_select(0, plan.token_n), x_TD)


def tokens_of_rows(y_nD: Tensor, plan: DispatchPlan) -> Tensor:
    """Sum the (already weighted) outputs of a token's local rows: [n, D] -> [T, D]."""
    return _TokensOfRows.apply(y_nD, plan)
