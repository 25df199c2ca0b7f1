"""The order of an epoch: a permutation whose entries are computed on demand and never held in memory."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

ROUNDS = 8
SMALL = 64
"""Below this count a permutation is drawn as a whole: for so few numbers the network cannot reach all permutations."""


class Order(Protocol):
    """Sample numbers in an order; arrays and ranges are orders, too."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice, /) -> np.ndarray:
        """The numbers at a slice of places: [n], int64."""


def permute(places: np.ndarray, count: int, seed: str) -> np.ndarray:
    """The numbers at ``places`` of a pseudo-random permutation of ``count`` numbers: [n] -> [n], int64.

    A Feistel network over a rectangle of a x b >= ``count`` cells, applied again to results of ``count`` or more (Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002). It is the same on every machine and with every version of numpy.
    """
    if count < SMALL:
        return _drawn(count, seed)[places]
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    digest = hashlib.shake_128(seed.encode()).digest(8 * ROUNDS)
    keys = np.frombuffer(digest, "<u8").astype(np.uint64)
    found = np.array(places, np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        right, left = np.divmod(found[outside], np.uint64(a))
        for number, key in enumerate(keys):
            left, right = right, (left + _mix(right + key)) % np.uint64(b if number % 2 else a)
        found[outside] = left + right * np.uint64(a)
        outside = outside[found[outside] >= count]
    return found.astype(np.int64)


def _drawn(count: int, seed: str) -> np.ndarray:
    """A uniformly drawn permutation (Fisher and Yates)."""
    numbers = list(range(count))
    draws = np.frombuffer(hashlib.shake_128(seed.encode()).digest(8 * count), "<u8").tolist()
    for last in range(count - 1, 0, -1):
        other = draws[last] % (last + 1)
        numbers[last], numbers[other] = numbers[other], numbers[last]
    return np.array(numbers, np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """A hash of ``x`` to 63 bits: the finaliser of SplitMix64. The 64th bit leaves room for a sum."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


@dataclass(frozen=True)
class Part:
    """The ``count`` samples that an epoch takes of a source with ``size`` samples, numbered from ``start``: all of them
    ``count // size`` times, and for the rest a run of the permutation that ``seed`` makes, from place ``skip`` on.

    Attributes:
        firsts: [size + 1], for images with several captions, which count as one sample of several variants: where each
            sample's variants begin, counted from ``start``, and where the last ends. None: one variant each.
        round: how often all samples were taken in earlier epochs; each time another variant is taken.
    """

    start: int
    size: int
    count: int
    seed: str
    skip: int = 0
    firsts: np.ndarray | None = None
    round: int = 0

    def numbers(self, places: np.ndarray) -> np.ndarray:
        rounds, numbers = np.divmod(places, self.size)
        rest = places >= self.count - self.count % self.size
        more, stretch = np.divmod(numbers[rest] + self.skip, self.size)
        numbers[rest] = permute(stretch, self.size, self.seed)
        if self.firsts is None:
            return self.start + numbers
        rounds[rest] += more
        ways = self.firsts[numbers + 1] - self.firsts[numbers]
        key = np.frombuffer(hashlib.shake_128(self.seed.encode()).digest(8), "<u8").astype(np.uint64)
        begun = _mix(numbers.astype(np.uint64) + key).astype(np.int64)
        return self.start + self.firsts[numbers] + (begun % ways + rounds + self.round) % ways


class Shuffled:
    """The order of an epoch: its parts, shuffled together."""

    def __init__(self, parts: Sequence[Part], seed: str):
        self._parts, self._seed = parts, seed
        self._ends = np.cumsum([part.count for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, places: slice) -> np.ndarray:
        shuffled = permute(np.arange(*places.indices(len(self))), len(self), self._seed)
        of = np.searchsorted(self._ends, shuffled, side="right")
        numbers = np.empty_like(shuffled)
        for number in np.unique(of):
            mine, part = of == number, self._parts[number]
            numbers[mine] = part.numbers(shuffled[mine] - (self._ends[number] - part.count))
        return numbers
