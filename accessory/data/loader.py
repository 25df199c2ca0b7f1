"""Samples to batches, in an order that is a function of (seed, epoch) alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from accessory.data.mix import Sample
from accessory.model.decoder import Targets


@dataclass(frozen=True)
class Batch:
    """One micro-batch of right-padded sequences. The counts are host numbers: no step waits for the device."""

    tokens: Tensor  # [B, S]
    lengths: Tensor  # [B]
    targets: Targets  # the n positions that must predict a trained token
    keys: Tensor  # [B] a number of each sequence in the run, of which its dropout is made
    real_tokens: int
    target_tokens: int

    def inputs(self) -> tuple[Tensor, Tensor, Targets]:
        """The decoder's arguments."""
        return self.tokens, self.lengths, self.targets

    def to(self, device: torch.device) -> "Batch":
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        targets = Targets(move(self.targets.rows), move(self.targets.ids))
        keys = move(self.keys)
        return Batch(move(self.tokens), move(self.lengths), targets, keys, self.real_tokens, self.target_tokens)


def collate(samples: Sequence[Sample], batch_size: int, keys: Sequence[int] | None = None) -> Batch:
    """Pad samples to the longest; fill up to ``batch_size`` rows with empty sequences, which count for nothing."""
    numbers = torch.zeros(batch_size, dtype=torch.int64)
    numbers[: len(samples)] = torch.tensor(range(len(samples)) if keys is None else keys, dtype=torch.int64)
    width = max([len(s.tokens) for s in samples], default=1)
    tokens = torch.zeros(batch_size, width, dtype=torch.int64)
    lengths = torch.zeros(batch_size, dtype=torch.int64)
    rows, ids = [], []
    for index, sample in enumerate(samples):
        lengths[index] = len(sample.tokens)
        tokens[index, : len(sample.tokens)] = torch.as_tensor(sample.tokens)
        for position, trained in enumerate(sample.trained[1:]):
            if trained:
                rows.append(index * width + position)
                ids.append(int(sample.tokens[position + 1]))
    targets = Targets(torch.tensor(rows, dtype=torch.int64), torch.tensor(ids, dtype=torch.int64))
    return Batch(tokens, lengths, targets, numbers, sum(len(s.tokens) for s in samples), len(ids))


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: ``batch_size`` sequences x ``accumulation`` micro-steps x ``world`` data-parallel ranks."""

    batch_size: int
    accumulation: int
    rank: int
    world: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.world

    def steps(self, samples: int) -> int:
        """Optimiser steps of an epoch; the last may be smaller, every sample is used."""
        return -(-samples // self.global_batch)

    def epoch(self, samples: Sequence[Sample], order: Sequence[int] | np.ndarray, number: int = 0) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step of epoch ``number``.

        Which samples a step sees depends only on the order and the size of the global batch. Inside it they are laid
        out by length, so that sequences of one micro-step are alike and little is padded: results do not depend on it.
        """
        for start in range(0, len(order), self.global_batch):
            chosen = sorted(map(int, order[start : start + self.global_batch]), key=lambda i: len(samples[i].tokens))
            micro_steps = []
            for step in range(self.accumulation):
                first = (step * self.world + self.rank) * self.batch_size
                mine = chosen[first : first + self.batch_size]
                keys = [number * len(samples) + i for i in mine]
                micro_steps.append(collate([samples[i] for i in mine], self.batch_size, keys))
            yield micro_steps
