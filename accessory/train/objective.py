"""Objectives: the loss of a micro-batch, and the number of targets over which the global batch's loss is a mean."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.data.loader import Batch
from accessory.model.decoder import Decoder
from accessory.model.head import Logits, LossSum, Predictions
from accessory.model.moe.router import RouterStats


class BatchLoss(NamedTuple):
    """An objective's result for a micro-batch: sums, to be added over micro-batches and ranks before anything is divided."""

    loss_sum: Tensor  # over the targets, at least fp32; carries gradient
    measures: Tensor  # [...] sums for further metrics; no gradient
    router: RouterStats


class Objective(Protocol):
    def targets(self, batch: Batch) -> int:
        """The number of targets in ``batch``; the training loss is the mean over the targets of the global batch."""
        ...

    def loss(self, model: Decoder, batch: Batch, dropout: bool = False) -> BatchLoss:
        """Run ``model`` over ``batch``; ``dropout``: with the dropout of its adapters."""
        ...

    def metrics(self, loss: float, measures: Tensor) -> dict[str, float]:
        """Metrics for the log, from a mean loss and the sum of the ``measures`` of the same micro-batches."""
        ...


def perplexity(loss: float) -> float:
    """exp of a mean cross-entropy in nats; infinite where a float cannot hold it."""
    return math.inf if loss > 700 else math.exp(loss)


def shown(metrics: dict[str, float]) -> str:
    """For a line of the console."""
    return "".join(f"  {name.replace('_', ' ')} {value:.3f}" for name, value in metrics.items())


class NextToken:
    """Cross-entropy of every trained token, given the tokens before it in its document."""

    def targets(self, batch: Batch) -> int:
        return batch.target_tokens

    def loss(self, model: Decoder, batch: Batch, dropout: bool = False) -> BatchLoss:
        loss_sum, router = model(batch.inputs(dropout), LossSum(batch.targets))
        return BatchLoss(loss_sum, loss_sum.new_zeros(0), router)

    def metrics(self, loss: float, measures: Tensor) -> dict[str, float]:
        return {"perplexity": perplexity(loss)}


class TokenAccuracy(NextToken):
    """The same without gradient; it also measures how often the target is the likeliest token."""

    def loss(self, model: Decoder, batch: Batch, dropout: bool = False) -> BatchLoss:
        (log_probs, likeliest), router = model(batch.inputs(dropout), Predictions(batch.targets))
        measures = torch.stack([likeliest.sum(), likeliest.new_tensor(batch.target_tokens)])
        return BatchLoss(-log_probs.sum(), measures, router)

    def metrics(self, loss: float, measures: Tensor) -> dict[str, float]:
        right, there = measures.tolist()
        return super().metrics(loss, measures) | {"token_accuracy": right / max(1.0, there)}


class Classification:
    """Cross-entropy of each document's label, given all of its tokens; also measures the confusion matrix."""

    def targets(self, batch: Batch) -> int:
        return batch.documents.count

    def loss(self, model: Decoder, batch: Batch, dropout: bool = False) -> BatchLoss:
        logits, router = model(batch.inputs(dropout), Logits(batch.documents.ends))
        loss_sum = F.cross_entropy(logits, batch.labels, reduction="sum")
        pairs = batch.labels, logits.argmax(1)
        confusion = logits.new_zeros(logits.shape[1], logits.shape[1], dtype=torch.float64)
        confusion.index_put_(pairs, confusion.new_ones(()), accumulate=True)
        return BatchLoss(loss_sum, confusion, router)

    def metrics(self, loss: float, measures: Tensor) -> dict[str, float]:
        """``measures`` [labels, labels]: the confusion matrix, rows are the true labels."""
        right, there, said = measures.diag(), measures.sum(1), measures.sum(0)
        met = there + said > 0
        f1 = 2 * right[met] / (there + said)[met]
        return {"accuracy": float(right.sum() / there.sum().clamp(min=1)), "macro_f1": float(f1.mean()) if len(f1) else 0.0}


@dataclass(frozen=True)
class MeanOfMeans:
    """Another objective, averaged as LLaMA2-Accessory does: over each micro-batch, then over all micro-batches and ranks.

    Each micro-batch counts the same, however many targets it has, so the loss depends on how the batch is cut.
    """

    objective: Objective

    def targets(self, batch: Batch) -> int:
        return 1

    def loss(self, model: Decoder, batch: Batch, dropout: bool = False) -> BatchLoss:
        found = self.objective.loss(model, batch, dropout)
        return found._replace(loss_sum=found.loss_sum / max(1, self.objective.targets(batch)))

    def metrics(self, loss: float, measures: Tensor) -> dict[str, float]:
        return self.objective.metrics(loss, measures)
