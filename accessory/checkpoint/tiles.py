"""A file format is a table of tiles: which box of which logical tensor lies under which key of which file.

Reading and writing share the table, so a format cannot be read otherwise than it is written.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from accessory.checkpoint.encoding import AS_IS, Encoding
from accessory.checkpoint.storage import Stored, not_a_weight
from accessory.console import listed
from accessory.model.codecs import is_part
from accessory.model.logical import Adapters, LogicalModel, Region, Shape, Source, region_shape
from accessory.model.moe.layouts import EXPERT, Layout
from accessory.model.visual import VisualArgs
from accessory.settings import QuantiseSection


@dataclass(frozen=True)
class Tile:
    """Where ``region`` of the logical tensor ``name`` is stored: under ``key`` of ``file``, laid out as ``encoding`` says.

    A stored tensor is one tile, or several side by side.
    """

    name: str
    region: Region
    file: str
    key: str
    encoding: Encoding = AS_IS

    def stored_shape(self) -> Shape:
        return self.encoding.stored_shape(region_shape(self.region))

    def read(self, stored: Tensor, inside: Region) -> Tensor:
        """The part ``inside`` of the region, from the stored tensor; a view of it unless rows must be put in order."""
        return self.encoding.read(stored, region_shape(self.region), inside)


@dataclass
class PlannedTensor:
    """A stored tensor that is to be written, and its tiles; where no tile lies it is zero."""

    shape: Shape
    dtype: torch.dtype
    tiles: list[Tile]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def filled(self, source: Source) -> Tensor:
        """The tensor, filled with the values of ``source``."""
        if len(self.tiles) == 1 and self.tiles[0].encoding.keeps_order:  # the box itself: nothing is copied
            (tile,) = self.tiles
            return source.read(tile.name, tile.region).to(self.dtype).reshape(self.shape)
        stored = torch.zeros(self.shape, dtype=self.dtype)
        for tile in self.tiles:
            tile.encoding.write(source.read(tile.name, tile.region), stored)
        return stored


Files = dict[str, dict[str, PlannedTensor]]
"""File -> key -> what is to be written there."""


def planned_tensors(tiles: Iterable[Tile], dtypes: Mapping[str, torch.dtype]) -> Files:
    """The stored tensors of ``tiles``. ``dtypes``: of the logical tensors; where several are stored in one, its dtype holds
    the values of all."""
    files: Files = defaultdict(dict)
    for tile in tiles:
        dtype = dtypes[tile.name]
        planned = files[tile.file].setdefault(tile.key, PlannedTensor(tile.stored_shape(), dtype, []))
        planned.dtype = torch.promote_types(planned.dtype, dtype)
        planned.tiles.append(tile)
    return files


class Directory:
    """A checkpoint directory in one of the formats."""

    format: str  # as ``accessory convert --to`` calls it
    layout: Layout = EXPERT  # how its experts are cut
    size = 1  # into how many model-parallel parts
    adds = False  # its values are to be added to another checkpoint's
    may_lack = True  # laid over a base, it may lack tensors that the format has a place for
    fingerprint: str | None = None  # of the base that it belongs to, if it says so
    quantise: QuantiseSection | None = None  # how that base was quantised
    labels: tuple[str, ...] = ()  # of the classifier into which it turns a base
    visual: VisualArgs | None = None  # how the model sees images, as far as the files tell
    encoders: Mapping[str, Stored] = MappingProxyType({})  # the encoders' tensors, if they are among the model's files
    directory: Path
    stored: dict[str, dict[str, Stored]]  # file -> key -> tensor

    @classmethod
    def find(cls, directory: Path) -> "Directory | None":
        """``directory`` opened in this format; None: it is of another format."""
        raise NotImplementedError

    def adapters(self, base: LogicalModel) -> Adapters:
        """The adapters that it adds to the matrices of a model."""
        return {}

    def tiles(self, logical: LogicalModel) -> Iterator[Tile]:
        """Where the tensors of a model, adapters included, are stored."""
        raise NotImplementedError


def has_connector(directory: Directory) -> bool:
    """Whether some tensor of a visual model's connector is there, under any format's name."""
    return any(_CONNECTOR.search(key) for tensors in directory.stored.values() for key in tensors)


_CONNECTOR = re.compile(r"(^|\.)(clip_proj|visual_proj|qformer_proj|multi_modal_projector|start_img)(_norm)?(\.|$)")


class TileReader:
    """Reads logical tensors from stored ones; only what is asked for is read from the disk.

    Args:
        where: the checkpoint's name in messages.
        tiles: the format's table.
        stored: file -> key -> tensor, as the tiles name them.

    Attributes:
        tiles: the tiles that are stored, by logical name. complete: the logical tensors that they fill entirely.
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
            place: shape
            for place, tiles_here in expected.items()
            if place in there and there[place].shape != (shape := tiles_here[0].stored_shape())
        }
        for place, tiles_here in expected.items():
            if place in there and not (there[place].dtype.is_floating_point or is_part(tiles_here[0].name)):
                raise not_a_weight(there[place].parts, place[1], there[place].dtype)
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
        """What does not fit the table, a clause each, with at most ``most`` names. ``partial``: tensors may be missing."""
        for verb, places in (("lacks", [] if partial else self.missing), ("holds unexpected", self.unexpected)):
            by_file: dict[str, list[str]] = defaultdict(list)
            for file, key in places:
                by_file[file].append(key)
            for file, keys in by_file.items():
                yield f"{self._path(file)} {verb} {listed(keys, most)}"
        if self.misshapen:
            shapes = [
                f"{key} has shape {list(self.stored[file][key].shape)}, config.json asks for {list(shape)}"
                for (file, key), shape in self.misshapen.items()
            ]
            yield f"{self._path(next(iter(self.misshapen))[0])}: {listed(shapes, most)}"

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
        """Copy what is stored of ``region`` into ``out`` (``adds``: add it); returns the number of values."""
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
