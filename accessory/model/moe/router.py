"""The router: which experts a token goes to, and how much each of them counts."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.dtypes import at_least_fp32
from accessory.model.adapter import ONE_ADAPTER, Adaptable, TokenAdapters, dropped, scaled
from accessory.model.documents import Documents
from accessory.model.packed import packed, product
from accessory.model.recompute import decided


class Routing(NamedTuple):
    """The decision for T tokens; all but ``experts`` is at least fp32."""

    logits: Tensor  # [T, E]
    probs: Tensor  # [T, E] softmax over all experts
    weights: Tensor  # [T, K] the chosen experts' probabilities, renormalised to sum to 1
    experts: Tensor  # [T, K] their numbers


class RouterStats(NamedTuple):
    """What a batch did to the experts of L layers, as sums over the tokens of each of its n documents.

    Sums can be added over layers, micro-batches and ranks before anything is divided (see ``train.balance``).
    """

    sums: Tensor  # [L, n + 1, 2 E + 2], at least fp32; first comes the token of no document, never used
    of_images: Tensor  # [L, E + 1] of the tokens that are an image's the rows of each expert, and entropy; [L, 0]: it reads

    @property
    def counts(self) -> Tensor:
        """[L, n, E] int64: routed rows per expert; they sum to K x tokens."""
        return self.sums.detach()[..., 1:, : self._experts].long()

    @property
    def probs(self) -> Tensor:
        """[L, n, E] sum of router probabilities; carries gradient."""
        return self.sums[..., 1:, self._experts : -2]

    @property
    def z(self) -> Tensor:
        """[L, n] sum of (log sum_e exp logit_e)^2; carries gradient."""
        return self.sums[..., 1:, -2]

    @property
    def entropy(self) -> Tensor:
        """[L, n] sum of the entropies of the router probabilities, in nats."""
        return self.sums.detach()[..., 1:, -1]

    @property
    def _experts(self) -> int:
        return self.sums.shape[-1] // 2 - 1


class Router(Adaptable):
    """softmax(gate(x)) over all E experts, top K, renormalised (Jiang et al. 2024, Mixtral of Experts).

    Computed in at least fp32 whatever the model's dtype: a bf16 softmax changes the chosen experts of some tokens.
    Replicated on every model-parallel rank.

    Attributes:
        score_bias: [E] fp32, or None. Added to the probabilities where the experts are chosen, and only there (Wang et
            al. 2024, Auxiliary-Loss-Free Load Balancing). A buffer: FSDP would shard a parameter, and cast it to bf16.
    """

    needs_fp32 = True
    score_bias: Tensor | None

    def __init__(self, dim: int, num_experts: int, top_k: int, score_bias: bool = False):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("score_bias", torch.zeros(num_experts, dtype=torch.float32) if score_bias else None)

    def pack(self, dtype: torch.dtype) -> None:
        """For a model that no longer trains."""
        self.weight = packed(at_least_fp32(self.weight))

    def forward(self, x: Tensor, adapters: TokenAdapters = ONE_ADAPTER) -> Routing:
        """``x`` [T, D] -> Routing."""
        adapted = adapters.reach(self.adapter)
        if adapted:
            x = at_least_fp32(x)  # here, so that its two gradients are added before they are rounded
        logits = product(at_least_fp32(x), self.weight) if self.weight.is_mkldnn else _WideLinear.apply(x, self.weight)
        if adapted:
            low = F.linear(dropped(x, self.adapter, adapters.dropout_draw), at_least_fp32(self.lora_a))
            logits = logits + F.linear(scaled(low, self.adapter, adapters), at_least_fp32(self.lora_b))
        probs = logits.softmax(-1)
        scores = probs if self.score_bias is None else probs + self.score_bias
        experts = decided(lambda: scores.detach().topk(self.top_k, dim=-1).indices)
        weights = probs.gather(-1, experts)
        return Routing(logits, probs, weights / weights.sum(-1, keepdim=True), experts)

    @torch.no_grad()
    def shift_score_bias(self, counts: Tensor, rate: float) -> None:
        """Raise the bias of each expert that got fewer than the mean of ``counts`` [E] by ``rate``, lower the others'."""
        assert self.score_bias is not None, "moe.score_bias is not set"
        self.score_bias += rate * torch.sign(counts.sum() - len(counts) * counts)


class _WideLinear(torch.autograd.Function):
    """``x`` W^T in at least fp32, keeping x as it is given: of bf16 autograd would keep a copy twice as large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(at_least_fp32(x), at_least_fp32(weight))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = (dy @ at_least_fp32(weight)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dw = (dy.T @ at_least_fp32(x)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw


def router_stats(layers: Sequence[Routing], documents: Documents, image_rows: Tensor | None = None) -> RouterStats:
    """Sum the routings of L layers over the tokens of each document, and over those that are images'."""
    logits, probs, experts = (
        torch.stack([getattr(routing, name) for routing in layers]) for name in ("logits", "probs", "experts")
    )
    chosen = torch.zeros_like(probs).scatter_(2, experts, 1.0)
    z = logits.logsumexp(-1, keepdim=True).square()
    entropy = torch.special.entr(probs.detach()).sum(-1, keepdim=True)
    values = torch.cat([chosen, probs, z, entropy], 2)
    sums = values.new_zeros(len(layers), documents.count + 1, values.shape[2])
    of_images = sums.new_zeros(len(layers), 0)
    if image_rows is not None:
        told = torch.cat([chosen, entropy], 2)
        of_images = told.index_select(1, image_rows).sum(1)
    return RouterStats(sums.index_add(1, documents.document_of, values), of_images)
