"""The load-balancing loss: how unevenly the router spreads tokens over experts.

For one layer and T tokens:  E / (T * K) * sum_e count_e * mean_t p_te   (Fedus et al. 2021; 1.0 = balanced), then the
mean over layers. Counts carry no gradient and the mean is linear in p, so each micro-batch can add its share knowing
only the counts of the whole; real tokens only, padding never counts.
"""

from torch import Tensor

from accessory.model.moe.router import RouterStats


def global_balance(stats: RouterStats, counts: Tensor, tokens: Tensor, top_k: int) -> Tensor:
    """A micro-batch's share of the balance loss over the whole global batch; shares of all ranks and steps add up to it.

    Args:
        stats: [L, documents, E] sums of this micro-batch.
        counts: [L, E] routed rows per expert in the whole global batch.
        tokens: real tokens of the whole global batch.
    """
    layers, num_experts = counts.shape
    products = (counts.to(stats.probs.dtype) * stats.probs.sum(1)).sum()
    return products * num_experts / (layers * top_k * tokens.to(products.dtype).square().clamp(min=1))


def document_balance(stats: RouterStats, tokens: Tensor, top_k: int) -> Tensor:
    """A micro-batch's share of the balance loss taken over each document alone, averaged with the documents' lengths.

    Needs nothing of other ranks or micro-batches but the number of ``tokens`` of the whole global batch.
    """
    layers, _, num_experts = stats.counts.shape
    lengths = stats.counts.sum(-1).to(stats.probs.dtype) / top_k  # [L, documents]
    products = (stats.counts.to(stats.probs.dtype) * stats.probs).sum(-1) / lengths.clamp(min=1)
    return products.sum() * num_experts / (layers * top_k * tokens.to(products.dtype).clamp(min=1))
