"""The experts' maths: a grouped SwiGLU over rows sorted by expert, and the sort itself.

Legend of shape suffixes in the MoE path:

    T tokens     D model width    F FFN width (this rank's)    E experts    e this rank's experts
    K experts per token           N = T * K routed rows        n this rank's rows             R LoRA rank
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.moe.kernels import KERNELS, MATMULS, GroupedMatmul, pick_kernel, weighted_swiglu
from accessory.parallel.adapter import Adapter, adapter_cut_dims, adapter_name, add_parameters, dropped
from accessory.parallel.tensor import (
    copy_to_model_parallel_region,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)


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
    with its first two dimensions merged), so that FSDP can cut dim 0 evenly however few experts a rank holds. Adapters
    are stored likewise: ``w1_lora_a [e*R, D]``, ``w1_lora_b [e*F, R]``, ``w1_bias [e*F]``.

    Args:
        cut_dims: the dimension of each logical tensor that is cut over model-parallel ranks.
    """

    def __init__(self, num_local: int, dim: int, hidden_dim: int, kernel: str, cut_dims: dict[str, int]):
        super().__init__()
        self.num_local, self.kernel, self.cut_dims = num_local, kernel, cut_dims
        self.adapters: dict[str, Adapter] = {}
        self.whole: set[str] = set()  # adapter tensors that are whole on every rank
        self.w1 = nn.Parameter(torch.empty(num_local * hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_local * dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_local * hidden_dim, dim))

    def adapt(self, matrix: str, adapter: Adapter) -> None:
        self.adapters[matrix] = adapter
        out, inner = getattr(self, matrix).shape
        add_parameters(self, matrix, adapter, out, inner, groups=self.num_local)
        cuts = adapter_cut_dims(3, self.cut_dims[matrix])
        self.whole |= {adapter_name(matrix, part) for part, dim in cuts.items() if dim is None}

    def forward(self, x_nD: Tensor, weight_n1: Tensor, ends_e: Tensor, draw_n: Tensor | None = None) -> Tensor:
        """Rows sorted by expert [n, D] -> their experts' outputs, times the routing weight [n, D].

        ``draw_n`` is the adapters', for dropout.
        """
        w1, w2, w3 = (self._stack(name) for name in ("w1", "w2", "w3"))
        kernel = pick_kernel(self.kernel, x_nD, w1.shape[1])
        if not self.adapters:
            return KERNELS[kernel](x_nD, w1, w2, w3, weight_n1, ends_e)
        rows = _Rows(MATMULS[kernel], ends_e, draw_n, one_hot(ends_e, x_nD))
        h_nF = weighted_swiglu(self._project("w1", x_nD, rows), self._project("w3", x_nD, rows), weight_n1)
        return self._project("w2", h_nF, replace(rows, bias_ne=rows.bias_ne * weight_n1))

    def _project(self, matrix: str, x: Tensor, rows: "_Rows") -> Tensor:
        """``W x + scaling * B A x + bias`` of each row's expert."""
        y = rows.matmul(x, self._stack(matrix), rows.ends_e)
        adapter = self.adapters.get(matrix, Adapter())
        if adapter.rank:
            first_column = get_model_parallel_rank() * x.shape[1] if self.cut_dims[matrix] == 2 else 0
            x = dropped(x, adapter, rows.draw_n, first_column)
            low_nR = rows.matmul(x, self._stack(f"{matrix}_lora_a"), rows.ends_e) * adapter.scaling
            y += rows.matmul(low_nR, self._stack(f"{matrix}_lora_b"), rows.ends_e)
        if adapter.bias:
            bias = self._stack(f"{matrix}_bias")
            if f"{matrix}_bias" in self.whole:  # every rank adds it, and their outputs are summed
                bias = bias / get_model_parallel_world_size()
            y.addmm_(rows.bias_ne, bias)
        return y

    def _stack(self, name: str) -> Tensor:
        """A parameter with its experts apart again, [e, ...]; one that is whole on every rank enters the region."""
        parameter = getattr(self, name)
        if name in self.whole:
            parameter = copy_to_model_parallel_region(parameter)
        return parameter.unflatten(0, (self.num_local, -1))


@dataclass(frozen=True)
class _Rows:
    """What the products of experts with adapters need to know of the rows."""

    matmul: GroupedMatmul
    ends_e: Tensor
    draw_n: Tensor | None  # of the row's token
    bias_ne: Tensor  # how much of each expert's bias a row gets


def one_hot(ends_e: Tensor, like_nD: Tensor) -> Tensor:
    """Which expert each of the sorted rows belongs to, [n, e] of zeros and ones.

    A bias is added as a product with it, so that its gradient is one too: no scattered additions, the same every time.
    """
    row_n = torch.arange(len(like_nD), device=ends_e.device, dtype=ends_e.dtype)
    return F.one_hot(torch.searchsorted(ends_e, row_n, right=True), len(ends_e)).to(like_nD.dtype)
