"""Write the trained model as a converted directory, or what was trained as an adapter directory."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from accessory.checkpoint.accessory import file_name, rank_notes, rank_tiles, write_description
from accessory.checkpoint.adapter import write_adapter
from accessory.checkpoint.publish import copy_companions, prepare_directory, publish_directory, temporary_name
from accessory.checkpoint.storage import TensorWriter
from accessory.checkpoint.tiles import Tile, within
from accessory.console import is_main
from accessory.model.decoder import Decoder
from accessory.model.logical import held_dtype, region_shape
from accessory.parallel.fsdp import show_masters
from accessory.parallel.watchdog import progressed
from accessory.settings import FileFormat


@torch.no_grad()
def save_model(
    model: Decoder,
    directory: Path,
    companions: dict[str, Path],
    dtype: torch.dtype,
    suffix: FileFormat,
    finish: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write one file per model-parallel rank, in the layout the model runs in. Every rank must call this.

    Parameters are gathered and written one by one, so a rank never holds more than its share and one whole parameter.
    The directory appears under its name only when it is complete.

    Args:
        companions: files to be copied into the directory, by the names that they get: the tokenizer.
        finish: writes what else belongs into it.
    """
    rank, size, writes = model.mesh.mp.rank, model.mesh.mp.size, model.mesh.dp.rank == 0
    if is_main():
        prepare_directory(directory)
    dist.barrier()
    path = temporary_name(directory) / file_name(rank, size, suffix)
    tiles: dict[str, list[Tile]] = defaultdict(list)
    for tile in rank_tiles(model.logical, model.layout, rank, size, path.name):
        tiles[tile.name].append(tile)
    announced = {t.key: (held_dtype(t.name, dtype), t.stored_shape()) for some in tiles.values() for t in some}
    with TensorWriter(path, announced, rank_notes(rank, size)) if writes else nullcontext() as file:
        for name, part in gathered(model):
            if file is None:
                continue
            region = model.cuts[name].region(rank, size)
            for tile in tiles[name]:
                stored = torch.empty(tile.stored_shape(), dtype=held_dtype(name, dtype))
                tile.encoding.write(part[within(tile.region, region)], stored)
                file.write(tile.key, stored)
    dist.barrier()
    if is_main():
        write_description(temporary_name(directory), model.args, model.layout)
        copy_companions(companions, temporary_name(directory))
        finish(temporary_name(directory))
        publish_directory(directory)
    dist.barrier()


@torch.no_grad()
def save_trainable(
    model: Decoder,
    directory: Path,
    companions: dict[str, Path],
    base: dict[str, Any],
    finish: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write what trains as an adapter directory, every tensor whole and in its masters' precision.

    Args:
        base: the fingerprint of the model that it belongs to, and its path. Every rank must call this.
    """
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    if is_main():
        temporary = prepare_directory(directory)
        write_adapter(temporary, model.logical, trained, gathered_whole(model, trained.keys()), base)
        copy_companions(companions, temporary)
        finish(temporary)
        publish_directory(directory)
    else:
        for _ in gathered_whole(model, trained.keys()):
            pass
    dist.barrier()


def gathered_whole(model: Decoder, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Logical tensors, each gathered over data-parallel and model-parallel ranks (collectives), on the CPU."""
    mp = model.mesh.mp
    for name, part in gathered(model, names):
        dim = model.cuts[name].dim_over(mp.size)
        if dim is not None and mp.size > 1:
            parts = [torch.empty_like(part) for _ in range(mp.size)]
            dist.all_gather(parts, part.contiguous(), group=mp.group)
            part = torch.cat(parts, dim)
        yield name, part.cpu()


@torch.no_grad()
def gathered(model: Decoder, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """This model-parallel rank's boxes of logical tensors (or of some) by name, each gathered over the data-parallel ranks
    (a collective)."""
    show_masters(model)
    mp = model.mesh.mp
    for name, parameter in model.named_tensors():
        if names is None or name in names:
            progressed()
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            yield name, whole.view(region_shape(model.cuts[name].region(mp.rank, mp.size)))
