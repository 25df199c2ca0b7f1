"""Write a checkpoint in any format: one tensor after the other, whatever the model's size."""

import errno
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from accessory.checkpoint import accessory, huggingface, mistral
from accessory.checkpoint.accessory import check_suffix
from accessory.checkpoint.merge import Merged
from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.peft import write_peft
from accessory.checkpoint.publish import prepare_directory, publish_directory
from accessory.checkpoint.storage import TensorWriter
from accessory.checkpoint.tiles import Tile
from accessory.console import progress, say
from accessory.data.tokenizer import Tokenizer, check_vocabulary
from accessory.dtypes import all_finite, at_least
from accessory.errors import UserError
from accessory.model.adapter import Adapter, adapter_name
from accessory.model.args import ModelArgs
from accessory.model.logical import Adapters, Source, divided_sizes, is_buffer, logical_cuts
from accessory.model.moe.layouts import LAYOUTS, get_layout
from accessory.parallel.mesh import check_divides
from accessory.settings import FileFormat

TargetFormat = Literal["hf", "mistral", "mixtral", "mixtral_sparse", "peft"]


@dataclass(frozen=True)
class Target:
    """What to write. ``size``: model-parallel parts. ``dtype`` None: each tensor's own."""

    format: TargetFormat
    size: int = 1
    dtype: torch.dtype | None = None
    suffix: FileFormat = "safetensors"
    shard_bytes: float = 5e9  # of a Hugging Face file

    def check(self, args: ModelArgs) -> None:
        """Raise UserError if a model of this shape cannot be written so."""
        if self.format in LAYOUTS:
            check_divides(f"layout '{self.format}'", self.size, divided_sizes(args, get_layout(self.format)))
        elif self.size != 1:
            raise UserError(f"--mp {self.size}: the format '{self.format}' is not cut; leave --mp away")
        if self.format == "hf" and self.suffix != "safetensors":
            raise UserError("the format 'hf' is written as safetensors only")
        if self.format not in LAYOUTS and args.moe.score_bias:
            raise UserError(
                f"the format '{self.format}' has no place for the routers' score biases (train.balance: bias): "
                "write mixtral or mixtral_sparse"
            )
        check_suffix(args, self.suffix)
        if not self.shard_bytes > 0:
            raise UserError("--shard-gb must be above 0")


def convert(checkpoint: Checkpoint, destination: Path, target: Target) -> None:
    """Write ``checkpoint`` to the directory ``destination``, which appears only when it is whole.

    In memory there is one stored tensor at a time (at most three times its size; more while an adapter is folded in).

    Raises:
        UserError: the destination is not empty, the disk is too small or fills up, the size does not divide the model,
            or the tokenizer is not the model's.
    """
    target.check(checkpoint.args)
    biased = {name: Adapter(bias=True) for name, adapter in checkpoint.adapters.items() if adapter.bias}
    if biased and target.format in ("hf", "mistral"):
        raise UserError(f"the format '{target.format}' has no place for biases; these have one: {_some([*biased])}")
    source = Merged(checkpoint)
    destination = _free(destination)
    checkpoint.warn_of_differing_replicas()
    tokenizer = Tokenizer(checkpoint.tokenizer) if checkpoint.tokenizer else None
    if tokenizer:
        check_vocabulary(tokenizer, checkpoint.args.vocab_size)
    names = logical_cuts(checkpoint.args, get_layout("mixtral"), biased)
    dtypes = {name: target.dtype or checkpoint.dtype(name) for name in names}
    buffers = filter(is_buffer, names)  # whose steps are too small for bf16
    dtypes |= {name: at_least(dtypes[name]) for name in buffers}
    if target.dtype is None:  # a bias has its matrix' precision
        dtypes |= {adapter_name(name, "bias"): dtypes[name] for name in biased}
    files = _planned_files(checkpoint.args, target, dtypes, biased)
    nbytes = sum(_nbytes(tile, dtypes) for tiles in files.values() for tile in tiles)
    with _written_whole(destination) as temporary:
        _check_room(temporary, destination, nbytes)
        damaged = _write_files(source, temporary, target, files, dtypes, nbytes)
        for name, path in checkpoint.carried.items():
            shutil.copyfile(path, temporary / name)
        if target.format == "hf":
            keys = {file: [tile.key for tile in tiles] for file, tiles in files.items()}
            special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} if tokenizer else {}
            special = {key: number for key, number in special.items() if number >= 0}
            dtype = dtypes["tok_embeddings.weight"]
            huggingface.write_description(temporary, checkpoint.args, dtype, checkpoint.hf_config(), special, keys, nbytes)
        elif target.format == "mistral":
            mistral.write_description(temporary, checkpoint.args)
        else:
            accessory.write_description(temporary, checkpoint.args, target.format, bool(biased))
    if source.unchanged:
        say(f"warning: nothing changed in {_some(source.unchanged)}: what is added is lost in rounding, or is nothing")
    if damaged:
        say(f"warning: {len(damaged)} tensors hold NaN or infinite values: {_some(damaged)}")


def export_peft(checkpoint: Checkpoint, destination: Path) -> None:
    """Write the adapters of ``checkpoint`` as the PEFT library saves them. Raises UserError for what it has no place for."""
    if not checkpoint.adapters:
        raise UserError("there is no adapter to export; name the base, then the adapter's directory")
    if more := [name for name in checkpoint.changed if name not in checkpoint.adapters]:
        raise UserError(f"PEFT's LoRA has no place for trained weights of the base: {_some(more)}")
    Target("peft").check(checkpoint.args)
    destination = _free(destination)
    with _written_whole(destination) as temporary:
        base = str(checkpoint.directories[0].directory.resolve())
        write_peft(temporary, checkpoint, checkpoint.adapters, checkpoint.args, base)


def _free(destination: Path) -> Path:
    """The destination's real path, if a directory can be made there."""
    destination = destination.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination}: exists already; name another directory, or remove it")
    if os.path.ismount(destination):
        raise UserError(f"{destination}: is a mount point; name a directory in it")
    return destination


@contextmanager
def _written_whole(destination: Path) -> Iterator[Path]:
    """A temporary directory that becomes ``destination`` at the end, and goes if anything fails."""
    temporary = prepare_directory(destination)
    try:
        yield temporary
        publish_directory(destination)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise UserError(f"{destination}: {what}; nothing was left behind") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _planned_files(
    args: ModelArgs, target: Target, dtypes: dict[str, torch.dtype], biased: Adapters
) -> dict[str, list[Tile]]:
    if target.format == "hf":
        return _shards(huggingface.model_tiles(args), target, dtypes)
    tiles = (
        mistral.planned_tiles(args, target.suffix)
        if target.format == "mistral"
        else accessory.planned_tiles(args, target.format, target.size, target.suffix, biased)
    )
    files: dict[str, list[Tile]] = defaultdict(list)
    for tile in tiles:
        files[tile.file].append(tile)
    return files


def _shards(tiles: Iterable[Tile], target: Target, dtypes: dict[str, torch.dtype]) -> dict[str, list[Tile]]:
    """Deal tiles out to files of at most ``shard_bytes`` (but at least one tile)."""
    shards: list[list[Tile]] = []
    room = 0.0
    for tile in tiles:
        size = _nbytes(tile, dtypes)
        if size > room or not shards:
            shards.append([])
            room = target.shard_bytes
        shards[-1].append(tile)
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards)}


def _write_files(
    source: Source,
    directory: Path,
    target: Target,
    files: dict[str, list[Tile]],
    dtypes: dict[str, torch.dtype],
    nbytes: int,
) -> list[str]:
    """Write every file; returns the logical tensors that hold values which are no numbers."""
    damaged: dict[str, None] = {}
    with progress(total=nbytes, unit="B", unit_scale=True, desc="writing") as bar:
        for rank, (file, tiles) in enumerate(files.items()):
            announced = {tile.key: (dtypes[tile.name], tile.stored_shape()) for tile in tiles}
            notes = accessory.rank_notes(rank, target.size) if target.format in LAYOUTS else {}
            with TensorWriter(directory / file, announced, notes) as out:
                for tile in tiles:
                    tensor = tile.encode(source.read(tile.name, tile.region).to(dtypes[tile.name]))
                    if not all_finite(tensor):
                        damaged[tile.name] = None
                    out.write(tile.key, tensor)
                    bar.update(tensor.nbytes)
                    del tensor  # before the next is read
    return list(damaged)


def _check_room(temporary: Path, destination: Path, nbytes: int) -> None:
    free = shutil.disk_usage(temporary).free
    if free < nbytes:
        raise UserError(
            f"{destination}: the disk is too small: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        )


def _nbytes(tile: Tile, dtypes: dict[str, torch.dtype]) -> int:
    return math.prod(tile.stored_shape()) * dtypes[tile.name].itemsize
