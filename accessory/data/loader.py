"""Samples to batches, in an order that is a function of (seed, epoch) alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from accessory.data.mix import Samples
from accessory.data.packing import Rows
from accessory.data.store import Sample
from accessory.model.decoder import Targets
from accessory.model.documents import Documents


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows of documents, padded on the right. The counts are host numbers: no step waits for the device."""

    tokens: Tensor  # [B, S]
    documents: Documents
    targets: Targets  # the n positions that must predict a trained token
    keys: Tensor  # [documents] a number of each in the run, of which its dropout is made
    real_tokens: int
    target_tokens: int

    def inputs(self) -> tuple[Tensor, Documents, Targets]:
        """The decoder's arguments."""
        return self.tokens, self.documents, self.targets

    def to(self, device: torch.device) -> "Batch":
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        targets = Targets(move(self.targets.rows), move(self.targets.ids))
        documents, keys = self.documents.to(device), move(self.keys)
        return Batch(move(self.tokens), documents, targets, keys, self.real_tokens, self.target_tokens)


def collate(rows: Sequence[Sequence[Sample]], batch_size: int, keys: Sequence[int] | None = None) -> Batch:
    """Put each row's samples one behind the other and pad to the longest row; empty rows fill up to ``batch_size``.

    Args:
        keys: one for each sample, in the order of the rows.
    """
    samples = [sample for row in rows for sample in row]
    lengths = [[len(sample.tokens) for sample in row] for row in rows]
    width = max([sum(row) for row in lengths], default=1)
    documents = Documents.of([*lengths, *[[]] * (batch_size - len(rows))], width)
    # The samples' tokens, one sample behind the other, stand at the places that are no padding, in order. A target is
    # a trained token behind another of its document.
    places = documents.real.flatten().numpy().nonzero()[0]
    ids = np.concatenate([np.zeros(0, np.int64), *(np.asarray(sample.tokens, np.int64) for sample in samples)])
    trained = np.concatenate([np.zeros(0, bool), *(np.asarray(sample.trained, bool) for sample in samples)])
    trained &= documents.positions.flatten().numpy()[places] > 0
    tokens = np.zeros(batch_size * width, np.int64)
    tokens[places] = ids
    targets = Targets(torch.from_numpy(places[trained] - 1), torch.from_numpy(ids[trained]))
    numbers = torch.tensor(range(len(samples)) if keys is None else keys, dtype=torch.int64)
    grid = torch.from_numpy(tokens).view(batch_size, width)
    return Batch(grid, documents, targets, numbers, len(ids), len(targets.ids))


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: ``batch_size`` rows x ``accumulation`` micro-steps x ``world`` data-parallel ranks."""

    batch_size: int
    accumulation: int
    rank: int
    world: int

    @property
    def global_batch(self) -> int:
        """Rows."""
        return self.batch_size * self.accumulation * self.world

    def steps(self, rows: int) -> int:
        """Optimiser steps of an epoch; the last may be smaller, every sample is used."""
        return -(-rows // self.global_batch)

    def epoch(self, samples: Sequence[Sample], rows: Rows, number: int = 0) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step of epoch ``number``."""
        for start in range(0, len(rows), self.global_batch):
            yield self.step(samples, rows, start, number)

    def step(self, samples: Sequence[Sample], rows: Rows, start: int, epoch: int = 0) -> list[Batch]:
        """This rank's micro-batches of the step that begins at row ``start``.

        Which samples a step sees depends only on the rows and the size of the global batch. Inside it they are laid
        out by length, so that the rows of one micro-step are alike and little is padded: results do not depend on it.
        """
        lengths = sample_lengths(samples)
        chosen = [rows[i] for i in range(start, min(start + self.global_batch, len(rows)))]
        chosen.sort(key=lambda row: lengths[row].sum())
        micro_batches = []
        for number in range(self.accumulation):
            first = (number * self.world + self.rank) * self.batch_size
            mine = chosen[first : first + self.batch_size]
            keys = [epoch * len(samples) + i for row in mine for i in row]
            micro_batches.append(collate([[samples[i] for i in row] for row in mine], self.batch_size, keys))
        return micro_batches


def sample_lengths(samples: Sequence[Sample]) -> np.ndarray:
    """The number of tokens of every sample."""
    if isinstance(samples, Samples):  # known without reading them
        return samples.lengths
    return np.fromiter((len(sample.tokens) for sample in samples), np.int64, len(samples))
