"""The router: which experts a token goes to, and how much each of them counts."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.dtypes import at_least_fp32
from accessory.model.documents import Documents
from accessory.parallel.adapter import Adaptable, dropped


class Routing(NamedTuple):
    """The decision for T tokens; ``probs`` and ``weights`` are at least fp32."""

    probs: Tensor  # [T, E] softmax over all experts
    weights: Tensor  # [T, K] the chosen experts' probabilities, renormalised to sum to 1
    experts: Tensor  # [T, K] their numbers


class RouterStats(NamedTuple):
    """What a batch did to the experts, as sums over the tokens of each of its n documents; padding never counts.

    Sums can be added over layers, micro-batches and ranks before anything is divided (see ``train.balance``).
    """

    counts: Tensor  # [n, E] int64: routed rows per expert; sums to K x tokens
    probs: Tensor  # [n, E] sum of router probabilities; carries gradient


class Router(Adaptable):
    """softmax(gate(x)) over all E experts, top K, renormalised (Jiang et al. 2024, Mixtral of Experts).

    Computed in at least fp32 whatever the model's dtype: a bf16 softmax changes the chosen experts of some tokens.
    Replicated on every model-parallel rank.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x: Tensor, draw: Tensor | None = None) -> Routing:
        """``x`` [T, D] -> Routing. ``draw`` [T] is the adapter's, for dropout."""
        x = at_least_fp32(x)
        logits = F.linear(x, at_least_fp32(self.weight))
        if self.adapter.rank:
            low = F.linear(dropped(x, self.adapter, draw), at_least_fp32(self.lora_a)) * self.adapter.scaling
            logits = logits + F.linear(low, at_least_fp32(self.lora_b))
        probs = logits.softmax(-1)
        weights, experts = probs.topk(self.top_k, dim=-1)
        return Routing(probs, weights / weights.sum(-1, keepdim=True), experts)


def router_stats(routing: Routing, documents: Documents) -> RouterStats:
    """Sum a routing over the tokens of each document."""
    chosen = torch.zeros_like(routing.probs, dtype=torch.int64).scatter_(1, routing.experts, 1)
    number, shape = documents.number.flatten(), (documents.count + 1, chosen.shape[1])
    counts, probs = (x.new_zeros(shape).index_add(0, number, x) for x in (chosen, routing.probs))
    return RouterStats(counts[1:], probs[1:])  # 0 is padding
