"""Mistral's own releases: ``consolidated.*`` and ``params.json``.

The names are those of the expert layout at model-parallel size 1, without a prefix. Weights come as
``consolidated.00.pth`` (also in parts to be concatenated, ``consolidated.00.pth-split00.pth``, ...), as several files that
hold some of the tensors each (``consolidated.00.pt``, ``consolidated.01.pt``, ...), or as ``consolidated.safetensors``. The
.pt release of 8x7B Instruct, which has the experts of a layer in one matrix per projection (``block_sparse_moe.w1
[E * F, D]``, w2 transposed), is read, too.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from accessory.checkpoint.accessory import rank_tiles
from accessory.checkpoint.storage import Stored, index_file
from accessory.checkpoint.tiles import Directory, Tile
from accessory.config import write_json
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.logical import LogicalModel
from accessory.model.moe.layouts import EXPERT, SPARSE
from accessory.settings import FileFormat

_PATTERN = re.compile(
    r"(consolidated(?:[.-]\d+(?:-of-\d+)?)?\.(?:safetensors|pth|pt))"  # a file
    r"(?:[-._]*(?:split|part)?[-._]*(\d+)(?:-?of-?\d+)?(?:\.pth)?)?"  # or a numbered part of it
)


class MistralDirectory(Directory):
    """A directory of the files above."""

    format = "mistral"

    def __init__(self, directory: Path, files: dict[str, dict[int, Path]]):
        self.directory = directory
        tensors: dict[str, Stored] = {}
        for parts in files.values():
            for key, stored in index_file(*(parts[number] for number in sorted(parts))).tensors.items():
                if key in tensors:
                    raise UserError(f"{directory}: {key} stands in more than one file; keep one set of files")
                tensors[key] = stored
        self.stored = {"": tensors}

    @classmethod
    def find(cls, directory: Path) -> "MistralDirectory | None":
        files: dict[str, dict[int, Path]] = {}
        for path in directory.iterdir():
            if match := _PATTERN.fullmatch(path.name):
                files.setdefault(match[1], {})[int(match[2] or -1)] = path
        for name, parts in files.items():
            if -1 in parts:  # the whole file, perhaps beside its parts
                files[name] = {-1: parts[-1]}
        return cls(directory, files) if files else None

    def tiles(self, logical: LogicalModel) -> Iterator[Tile]:
        merged = any(".block_sparse_moe." in key for key in self.stored[""])
        for tile in rank_tiles(logical, SPARSE if merged else EXPERT, 0, 1, "", prefix=""):
            key = tile.key.replace(".feed_forward.", ".block_sparse_moe.") if merged else tile.key
            yield dataclasses.replace(tile, key=key)


def planned_tiles(logical: LogicalModel, suffix: FileFormat) -> Iterator[Tile]:
    """The tiles of a whole directory, for writing."""
    file = "consolidated.safetensors" if suffix == "safetensors" else "consolidated.00.pth"
    return rank_tiles(logical, EXPERT, 0, 1, file, prefix="")


def write_description(directory: Path, args: ModelArgs) -> None:
    """Write params.json: the keys of config.json, without those for training only and those that are null."""
    params = args.to_dict()
    training = ("max_batch_size", "load_balancing_weight")
    write_json(directory / "params.json", {k: v for k, v in params.items() if k not in training and v is not None})
