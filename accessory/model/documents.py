"""Where the documents of a micro-batch lie."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
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
        length = torch.tensor(lengths)
        number = torch.arange(1, count + 1) if count else torch.zeros(1, dtype=torch.int64)
        start = length.cumsum(0) - length - torch.tensor(past)
        positions = torch.arange(int(length.sum())) - start.repeat_interleave(length)
        borders = F.pad(length.cumsum(0), (1, 0)).int()
        return cls(number.repeat_interleave(length), positions, borders, lengths, past, count)

    @property
    def ends(self) -> Tensor:
        """[count] the place of each document's last token."""
        return self.borders[1 : self.count + 1] - 1

    def to(self, device: torch.device) -> "Documents":
        names = ("document_of", "positions", "borders")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})
