"""Where each document of a micro-batch lies in its row of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of a micro-batch: T tokens in one row, document after document, without padding.

    Documents do not affect one another: attention, positions, router statistics and dropout are per document. A document
    may continue earlier tokens, whose keys and values are then in a cache.

    Attributes:
        document_of: [T] the number of each token's document, from 1; 0 for the placeholder of an empty micro-batch.
        positions: [T] each token's position in its document.
        borders: [n + 1] int32 the cumulative lengths: document i is rows borders[i] to borders[i + 1].
        lengths: tokens of each document, on the host, so that attention need not wait for the device.
        past: tokens of each document that are in the cache, on the host.
        count: the number of documents, n; 0 if the one of ``lengths`` is the placeholder.
    """

    document_of: Tensor
    positions: Tensor
    borders: Tensor
    lengths: tuple[int, ...]
    past: tuple[int, ...]
    count: int

    @classmethod
    def of(cls, lengths: Sequence[int], past: Sequence[int] | None = None) -> "Documents":
        """Documents of ``lengths`` tokens (each at least 1), with ``past`` earlier ones (default: 0 each).

        A rank without documents gets a placeholder of one token, which counts nowhere, so that it takes part in every
        collective.
        """
        count = len(lengths)
        lengths = tuple(lengths) or (1,)
        past = tuple(past or [0] * len(lengths))
        # numpy: in a step of few tokens, launching torch's operators is what takes the time
        borders = np.array([0, *accumulate(lengths)])
        number = np.arange(1, count + 1) if count else np.zeros(1, dtype=np.int64)
        positions = np.arange(borders[-1]) - np.repeat(borders[:-1] - past, lengths)
        of = torch.from_numpy
        return cls(of(np.repeat(number, lengths)), of(positions), of(borders.astype(np.int32)), lengths, past, count)

    @property
    def ends(self) -> Tensor:
        """[count] the row of each document's last token."""
        return self.borders[1 : self.count + 1] - 1

    def to(self, device: torch.device) -> "Documents":
        names = ("document_of", "positions", "borders")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})
