"""A file format is a table of tiles: which box of which logical tensor lies under which key of which file.

Reading and writing share the table, so a format cannot be read otherwise than it is written.
"""

import functools
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
    ``groups_last``: with a slot; the first dimension is stored as the last one, merged with it and counting fastest.
    ``one_group``: the first dimension, of size 1, is left out rather than merged.
    """

    name: str
    region: Region
    file: str
    key: str
    transposed: bool = False
    head_dim: int | None = None
    slot: tuple[int, int] | None = None
    groups_last: bool = False
    one_group: bool = False

    def stored_shape(self) -> tuple[int, ...]:
        sizes = self._dimensions()
        if self.slot is not None:
            rows = sizes[1] * self.slot[1]
            return (rows, sizes[2] * sizes[0]) if self.groups_last else (sizes[0], rows, sizes[2])
        if self.one_group:
            return tuple(sizes[1:])
        return (math.prod(sizes[:-1]), sizes[-1]) if len(sizes) > 1 else tuple(sizes)

    def encode(self, box: Tensor) -> Tensor:
        """The logical box as it is stored (a format that is written gives every box a tensor of its own)."""
        assert self.slot in (None, (0, 1)) and not self.groups_last
        if self.head_dim:
            box = box.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2)
        return (box.mT if self.transposed else box).reshape(self.stored_shape()).contiguous()

    def read(self, stored: Tensor, inside: Region) -> Tensor:
        """The part ``inside`` of the region, from the stored tensor; a view of it unless rows must be put in order."""
        if self.head_dim:  # whole heads, but only those that are asked for
            rows, *columns = inside
            first = rows.start // self.head_dim * self.head_dim
            heads = stored[first : -(-rows.stop // self.head_dim) * self.head_dim]
            ordered = heads.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            return ordered[(slice(rows.start - first, rows.stop - first), *columns)]
        return self._decode(stored)[inside]

    def _decode(self, stored: Tensor) -> Tensor:
        if self.groups_last:
            stored = stored.unflatten(-1, (-1, region_shape(self.region)[0])).movedim(-1, 0)
        if self.slot is not None:
            return stored.chunk(self.slot[1], 1)[self.slot[0]]
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
        tiles: those that are there, by logical name. complete: the logical tensors that they fill.
    """

    def __init__(self, where: str, tiles: Iterable[Tile], stored: Mapping[str, Mapping[str, Stored]]):
        self.where, self.stored = where, stored
        expected: dict[tuple[str, str], list[Tile]] = defaultdict(list)
        for tile in tiles:
            expected[tile.file, tile.key].append(tile)
        there = {(file, key): tensor for file, tensors in stored.items() for key, tensor in tensors.items()}
        self.missing = [place for place in expected if place not in there]
        self.unexpected = [place for place in there if place not in expected]
        self.misshapen = {
            place: tiles[0].stored_shape()
            for place, tiles in expected.items()
            if place in there and there[place].shape != tiles[0].stored_shape()
        }
        self.tiles: dict[str, list[Tile]] = defaultdict(list)
        self.replicas: list[tuple[Tile, Tile]] = []
        lacking: dict[str, set[str]] = defaultdict(set)
        for place, tiles_here in expected.items():
            sound = place in there and place not in self.misshapen
            for tile in tiles_here:
                same = next((other for other in self.tiles[tile.name] if other.region == tile.region), None)
                if not sound:
                    lacking[tile.name].add(str(tile.region))
                elif same is not None:  # what several ranks hold is read once
                    self.replicas.append((same, tile))
                else:
                    self.tiles[tile.name].append(tile)
        self.complete = {
            name for name, found in self.tiles.items() if found and not lacking[name] - {str(tile.region) for tile in found}
        }

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
                f"{key} has shape {list(self.stored[file][key].shape)}, config.json asks for {list(shape)}"
                for (file, key), shape in self.misshapen.items()
            ]
            yield f"{self._path(next(iter(self.misshapen))[0])}: {_listed(shapes, most)}"

    def differing_replicas(self) -> list[str]:
        """Keys that several files hold, but not with the same values (they are small: norms and routers)."""
        pairs = ((first, self._map(first), self._map(second)) for first, second in self.replicas)
        return sorted({first.key for first, a, b in pairs if not torch.equal(a, b)})

    def dtype(self, name: str) -> torch.dtype:
        """A dtype that holds every value of logical tensor ``name``."""
        dtypes = [self.stored[tile.file][tile.key].dtype for tile in self.tiles[name]]
        return functools.reduce(torch.promote_types, dtypes)

    def read(self, name: str, region: Region) -> Tensor:
        """The values of logical tensor ``name`` in ``region``: a view of the file's pages where one tile holds them all."""
        for tile in self.tiles[name]:
            if _common(tile.region, region) == list(region):
                return tile.read(self._map(tile), within(region, tile.region))
        out = torch.empty(region_shape(region), dtype=self.dtype(name))
        filled = self.lay_over(out, name, region, adds=False)
        assert filled == out.numel(), f"tiles leave a hole in {name}"
        return out

    def lay_over(self, out: Tensor, name: str, region: Region, adds: bool) -> int:
        """Copy into ``out``, which stands for ``region``, what is there of it (or add it); returns how many values."""
        filled = 0
        for tile in self.tiles[name]:
            common = _common(tile.region, region)
            if all(s.start < s.stop for s in common):
                box = tile.read(self._map(tile), within(common, tile.region))
                place = out[within(common, region)]
                place.add_(box) if adds else place.copy_(box)
                filled += box.numel()
        return filled

    def _map(self, tile: Tile) -> Tensor:
        return self.stored[tile.file][tile.key].map()

    def _path(self, file: str) -> str:
        return f"{self.where}/{file}" if file else self.where


def _common(a: Region, b: Region) -> list[slice]:
    return [slice(max(s.start, t.start), min(s.stop, t.stop)) for s, t in zip(a, b, strict=True)]


def within(box: Sequence[slice], outer: Region) -> Region:
    """``box`` counted from the beginning of ``outer``."""
    return tuple(slice(b.start - o.start, b.stop - o.start) for b, o in zip(box, outer, strict=True))


def _listed(names: list[str], most: int | None) -> str:
    left = len(names) - (most or len(names))
    return ", ".join(names[:most]) + (f" and {left} more" if left > 0 else "")
