"""The losses of the router: how unevenly it spreads tokens over experts, and how large its logits are.

For one layer, T tokens and K choices of each:  E / (T * K) * sum_e count_e * mean_t p_te   (Fedus et al. 2021, Switch
Transformer; 1.0 = balanced), then the mean over layers. Counts carry no gradient and the mean is linear in p, so each
micro-batch can add its share knowing only the counts of the whole. ``train.balance`` says which tokens are the T:

    document    each document, averaged by length           depends on nothing
    global      the global batch                            depends on nothing; with accumulation, one more forward
    microbatch  a micro-batch of one rank, plain average    depends on accumulation and ranks (LLaMA2-Accessory)
    hf          the same, and all layers as one, times K    the same (Hugging Face); opposite imbalances of layers cancel
    bias        no loss: a bias in the choice of experts, moved by the global batch's counts; depends on nothing

"Nothing" is ranks, micro-batches, packing and layout. In all of them recompute counts once, and the weight is not scaled
by ranks, accumulation or layers.

The z-loss is the mean over real tokens, then over layers, of (log sum_e exp logit_e)^2 (Zoph et al. 2022, ST-MoE); it
depends on nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.data.loader import Batch
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.head import Nothing
from accessory.model.moe.router import Router, RouterStats
from accessory.settings import BalanceMode


@dataclass(frozen=True)
class RouterLosses:
    """The losses that a run adds for its routers, from its ``train`` section.

    Attributes:
        balance: the mode (see above). z_weight: of the z-loss.
        bias_rate: how far an expert's score bias moves in a step, in the mode "bias".
    """

    balance: BalanceMode = "document"
    z_weight: float = 0.0
    bias_rate: float = 0.001

    def balance_weight(self, args: ModelArgs) -> float:
        """The weight of the balance loss."""
        return 0.0 if self.balance == "bias" else args.load_balancing_weight

    def step_balance(
        self, model: Decoder, micro_batches: Sequence[Batch], tokens: Tensor
    ) -> Callable[[RouterStats], Tensor]:
        """A function that returns a micro-batch's share of the step's balance loss, given its router statistics. The shares
        of all micro-batches and ranks add up to the loss.

        Every rank must call this, and then the function, as often as the others. With "bias", and with "global" if the loss
        has no weight, the value is only reported; it is then that of "document", which needs no further forward.

        Args:
            tokens: real tokens of the whole global batch.
        """
        top_k = model.args.moe.num_experts_per_tok
        dp = model.mesh.dp
        parts = len(micro_batches) * dp.size
        if self.balance == "global" and self.balance_weight(model.args):
            if len(micro_batches) == 1:
                return lambda stats: global_balance(stats, dp.all_reduce(stats.counts.sum(1)), top_k)
            counts = count_loads(model, micro_batches)
            return lambda stats: global_balance(stats, counts, top_k)
        if self.balance == "microbatch":
            return lambda stats: microbatch_balance(stats, top_k) / parts
        if self.balance == "hf":
            return lambda stats: pooled_balance(stats, top_k) / parts
        return lambda stats: document_balance(stats, tokens, top_k)

    def shift_biases(self, model: Decoder, counts: Tensor) -> None:
        """With "bias", move the score biases, given the rows [L, E] that a step routed to each expert on this rank."""
        if self.balance == "bias":
            shift_score_biases(model, model.mesh.dp.all_reduce(counts.clone()), self.bias_rate)


def unevenness(counts: Tensor, probs: Tensor, top_k: int) -> Tensor:
    """E / (T * K) * sum_e count_e * p_e / T over the last dimension; 0 where there are no tokens.

    Args:
        counts: [..., E] routed rows of T tokens.
        probs: [..., E] sums of router probabilities over those tokens, or a part of them.
    """
    tokens = counts.sum(-1).to(probs.dtype) / top_k
    products = (counts.to(probs.dtype) * probs).sum(-1)
    return products * counts.shape[-1] / (top_k * tokens.square().clamp(min=1))


def global_balance(stats: RouterStats, counts: Tensor, top_k: int) -> Tensor:
    """A micro-batch's share of the balance loss over the global batch, whose ``counts`` are [L, E]."""
    return unevenness(counts, stats.probs.sum(1), top_k).mean()


def document_balance(stats: RouterStats, tokens: Tensor, top_k: int) -> Tensor:
    """A micro-batch's share of the balance loss over each document alone, averaged with the documents' lengths."""
    lengths = stats.counts.sum(-1).to(stats.probs.dtype) / top_k  # [L, documents]
    return (unevenness(stats.counts, stats.probs, top_k) * lengths).sum(1).mean() / tokens.clamp(min=1)


def microbatch_balance(stats: RouterStats, top_k: int) -> Tensor:
    """The balance loss over a micro-batch alone."""
    return unevenness(stats.counts.sum(1), stats.probs.sum(1), top_k).mean()


def pooled_balance(stats: RouterStats, top_k: int) -> Tensor:
    """transformers' ``load_balancing_loss_func`` over a micro-batch: one histogram of all layers; K = balanced."""
    return top_k * unevenness(stats.counts.sum((0, 1)), stats.probs.sum((0, 1)), top_k)


def z_loss(stats: RouterStats, tokens: Tensor) -> Tensor:
    """A micro-batch's share of the z-loss, given the real ``tokens`` of the whole global batch; shares add up to it."""
    return stats.z.sum() / (len(stats.z) * tokens.clamp(min=1))


@torch.no_grad()
def count_loads(model: Decoder, micro_batches: Sequence[Batch]) -> Tensor:
    """Rows routed to each expert [L, E] in the whole global batch: a forward of every micro-batch without the output."""
    counts = [model(batch.inputs(dropout=True), Nothing())[1].counts.sum(1) for batch in micro_batches]
    return model.mesh.dp.all_reduce(torch.stack(counts).sum(0))


def shift_score_biases(model: Decoder, counts: Tensor, rate: float) -> None:
    """Move every layer's score bias, given the rows [L, E] routed to each expert in the whole global batch."""
    for block, of_layer in zip(model.layers, counts, strict=True):
        router = block.get_submodule("feed_forward.gate")
        assert isinstance(router, Router)
        router.shift_score_bias(of_layer, rate)


def balance_note(mode: BalanceMode, accumulation: int, weight: float) -> str | None:
    """What a user should know of the chosen balance loss before the run, if anything."""
    if mode == "bias":
        return "balance: a bias in each router's choice of experts, no loss (load_balancing_weight is not used)"
    if not weight:
        return None
    notes = {
        "microbatch": "over each rank's micro-batch alone: it depends on ranks, batch_size and accumulation",
        "hf": "as Hugging Face's, over each rank's micro-batch, all layers as one: it depends on ranks, batch_size and "
        "accumulation, and the number of experts per token, not 1, is balanced",
    }
    if accumulation > 1:
        notes["global"] = "over the global batch: accumulation costs one more forward (document: none)"
    return f"balance loss {notes[mode]}" if mode in notes else None
