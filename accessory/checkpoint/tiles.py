"""A file format is a table of tiles: which box of which logical tensor lies under which key of which file.

Reading and writing share the table, so a format cannot be read otherwise than it is written.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from accessory.errors import UserError
from accessory.model.logical import Region, region_shape


@dataclass(frozen=True)
class Tile:
    """One stored tensor: ``region`` of logical tensor ``name``, with all dimensions but the last merged.

    ``transposed``: the last two dimensions change places before they are merged.
    """

    name: str
    region: Region
    file: str
    key: str
    transposed: bool = False

    def stored_shape(self) -> tuple[int, ...]:
        *rows, columns = self._dimensions()
        return (_product(rows), columns) if rows else (columns,)

    def encode(self, box: Tensor) -> Tensor:
        """The logical box as it is stored."""
        return (box.mT if self.transposed else box).reshape(self.stored_shape()).contiguous()

    def decode(self, stored: Tensor) -> Tensor:
        """A view of the stored tensor in the shape of ``region``; nothing is copied."""
        box = stored.view(self._dimensions())
        return box.mT if self.transposed else box

    def _dimensions(self) -> list[int]:
        sizes = list(region_shape(self.region))
        if self.transposed:
            sizes[-2:] = sizes[-1], sizes[-2]
        return sizes


class TileReader:
    """Logical tensors read from the files that ``tiles`` describes; only what is asked for leaves the disk.

    Raises:
        UserError: a file is missing or damaged, a tensor is missing, unexpected or of the wrong shape.
    """

    def __init__(self, directory: Path, tiles: Iterable[Tile]):
        self.directory = directory
        self.tiles: dict[str, list[Tile]] = defaultdict(list)
        self.files: dict[str, Mapping[str, Tensor]] = {}
        expected: dict[str, dict[str, Tile]] = defaultdict(dict)
        for tile in tiles:
            if all(tile.region != other.region for other in self.tiles[tile.name]):  # a replicated tensor is read once
                self.tiles[tile.name].append(tile)
            expected[tile.file][tile.key] = tile
        for file, by_key in expected.items():
            self.files[file] = open_tensors(directory / file)
            self._check(file, by_key)

    def read(self, name: str, region: Region) -> Tensor:
        parts = []
        for tile in self.tiles[name]:
            common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(region, tile.region, strict=True)]
            if all(s.start < s.stop for s in common):
                box = tile.decode(self.files[tile.file][tile.key])
                inside = tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(common, tile.region, strict=True))
                where = tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(common, region, strict=True))
                parts.append((where, box[inside]))
        assert sum(part.numel() for _, part in parts) == _product(region_shape(region)), f"tiles leave a hole in {name}"
        if len(parts) == 1:
            return parts[0][1]
        out = torch.empty(region_shape(region), dtype=parts[0][1].dtype)
        for where, part in parts:
            out[where] = part
        return out

    def _check(self, file: str, expected: dict[str, Tile]) -> None:
        tensors, where = self.files[file], self.directory / file
        for problem, keys in (
            ("lacks", expected.keys() - tensors.keys()),
            ("holds unexpected", tensors.keys() - expected.keys()),
        ):
            if keys:
                names = sorted(keys)
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise UserError(
                    f"{where}: {problem} {', '.join(names[:3])}{more}; does config.json describe this checkpoint?"
                )
        for key, tile in expected.items():
            shape = tuple(tensors[key].shape)
            if shape != tile.stored_shape():
                raise UserError(
                    f"{where}: {key} has shape {list(shape)}, config.json asks for {list(tile.stored_shape())}; "
                    "does config.json describe this checkpoint?"
                )


def open_tensors(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a ``.pth`` holding ``{"model": {...}}``, memory-mapped.

    A ``.pth`` is read with ``weights_only=True``: it cannot run code.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; the checkpoint is incomplete")
    try:
        if path.suffix == ".safetensors":
            return _Safetensors(path)
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged or not a checkpoint file ({' '.join(str(error).split())[:120]})") from error
    except Exception as error:  # torch raises pickle.UnpicklingError, and others, for what it refuses to unpickle
        raise UserError(f"{path}: refused, it holds more than tensors (a pickle could run code)") from error
    tensors = content.get("model") if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f'{path}: expected {{"model": {{name: tensor}}}} in it')
    return tensors


class _Safetensors(Mapping[str, Tensor]):
    def __init__(self, path: Path):
        self._file: Any = safe_open(path, framework="pt")
        self._keys = list(self._file.keys())

    def __getitem__(self, key: str) -> Tensor:
        return self._file.get_tensor(key)

    def __iter__(self):
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _product(sizes: Iterable[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
