"""The Mixture-of-Experts block: router (decision), plan (who goes where), experts (maths), kernel (how)."""

from torch import Tensor, nn

from accessory.model.args import ModelArgs
from accessory.model.documents import Documents
from accessory.model.moe.experts import GroupedExperts, combine, dispatch, make_plan
from accessory.model.moe.layouts import Layout
from accessory.model.moe.router import Router, RouterStats, router_stats
from accessory.parallel.tensor import (
    copy_to_model_parallel_region,
    get_model_parallel_rank,
    get_model_parallel_world_size,
    reduce_from_model_parallel_region,
)


class MoE(nn.Module):
    """Sparse feed-forward layer: each token is the weighted sum of its top-K experts."""

    def __init__(self, args: ModelArgs, layout: Layout, kernel: str):
        super().__init__()
        size, moe = get_model_parallel_world_size(), args.moe
        self.num_experts = moe.num_experts
        self.local = layout.local_experts(moe.num_experts, get_model_parallel_rank(), size)
        self.gate = Router(args.dim, moe.num_experts, moe.num_experts_per_tok, moe.score_bias)
        hidden_dim = args.hidden_dim * moe.num_experts // (size * len(self.local))
        self.experts = GroupedExperts(len(self.local), args.dim, hidden_dim, kernel, layout.cut_dims)

    def forward(self, x_TD: Tensor, documents: Documents, draw_T: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        """``x_TD`` -> output [T, D], and statistics of each document. ``draw_T`` is the adapters', for dropout."""
        routing = self.gate(x_TD, draw_T)
        plan = make_plan(routing.experts, self.local, self.num_experts)
        # Each rank's gradient of the activations and of the routing weights is partial: both enter the region. The
        # router's own use of x is whole on every rank, and stays outside.
        x_nD = dispatch(copy_to_model_parallel_region(x_TD), plan)
        weight_TK = copy_to_model_parallel_region(routing.weights.to(x_TD.dtype))
        weight_n1 = weight_TK.flatten()[plan.choice_n].unsqueeze(1)
        draw_n = None if draw_T is None else draw_T[plan.token_n]
        y_TD = combine(self.experts(x_nD, weight_n1, plan.ends_e, draw_n), plan)
        return reduce_from_model_parallel_region(y_TD), router_stats(routing, documents)
