"""Packing: which samples share a row. This depends only on their order and lengths, so it is the same for any parallel
size."""

from bisect import bisect_left, bisect_right, insort
from itertools import accumulate

import numpy as np

from accessory.data.order import Order

# Samples that are packed with one another. They are neighbours in the epoch's order, so a row holds others every epoch.
WINDOW = 1024


class Rows:
    """The rows of an epoch in order, each a list of the numbers of its samples.

    The rows of a window are made when one of them is read; only the number of rows before each window is kept.
    """

    def __init__(self, order: Order, lengths: np.ndarray | None, width: int):
        self._order, self._lengths, self._width = order, lengths, width
        windows = -(-len(order) // WINDOW)
        self._borders = [len(order) * window // max(1, windows) for window in range(windows + 1)]
        counts = np.diff(self._borders).tolist() if lengths is None else [len(self._make(w)) for w in range(windows)]
        self._starts = list(accumulate(counts, initial=0))
        self._window, self._made = -1, list[list[int]]()

    @classmethod
    def alone(cls, order: Order) -> "Rows":
        """Each sample in a row of its own."""
        return cls(order, None, 0)

    @classmethod
    def packed(cls, order: Order, lengths: np.ndarray, width: int) -> "Rows":
        """Rows of at most ``width`` tokens; ``lengths`` of all samples, none longer."""
        return cls(order, lengths, width)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> list[int]:
        window = bisect_right(self._starts, row) - 1
        if window != self._window:
            self._window, self._made = window, self._make(window)
        return self._made[row - self._starts[window]]

    def tokens(self, lengths: np.ndarray) -> int:
        """The number of tokens in all rows."""
        return sum(int(lengths[self._numbers(window)].sum()) for window in range(len(self._borders) - 1))

    def _numbers(self, window: int) -> np.ndarray:
        return np.asarray(self._order[self._borders[window] : self._borders[window + 1]])

    def _make(self, window: int) -> list[list[int]]:
        numbers = self._numbers(window)
        if self._lengths is None:
            return numbers[:, None].tolist()
        rows = best_fit(self._lengths[numbers].tolist(), self._width)
        return [numbers[row].tolist() for row in rows]


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
