"""Where the documents of a micro-batch lie."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of a micro-batch: its T tokens are one row, one document behind the other, without padding.

    Nothing crosses from one to another: attention, positions, router statistics and dropout are each document's own. Some
    of a document's tokens may have come before, and be in a cache: then these continue it.

    Attributes:
        document_of: [T] which document a token is of, counted from 1; 0: the one token that stands for no document.
        positions: [T] where a token stands in its document.
        borders: [n + 1] int32: where each document begins and ends.
        lengths: tokens of each, on the host, so that no attention waits for the device.
        past: how many tokens of each came before, on the host.
        count: how many documents there are: n, or 0 if the one of ``lengths`` is none.
    """

    document_of: Tensor
    positions: Tensor
    borders: Tensor
    lengths: tuple[int, ...]
    past: tuple[int, ...]
    count: int

    @classmethod
    def of(cls, lengths: Sequence[int], past: Sequence[int] | None = None) -> "Documents":
        """Documents of ``lengths`` (at least 1), each behind ``past`` tokens (none).

        A rank without documents runs one token that counts nowhere, so that it takes part in every collective.
        """
        count = len(lengths)
        lengths = tuple(lengths) or (1,)
        past = tuple(past or [0] * len(lengths))
        # numpy: a step of few tokens takes as long as its operators take to start
        borders = np.array([0, *accumulate(lengths)])
        number = np.arange(1, count + 1) if count else np.zeros(1, dtype=np.int64)
        positions = np.arange(borders[-1]) - np.repeat(borders[:-1] - past, lengths)
        of = torch.from_numpy
        return cls(of(np.repeat(number, lengths)), of(positions), of(borders.astype(np.int32)), lengths, past, count)

    @property
    def ends(self) -> Tensor:
        """[count] the place of each document's last token."""
        return self.borders[1 : self.count + 1] - 1

    def to(self, device: torch.device) -> "Documents":
        names = ("document_of", "positions", "borders")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})
