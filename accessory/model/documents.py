"""Where the documents of a batch lie."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of a batch [B, S]: in each row one behind the other, then padding. Unpacked: one in each row.

    Nothing crosses from one to another: attention, positions, router statistics and dropout are each document's own.

    Attributes:
        number: [B, S] which document a token is of, counted from 1 through the batch; 0 where padding.
        positions: [B, S] where a token stands in its document.
        borders: [n + 1] int32: where each document, and the padding of each row, begins and ends in [B * S].
        stretches: the n lengths between borders, on the host, so that no attention waits for the device.
        count: how many documents there are.
    """

    number: Tensor
    positions: Tensor
    borders: Tensor
    stretches: tuple[int, ...]
    count: int

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], width: int) -> "Documents":
        """``rows``: the lengths of each row's documents; ``width``: S."""
        lengths: list[int] = []
        numbers: list[int] = []
        count = 0
        for row in rows:
            lengths += [*row, width - sum(row)]
            numbers += [*range(count + 1, count + 1 + len(row)), 0]
            count += len(row)
        stretches = tuple(n for n in lengths if n) or (0,)
        length = torch.tensor(lengths)
        start = (length.cumsum(0) - length).repeat_interleave(length)
        return cls(
            torch.tensor(numbers).repeat_interleave(length).view(len(rows), width),
            (torch.arange(len(start)) - start).view(len(rows), width),
            F.pad(torch.tensor(stretches).cumsum(0), (1, 0)).int(),
            stretches,
            count,
        )

    @property
    def real(self) -> Tensor:
        """[B, S] bool: what is no padding."""
        return self.number > 0

    def to(self, device: torch.device) -> "Documents":
        number, positions, borders = (x.to(device, non_blocking=True) for x in (self.number, self.positions, self.borders))
        return replace(self, number=number, positions=positions, borders=borders)
