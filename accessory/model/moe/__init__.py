"""The Mixture-of-Experts block: router (decision), dispatcher (who goes where), experts (maths), kernel (how).

Legend of shape suffixes in the MoE path:

    T tokens     D model width    F FFN width (this rank's)    E experts    e this rank's experts
    K experts per token           N = T * K routed rows        n this rank's rows             R LoRA rank
"""

from torch import Tensor, nn

from accessory.model.adapter import ONE_ADAPTER, TokenAdapters
from accessory.model.args import ModelArgs
from accessory.model.moe.experts import GroupedExperts
from accessory.model.moe.layouts import Layout
from accessory.model.moe.router import Router, Routing
from accessory.parallel.mesh import Axis


class MoE(nn.Module):
    """Sparse feed-forward layer: each token is the weighted sum of its top-K experts."""

    def __init__(self, args: ModelArgs, layout: Layout, mp: Axis, kernel: str):
        super().__init__()
        moe = args.moe
        self.gate = Router(args.dim, moe.num_experts, moe.num_experts_per_tok, moe.score_bias)
        self.dispatcher = layout.dispatcher(moe.num_experts, mp)
        hidden_dim, experts = layout.local_hidden_dim(args.hidden_dim, mp), len(self.dispatcher.local_experts)
        self.experts = GroupedExperts(experts, args.dim, hidden_dim, kernel, layout.cut_dims, mp)

    def forward(self, x_TD: Tensor, adapters: TokenAdapters = ONE_ADAPTER) -> tuple[Tensor, Routing]:
        """``x_TD`` -> output [T, D], and which experts made it."""
        routing = self.gate(x_TD, adapters)
        return self.dispatcher.run(self.experts, x_TD, routing, adapters), routing
