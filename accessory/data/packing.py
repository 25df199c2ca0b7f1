"""Which samples share a row: decided from their order and lengths alone, so it is the same for every parallel size."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

# Samples that are packed with one another. They are neighbours in the epoch's order, so a row holds others every epoch.
WINDOW = 1024


class Rows:
    """The rows of an epoch in their order, each the numbers of its samples; two integers a sample at most."""

    def __init__(self, samples: np.ndarray, counts: np.ndarray):
        """``samples``: of all rows, one row behind the other; ``counts``: how many each row has."""
        self.samples, self.ends = samples, counts.cumsum()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> list[int]:
        return self.samples[self.ends[row - 1] if row else 0 : self.ends[row]].tolist()

    @classmethod
    def alone(cls, order: Sequence[int] | np.ndarray) -> "Rows":
        """Each sample in a row of its own."""
        return cls(np.asarray(order, dtype=np.int64), np.ones(len(order), dtype=np.int64))

    @classmethod
    def packed(cls, order: Sequence[int] | np.ndarray, lengths: np.ndarray, width: int) -> "Rows":
        """Rows of at most ``width`` tokens; ``lengths`` of all samples, none longer."""
        samples, counts = [], []
        for window in np.array_split(np.asarray(order, dtype=np.int64), -(-len(order) // WINDOW)):
            rows = best_fit(lengths[window].tolist(), width)
            samples.append(window[np.concatenate(rows)])
            counts += [len(row) for row in rows]
        return cls(np.concatenate(samples), np.asarray(counts, dtype=np.int64))


def best_fit(lengths: list[int], width: int) -> list[list[int]]:
    """Rows of places in ``lengths``: longest first, each where it leaves the least room.

    Rows come in the order of their longest document, so that what is drawn at random stays in random order.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = lengths[place]
        found = bisect_left(rooms, (length,))
        if found < len(rooms):
            room, row = rooms.pop(found)
        else:
            room, row = width, len(rows)
            rows.append([])
        assert length <= room, f"a sample of {length} tokens does not fit a row of {width}"
        rows[row].append(place)
        if room > length:
            insort(rooms, (room - length, row))
    return sorted(rows)
