"""Write the trained model as a converted directory."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from accessory.checkpoint.accessory import (
    FileFormat,
    prepare_directory,
    publish_directory,
    temporary_name,
    write_description,
    write_rank_file,
)
from accessory.console import is_main
from accessory.model.decoder import Decoder
from accessory.model.logical import Region, logical_cuts, region_shape
from accessory.parallel.fsdp import show_masters
from accessory.parallel.tensor import (
    get_data_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)


@torch.no_grad()
def save_model(model: Decoder, directory: Path, tokenizer: Path | None, dtype: torch.dtype, suffix: FileFormat) -> None:
    """Write one file per model-parallel rank, in the layout the model runs in. Every rank must call this.

    The directory appears under its name only when it is complete.
    """
    rank, size = get_model_parallel_rank(), get_model_parallel_world_size()
    writes = dist.get_rank(get_data_parallel_group()) == 0
    whole = gather(model, keep=writes, dtype=dtype)
    if is_main():
        prepare_directory(directory)
    dist.barrier()
    if writes:
        local = LocalTensors(model, whole)
        write_rank_file(temporary_name(directory), model.args, model.layout, rank, size, local, dtype, suffix)
    dist.barrier()
    if is_main():
        write_description(temporary_name(directory), model.args, model.layout, tokenizer)
        publish_directory(directory)
    dist.barrier()


def gather(model: Decoder, keep: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """This model-parallel rank's parameters on the CPU, gathered over data-parallel ranks one by one.

    Args:
        keep: whether this rank wants them; all data-parallel ranks must call.
    """
    whole = {}
    show_masters(model)
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            whole[name] = full.to("cpu", dtype)
    return whole


class LocalTensors:
    """What one model-parallel rank holds, as a source; a region outside its own part is an error."""

    def __init__(self, model: Decoder, whole: dict[str, Tensor]):
        rank, size = get_model_parallel_rank(), get_model_parallel_world_size()
        self._own = {name: cut.region(rank, size) for name, cut in logical_cuts(model.args, model.layout).items()}
        self._whole = whole

    def read(self, name: str, region: Region) -> Tensor:
        own = self._own[name]
        inside = tuple(slice(r.start - o.start, r.stop - o.start) for r, o in zip(region, own, strict=True))
        return self._whole[name].view(region_shape(own))[inside]
