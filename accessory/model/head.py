"""Heads: what a decoder computes from its last hidden states. A head runs inside the decoder's forward, where FSDP has
gathered the weights that it needs."""

from collections.abc import Callable
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
from accessory.parallel.mesh import Axis
from accessory.parallel.regions import copy_to_model_parallel_region, gather_from_model_parallel_region


class Head(Protocol):
    def __call__(self, x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters) -> Tensor:
        """The result for the hidden states ``x`` [T, D] behind the last block.

        ``norm`` and ``output`` are the decoder's last two modules. A classifier's ``output`` has a row for each label, and
        is whole on every rank.
        """
        ...


class Targets(NamedTuple):
    """The targets of a micro-batch: the hidden state in row ``rows[i]`` of [T] must predict token ``ids[i]``."""

    rows: Tensor  # [n] int64
    ids: Tensor  # [n] int64

    def to(self, device: torch.device) -> "Targets":
        return Targets(*(x.to(device, non_blocking=True) for x in self))


class TargetHead:
    """A function of the logits in the rows that have a target; the full logits are never made."""

    compute: Callable[[list[tuple[Tensor, Tensor]], Tensor, Axis], Tensor]

    def __init__(self, targets: Targets):
        self.targets = targets

    def __call__(self, x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters) -> Tensor:
        x, adapters = _rows(x, adapters, self.targets.rows)
        hidden = copy_to_model_parallel_region(norm(x), output.mp)
        low = output.low_rank(hidden, adapters)
        factors = [(hidden, plain(output.weight))] + ([] if low is None else [(low, output.lora_b)])
        return type(self).compute(factors, self.targets.ids, output.mp)


class LossSum(TargetHead):
    """The sum of the targets' cross-entropies, a scalar in at least fp32."""

    compute = staticmethod(linear_cross_entropy)


class LogProbs(TargetHead):
    """The log-probability of each target, [n] in at least fp32, for losses that are not just their sum (DPO)."""

    compute = staticmethod(linear_log_probs)


class Predictions(TargetHead):
    """The log-probability of each target, and 1 where it is the likeliest token, else 0: [2, n] in at least fp32, without
    gradient."""

    compute = staticmethod(linear_predictions)


class Logits:
    """Logits [n, V] of the rows ``rows`` [n] (None: of all), in at least fp32."""

    def __init__(self, rows: Tensor | None = None):
        self.rows = rows

    def __call__(self, x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters) -> Tensor:
        x, adapters = _rows(x, adapters, self.rows)
        hidden = copy_to_model_parallel_region(norm(x), output.mp)
        return at_least_fp32(gather_from_model_parallel_region(output(hidden, adapters), output.mp))


class Means:
    """The mean over each document's tokens of the last hidden states, normed: [n, D] in at least fp32."""

    def __init__(self, documents: Documents):
        self.documents = documents

    def __call__(self, x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters) -> Tensor:
        parts = at_least_fp32(norm(x)).split(self.documents.lengths)
        return torch.stack([part.mean(0) for part in parts])


class Nothing:
    """For runs that need only the router statistics: the output layer does not run."""

    def __call__(self, x: Tensor, norm: RMSNorm, output: ColumnParallelLinear, adapters: TokenAdapters) -> Tensor:
        return x.new_zeros(())


def _rows(x: Tensor, adapters: TokenAdapters, rows: Tensor | None) -> tuple[Tensor, TokenAdapters]:
    return (x, adapters) if rows is None else (x.index_select(0, rows), adapters.of(rows))
