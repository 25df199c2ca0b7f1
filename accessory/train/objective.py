"""What a model is trained towards: the loss of a micro-batch, and what of the global batch it is a mean over."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from accessory.data.loader import Batch
from accessory.model.decoder import Decoder
from accessory.model.head import LossSum
from accessory.model.moe.router import RouterStats


class BatchLoss(NamedTuple):
    """What an objective makes of a micro-batch; sums, to be added over micro-batches and ranks before any is divided."""

    loss_sum: Tensor  # over its targets, at least fp32; carries gradient
    measures: Tensor  # [...] what else is told of it; carries none
    router: RouterStats


class Objective(Protocol):
    def targets(self, batch: Batch) -> int:
        """How many of ``batch`` the loss is summed over; the training loss is the mean over those of the global batch."""
        ...

    def loss(self, model: Decoder, batch: Batch, dropout: bool = False) -> BatchLoss:
        """Run ``model`` over ``batch``; ``dropout``: of its adapters."""
        ...

    def metrics(self, loss: float, measures: Tensor) -> dict[str, float]:
        """What is logged of a mean loss, and of the ``measures`` of all that it is a mean of, added up."""
        ...


def shown(metrics: dict[str, float]) -> str:
    """For a line of the console."""
    return "".join(f"  {name.replace('_', ' ')} {value:.3f}" for name, value in metrics.items())


class NextToken:
    """Cross-entropy of every trained token, given those before it in its document."""

    def targets(self, batch: Batch) -> int:
        return batch.target_tokens

    def loss(self, model: Decoder, batch: Batch, dropout: bool = False) -> BatchLoss:
        loss_sum, router = model(batch.inputs(dropout), LossSum(batch.targets))
        return BatchLoss(loss_sum, loss_sum.new_zeros(0), router)

    def metrics(self, loss: float, measures: Tensor) -> dict[str, float]:
        return {"perplexity": math.exp(min(700.0, loss))}


@dataclass(frozen=True)
class MeanOfMeans:
    """Another objective, averaged as LLaMA2-Accessory does: over each micro-batch, then over those of all ranks.

    Each micro-batch counts the same, however many targets it has, so that the loss depends on how the batch is cut.
    """

    objective: Objective

    def targets(self, batch: Batch) -> int:
        return 1

    def loss(self, model: Decoder, batch: Batch, dropout: bool = False) -> BatchLoss:
        found = self.objective.loss(model, batch, dropout)
        return found._replace(loss_sum=found.loss_sum / max(1, self.objective.targets(batch)))

    def metrics(self, loss: float, measures: Tensor) -> dict[str, float]:
        return self.objective.metrics(loss, measures)
