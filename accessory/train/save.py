"""Write the trained model as a converted directory."""

import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from accessory.checkpoint.accessory import file_name, rank_notes, rank_tiles, write_description
from accessory.checkpoint.publish import prepare_directory, publish_directory, temporary_name
from accessory.checkpoint.storage import FileFormat, TensorWriter
from accessory.checkpoint.tiles import Tile, within
from accessory.console import is_main
from accessory.model.decoder import Decoder
from accessory.model.logical import logical_cuts, region_shape
from accessory.parallel.fsdp import show_masters
from accessory.parallel.tensor import (
    get_data_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)


@torch.no_grad()
def save_model(model: Decoder, directory: Path, carried: dict[str, Path], dtype: torch.dtype, suffix: FileFormat) -> None:
    """Write one file per model-parallel rank, in the layout the model runs in. Every rank must call this.

    Parameters are gathered and written one by one, so a rank never holds more than its share and one whole parameter.
    The directory appears under its name only when it is complete.

    Args:
        carried: files to be copied into the directory, by the names that they get: the tokenizer.
    """
    rank, size = get_model_parallel_rank(), get_model_parallel_world_size()
    writes = dist.get_rank(get_data_parallel_group()) == 0
    if is_main():
        prepare_directory(directory)
    dist.barrier()
    path = temporary_name(directory) / file_name(rank, size, suffix)
    tiles: dict[str, list[Tile]] = defaultdict(list)
    for tile in rank_tiles(model.args, model.layout, rank, size, path.name):
        tiles[tile.name].append(tile)
    own = {name: cut.region(rank, size) for name, cut in logical_cuts(model.args, model.layout).items()}
    announced = {tile.key: (dtype, tile.stored_shape()) for some in tiles.values() for tile in some}
    with TensorWriter(path, announced, rank_notes(rank, size)) if writes else nullcontext() as file:
        for name, whole in gathered(model):
            if file is None:
                continue
            for tile in tiles[name]:
                box = whole.view(region_shape(own[name]))[within(tile.region, own[name])]
                file.write(tile.key, tile.encode(box.to("cpu", dtype)))
    dist.barrier()
    if is_main():
        write_description(temporary_name(directory), model.args, model.layout.name)
        for name, source in carried.items():
            shutil.copyfile(source, temporary_name(directory) / name)
        publish_directory(directory)
    dist.barrier()


@torch.no_grad()
def gathered(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """This model-parallel rank's parameters by name, each gathered over the data-parallel ranks (a collective)."""
    show_masters(model)
    for name, parameter in model.named_parameters():
        yield name, parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
