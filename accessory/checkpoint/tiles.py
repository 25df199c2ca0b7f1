"""A file format is a table of tiles: which box of which logical tensor lies under which key of which file.

Reading and writing share the table, so a format cannot be read otherwise than it is written.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.checkpoint.storage import Stored
from accessory.model.logical import Region, region_shape


@dataclass(frozen=True)
class Tile:
    """Where ``region`` of logical tensor ``name`` is stored: under ``key`` of ``file``.

    All dimensions but the last are merged.
    ``transposed``: the last two dimensions change places before they are merged.
    ``head_dim``: rows are rotary pairs (0, 1), (2, 3), ... of heads of this size, stored as two halves: 0, 2, ..., 1, 3, ...
    ``slot`` (i, n): instead of merged, stored with three dimensions, as the i-th of n equal parts along dimension 1.
    """

    name: str
    region: Region
    file: str
    key: str
    transposed: bool = False
    head_dim: int | None = None
    slot: tuple[int, int] | None = None

    def stored_shape(self) -> tuple[int, ...]:
        sizes = self._dimensions()
        if self.slot is not None:
            return (sizes[0], sizes[1] * self.slot[1], sizes[2])
        return (math.prod(sizes[:-1]), sizes[-1]) if len(sizes) > 1 else tuple(sizes)

    def encode(self, box: Tensor) -> Tensor:
        """The logical box as it is stored (a format that is written gives every box a tensor of its own)."""
        assert self.slot is None
        if self.head_dim:
            box = box.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2)
        return (box.mT if self.transposed else box).reshape(self.stored_shape()).contiguous()

    def decode(self, stored: Tensor) -> Tensor:
        """The stored tensor in the shape of ``region``; a view of it unless rows must be put in order."""
        if self.slot is not None:
            return stored.chunk(self.slot[1], 1)[self.slot[0]]
        if self.head_dim:
            stored = stored.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2)
        box = stored.reshape(self._dimensions())
        return box.mT if self.transposed else box

    def _dimensions(self) -> list[int]:
        sizes = list(region_shape(self.region))
        if self.transposed:
            sizes[-2:] = sizes[-1], sizes[-2]
        return sizes


class TileReader:
    """Logical tensors read from stored ones; only what is asked for leaves the disk.

    Args:
        where: the checkpoint's name in messages.
        tiles: the format's table.
        stored: file -> key -> tensor, as the tiles name them.

    Attributes:
        complete: the logical tensors all of whose tiles are there, and of the right shape.
    """

    def __init__(self, where: str, tiles: Iterable[Tile], stored: Mapping[str, Mapping[str, Stored]]):
        self.where, self.stored = where, stored
        self.tiles: dict[str, list[Tile]] = defaultdict(list)
        expected: dict[tuple[str, str], Tile] = {}
        for tile in tiles:
            expected[tile.file, tile.key] = tile
            if all(tile.region != other.region for other in self.tiles[tile.name]):  # a replicated tensor is read once
                self.tiles[tile.name].append(tile)
        there = {(file, key): tensor for file, tensors in stored.items() for key, tensor in tensors.items()}
        self.missing = [place for place in expected if place not in there]
        self.unexpected = [place for place in there if place not in expected]
        self.misshapen = [p for p in expected if p in there and there[p].shape != expected[p].stored_shape()]
        bad = {expected[place].name for place in self.missing + self.misshapen}
        self.complete = {name for name in self.tiles if name not in bad}
        self._expected = expected

    def problems(self, partial: bool, most: int | None) -> Iterator[str]:
        """What does not fit the table, a clause each, with at most ``most`` names. ``partial``: nothing has to be there."""
        for verb, places in (("lacks", [] if partial else self.missing), ("holds unexpected", self.unexpected)):
            by_file: dict[str, list[str]] = defaultdict(list)
            for file, key in places:
                by_file[file].append(key)
            for file, keys in by_file.items():
                yield f"{self._path(file)} {verb} {_listed(keys, most)}"
        if self.misshapen:
            shapes = [
                f"{key} has shape {list(self.stored[file][key].shape)}, config.json asks for "
                f"{list(self._expected[file, key].stored_shape())}"
                for file, key in self.misshapen
            ]
            yield f"{self._path(self.misshapen[0][0])}: {_listed(shapes, most)}"

    def read(self, name: str, region: Region) -> Tensor:
        """The values of logical tensor ``name`` in ``region``: a view of the file's pages where one tile holds them all."""
        out, filled = None, 0
        for tile in self.tiles[name]:
            common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(region, tile.region, strict=True)]
            if any(s.start >= s.stop for s in common):
                continue
            box = tile.decode(self.stored[tile.file][tile.key].map())[within(common, tile.region)]
            if box.shape == region_shape(region):
                return box
            if out is None:
                out = torch.empty(region_shape(region), dtype=box.dtype)
            out[within(common, region)] = box
            filled += box.numel()
        assert out is not None and filled == out.numel(), f"tiles leave a hole in {name}"
        return out

    def _path(self, file: str) -> str:
        return f"{self.where}/{file}" if file else self.where


def within(box: Sequence[slice], outer: Region) -> Region:
    """``box`` counted from the beginning of ``outer``."""
    return tuple(slice(b.start - o.start, b.stop - o.start) for b, o in zip(box, outer, strict=True))


def _listed(names: list[str], most: int | None) -> str:
    left = len(names) - (most or len(names))
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")
