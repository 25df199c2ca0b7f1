"""From samples to batches, in an order that is a function of (seed, epoch) alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from accessory.data.image_reader import ImageReader
from accessory.data.mix import Samples
from accessory.data.packing import Rows
from accessory.data.placement import PLACE
from accessory.data.store import Sample
from accessory.model.decoder import Decoder, Inputs
from accessory.model.documents import Documents
from accessory.model.head import Targets
from accessory.model.visual import Images


@dataclass(frozen=True)
class Batch:
    """One micro-batch: its samples, concatenated. The counts are host numbers, so that no step waits for the device."""

    tokens: Tensor  # [T]
    documents: Documents
    targets: Targets  # the n positions that must predict a trained token
    sample_keys: Tensor  # [documents] a number of each sample, unique over all epochs, that seeds its dropout
    labels: Tensor  # [documents] the label's number, -1 where there is none
    real_tokens: int
    target_tokens: int
    images: Images | None = None  # for a visual model

    def inputs(self, dropout: bool = False) -> Inputs:
        """The decoder's input."""
        return Inputs(self.tokens, self.documents, dropout_keys=self.sample_keys if dropout else None, images=self.images)

    def on(self, model: Decoder) -> "Batch":
        """The batch on the device of ``model``, with its images encoded."""
        batch = self.to(model.norm.weight.device)
        return replace(batch, images=model.vision(batch.images)) if model.vision and batch.images else batch

    def to(self, device: torch.device) -> "Batch":
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in ("tokens", "sample_keys", "labels")}
        return replace(
            self,
            **tensors,
            documents=self.documents.to(device),
            targets=self.targets.to(device),
            images=self.images and self.images.to(device),
        )


def collate(
    samples: Sequence[Sample], keys: Sequence[int] | None = None, padded_to: int = 0, pixels: Tensor | None = None
) -> Batch:
    """Concatenate samples to a batch. Without samples the batch is one token that counts nowhere.

    Args:
        keys: the samples' keys; None: 0, 1, 2, ...
        padded_to: pad each sample to this number of tokens, for comparisons; only the router counts the padding.
        pixels: of all images of a visual model's samples (see ``ImageReader``); None: the model reads text only.
    """
    tokens, trained = [], []
    for sample in samples:
        padding = max(0, padded_to - len(sample.tokens))
        tokens.append(np.pad(np.asarray(sample.tokens, np.int64), (0, padding)))
        trained.append(np.pad(np.asarray(sample.trained, bool), (0, padding)))
    documents = Documents.of([len(some) for some in tokens])
    ids = np.concatenate(tokens or [np.zeros(1, np.int64)])
    # a target is a trained token that is not the first of its document
    places = (np.concatenate(trained or [np.zeros(1, bool)]) & (documents.positions.numpy() > 0)).nonzero()[0]
    targets = Targets(torch.from_numpy(places - 1), torch.from_numpy(ids[places]))
    in_images = ids == PLACE
    ids[in_images] = 0  # any valid id; it is not used
    images = None if pixels is None else Images(torch.from_numpy(in_images.nonzero()[0]), pixels)
    numbers = torch.tensor(range(len(samples)) if keys is None else keys, dtype=torch.int64)
    labels = torch.tensor([-1 if sample.label is None else sample.label for sample in samples], dtype=torch.int64)
    count = len(ids) if samples else 0
    return Batch(torch.from_numpy(ids), documents, targets, numbers, labels, count, len(places), images)


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: ``batch_size`` rows x ``accumulation`` micro-steps x ``world`` data-parallel ranks.

    Attributes:
        pads: pad samples to the longest of their micro-batch (see ``collate``).
        images: reads the images of a visual model's samples.
    """

    batch_size: int
    accumulation: int
    rank: int
    world: int
    pads: bool = False
    images: ImageReader | None = None

    @property
    def global_batch(self) -> int:
        """Rows."""
        return self.batch_size * self.accumulation * self.world

    def steps(self, rows: int) -> int:
        """Optimiser steps in an epoch. The last may have fewer rows: every sample is used."""
        return -(-rows // self.global_batch)

    def epoch(self, samples: Sequence[Sample], rows: Rows, epoch: int = 0) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step of ``epoch``."""
        for start in range(0, len(rows), self.global_batch):
            yield self.step(samples, rows, start, epoch)

    def step(self, samples: Sequence[Sample], rows: Rows, start: int, epoch: int = 0) -> list[Batch]:
        """This rank's micro-batches of the step that begins at row ``start``.

        The samples of a step depend only on the rows and the size of the global batch. Within it rows are sorted by length,
        so that the ranks have about equal work in each micro-step; results do not depend on that.
        """
        lengths = sample_lengths(samples)
        chosen = [rows[i] for i in range(start, min(start + self.global_batch, len(rows)))]
        chosen.sort(key=lambda row: lengths[row].sum())
        micro_batches = []
        for micro_step in range(self.accumulation):
            first = (micro_step * self.world + self.rank) * self.batch_size
            mine = chosen[first : first + self.batch_size]
            numbers = [i for row in mine for i in row]
            longest = int(lengths[numbers].max(initial=0)) if self.pads else 0
            some, pixels = [samples[i] for i in numbers], None
            if self.images:
                some, pixels = self.images.read(some, [where(samples, i) for i in numbers])
            keys = [epoch * len(samples) + i for i in numbers]
            micro_batches.append(collate(some, keys, longest, pixels))
        return micro_batches


def where(samples: Sequence[Sample], number: int) -> str:
    """The name of a sample in messages: the file and line of its record."""
    return samples.where(number) if isinstance(samples, Samples) else f"sample {number}"


def sample_lengths(samples: Sequence[Sample]) -> np.ndarray:
    """[samples] token counts."""
    if isinstance(samples, Samples):  # known without reading them
        return samples.lengths
    return np.fromiter((len(sample.tokens) for sample in samples), np.int64, len(samples))
