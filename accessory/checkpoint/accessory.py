"""The converted directories of LLaMA2-Accessory, in both layouts, any model-parallel size, ``.pth`` or ``.safetensors``.

DIR/consolidated.RR-of-MM.model.{pth,safetensors}   model-parallel rank RR of MM; every name prefixed ``llma.``
DIR/config.json   DIR/meta.json   DIR/tokenizer.model
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from accessory.checkpoint.tiles import Tile, TileReader
from accessory.config import read_mapping
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.logical import Source, logical_cuts
from accessory.model.moe.layouts import LAYOUTS, Layout, get_layout

FileFormat = Literal["safetensors", "pth"]
PREFIX = "llma."


def file_name(rank: int, size: int, suffix: str) -> str:
    return f"consolidated.{rank:02d}-of-{size:02d}.model.{suffix}"


def rank_tiles(args: ModelArgs, layout: Layout, rank: int, size: int, suffix: str) -> Iterator[Tile]:
    """The tiles in the file of model-parallel rank ``rank`` of ``size``.

    The expert layout stores a matrix per expert, by its global number: ``experts.{e}.w1.weight``. The sparse layout
    stores the slices of all experts in one matrix, ``w1 [E * F/mp, D]``, and w2 transposed to that same shape.
    """
    file = file_name(rank, size, suffix)
    for name, cut in logical_cuts(args, layout).items():
        region = cut.region(rank, size)
        prefix, is_expert, weight = name.partition(".experts.")
        if not is_expert:
            yield Tile(name, region, file, PREFIX + name)
        elif layout.name == "mixtral_sparse":
            yield Tile(name, region, file, f"{PREFIX}{prefix}.{weight}", transposed=weight == "w2")
        else:
            for e in range(region[0].start, region[0].stop):
                key = f"{PREFIX}{prefix}.experts.{e}.{weight}.weight"
                yield Tile(name, (slice(e, e + 1), *region[1:]), file, key)


class AccessoryCheckpoint:
    """A converted directory as a source of logical tensors.

    Args:
        directory: holds the files above.
        config: another config.json than the directory's own.
        layout: another llama_type than the directory's meta.json.

    Attributes:
        args: the model's shape. layout: how the files are cut. tokenizer: path of tokenizer.model, or None.
    """

    def __init__(self, directory: str | Path, config: str | Path | None = None, layout: str | None = None):
        self.directory = Path(directory)
        size, suffix = _find_files(self.directory)
        self.args = ModelArgs.load(config or self.directory / "config.json")
        meta = self.directory / "meta.json"
        llama_type = layout or (read_mapping(meta).get("llama_type") if meta.is_file() else None)
        if llama_type is None:
            raise UserError(f"{meta}: no such file; it says which layout the checkpoint has: {' or '.join(LAYOUTS)}")
        self.layout = get_layout(llama_type)
        tokenizer = self.directory / "tokenizer.model"
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        tiles = (t for rank in range(size) for t in rank_tiles(self.args, self.layout, rank, size, suffix))
        self._reader = TileReader(self.directory, tiles)
        self.read = self._reader.read


def _find_files(directory: Path) -> tuple[int, str]:
    """The model-parallel size and suffix of a directory's ``consolidated`` files."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected a checkpoint")
    found = set()
    for path in directory.iterdir():
        if match := re.fullmatch(r"consolidated\.\d\d-of-(\d\d)\.model\.(pth|safetensors)", path.name):
            found.add((int(match[1]), match[2]))
    if not found:
        raise UserError(f"{directory}: no consolidated.RR-of-MM.model.pth or .safetensors in it")
    if len(found) > 1:
        kinds = ", ".join(f"of-{size:02d} .{suffix}" for size, suffix in sorted(found))
        raise UserError(f"{directory}: holds files of more than one checkpoint ({kinds}); keep one set")
    return found.pop()


def temporary_name(directory: Path) -> Path:
    """Where a directory is written before it gets its name."""
    return directory.with_name(directory.name + ".tmp")


def prepare_directory(directory: Path) -> None:
    """Make an empty temporary directory beside ``directory``, to be filled and then published."""
    shutil.rmtree(temporary_name(directory), ignore_errors=True)
    temporary_name(directory).mkdir(parents=True)


def publish_directory(directory: Path) -> None:
    """Rename a completely written temporary directory to its final name: what bears the name is whole."""
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    temporary_name(directory).rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def write_rank_file(
    directory: Path,
    args: ModelArgs,
    layout: Layout,
    rank: int,
    size: int,
    source: Source,
    dtype: torch.dtype,
    suffix: FileFormat,
) -> None:
    """Write one model-parallel rank's file and wait until it is on the disk."""
    tensors = {}
    for tile in rank_tiles(args, layout, rank, size, suffix):
        tensors[tile.key] = tile.encode(source.read(tile.name, tile.region).to("cpu", dtype)).clone()
    path = directory / file_name(rank, size, suffix)
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_description(directory: Path, args: ModelArgs, layout: Layout, tokenizer: Path | None) -> None:
    """Write config.json and meta.json, and copy the tokenizer."""
    _write_json(directory / "config.json", args.to_dict())
    _write_json(directory / "meta.json", {"llama_type": layout.name})
    if tokenizer is not None:
        shutil.copyfile(tokenizer, directory / "tokenizer.model")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
