"""What a decoder makes of its last hidden states; a head runs inside the decoder's forward, where FSDP has its weights."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from accessory.dtypes import at_least_fp32
from accessory.model.adapter import TokenAdapters
from accessory.model.documents import Documents
from accessory.model.linear import ColumnParallelLinear
from accessory.model.norm import RMSNorm
from accessory.model.packed import plain
from accessory.parallel.cross_entropy import linear_cross_entropy, linear_log_probs, linear_predictions
from accessory.parallel.regions import copy_to_model_parallel_region, gather_from_model_parallel_region


class Head(Protocol):
    def __call__(self, x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters) -> Tensor:
        """``x`` [T, D] behind the last block -> the result; ``norm`` and ``output`` are the decoder's last two modules
        (of a classifier, V is the number of its labels, and no rank has only a part of them).
        """
        ...


class Targets(NamedTuple):
    """What stands where in a micro-batch: the hidden state of row ``rows[i]`` of [T] must predict ``ids[i]``."""

    rows: Tensor  # [n] int64
    ids: Tensor  # [n] int64

    def to(self, device: torch.device) -> "Targets":
        return Targets(*(x.to(device, non_blocking=True) for x in self))


class LossSum:
    """The sum of cross-entropy over targets, a scalar in at least fp32."""

    def __init__(self, targets: Targets):
        self.targets = targets

    def __call__(self, x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters) -> Tensor:
        return linear_cross_entropy(_factors(x, norm, output, adapters, self.targets), self.targets.ids, output.mp)


class LogProbs:
    """The log-probability of each target, [n] in at least fp32, for a loss that is more than their sum."""

    def __init__(self, targets: Targets):
        self.targets = targets

    def __call__(self, x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters) -> Tensor:
        return linear_log_probs(_factors(x, norm, output, adapters, self.targets), self.targets.ids, output.mp)


class Predictions:
    """Of each target its log-probability, and 1 where it is the likeliest token, else 0: [2, n] in at least fp32. Nothing
    can be learnt of it."""

    def __init__(self, targets: Targets):
        self.targets = targets

    def __call__(self, x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters) -> Tensor:
        return linear_predictions(_factors(x, norm, output, adapters, self.targets), self.targets.ids, output.mp)


class Logits:
    """Logits [n, V] of ``rows`` [n] of [T], all if None, in at least fp32."""

    def __init__(self, rows: Tensor | None = None):
        self.rows = rows

    def __call__(self, x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters) -> Tensor:
        x, adapters = _rows(x, adapters, self.rows)
        hidden = copy_to_model_parallel_region(norm(x), output.mp)
        return at_least_fp32(gather_from_model_parallel_region(output(hidden, adapters), output.mp))


class Means:
    """Of each document the mean of its tokens' last hidden states, normed: [n, D] in at least fp32."""

    def __init__(self, documents: Documents):
        self.documents = documents

    def __call__(self, x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters) -> Tensor:
        parts = at_least_fp32(norm(x)).split(self.documents.lengths)
        return torch.stack([part.mean(0) for part in parts])


class Nothing:
    """Only the router statistics are wanted: the output layer does not run."""

    def __call__(self, x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters) -> Tensor:
        return x.new_zeros(())


def _factors(
    x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters, targets: Targets
) -> list[tuple[Tensor, Tensor]]:
    """What the logits of the targets' rows are the products of: the output layer, and its adapter."""
    x, adapters = _rows(x, adapters, targets.rows)
    hidden = copy_to_model_parallel_region(norm(x), output.mp)
    low = output.low_rank(hidden, adapters)
    return [(hidden, plain(output.weight))] + ([] if low is None else [(low, output.lora_b)])


def _rows(x: Tensor, adapters: TokenAdapters, rows: Tensor | None) -> tuple[Tensor, TokenAdapters]:
    return (x, adapters) if rows is None else (x.index_select(0, rows), adapters.of(rows))
