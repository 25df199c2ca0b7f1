"""Make a model without a throw-away full copy: on the meta device first, then each rank fills only its own slices."""

import hashlib
import sys
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from accessory.dtypes import all_finite
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.logical import Adapters, Cut, Region, Source, divided_sizes, held_dtype, logical_cuts, region_shape
from accessory.model.moe.layouts import get_layout
from accessory.parallel.tensor import check_divides, get_model_parallel_rank, get_model_parallel_world_size
from accessory.parallel.watchdog import progressed


def build_model(
    args: ModelArgs,
    layout: str,
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernel: str = "auto",
    recompute: bool = False,
    adapters: Adapters | None = None,
    trains: Collection[str] | None = None,
    frozen_dtype: torch.dtype | None = None,
    shard: Callable[[Decoder], None] | None = None,
) -> Decoder:
    """Build a decoder cut over the current model-parallel group and fill it from ``source``.

    Args:
        layout: "mixtral" (expert) or "mixtral_sparse".
        source: where logical tensors are read from; each rank reads only its own regions.
        dtype: dtype of the parameters (the masters, if ``shard`` sets a narrower compute dtype); the router's are in fp32
            at least.
        adapters: what is added to which matrix; ``source`` must have their tensors too.
        trains: names of the parameters that train; None: all.
        frozen_dtype: dtype of the others, which need no masters; None: ``dtype``.
        shard: applied to the model while it is still on the meta device, e.g. to wrap it in FSDP.

    Raises:
        UserError: the model-parallel size does not divide what the layout cuts.
    """
    cut_by = get_layout(layout)
    check_divides(f"layout '{layout}'", get_model_parallel_world_size(), divided_sizes(args, cut_by))
    with torch.device("meta"):
        model = Decoder(args, cut_by, kernel, recompute)
        model.adapt(adapters or {})
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trains is None or name in trains
        kept = dtype if parameter.requires_grad else frozen_dtype or dtype
        parameter.data = parameter.data.to(held_dtype(name, kept))
    if shard is not None:
        shard(model)
    model.to_empty(device=device)
    fill(model, source)
    return model


@torch.no_grad()
def fill(model: Decoder, source: Source) -> None:
    """Copy the logical tensors of ``source`` into parameters and buffers; an FSDP-sharded parameter reads only its rows.

    Values that are no numbers are told, not refused: what to do about them is the user's to decide.
    """
    cuts = logical_cuts(model.args, model.layout, model.adapters)
    for name, parameter in model.named_tensors():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        for rows, piece in own_regions(cuts[name], parameter):
            local[rows] = source.read(name, piece).reshape(local[rows].shape).to(local)
            progressed()
        if not all_finite(local):
            print(f"accessory: warning: {name} holds NaN or infinite values", file=sys.stderr)


def own_regions(cut: Cut, parameter: Tensor) -> Iterator[tuple[slice, Region]]:
    """What this rank holds of a parameter: rows of its local part, and the logical box that stands there."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    first = _first_row(parameter)
    region = cut.region(get_model_parallel_rank(), get_model_parallel_world_size())
    yield from split_rows(region, first, first + len(local), merged=parameter.dim() < len(region))


def _first_row(parameter: Tensor) -> int:
    """Where this rank's rows of an FSDP-sharded parameter begin (FSDP cuts dim 0 as torch.chunk does)."""
    if not isinstance(parameter, DTensor):
        return 0
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            each = -(-parameter.shape[0] // parameter.device_mesh.size(axis))
            return min(each * parameter.device_mesh.get_local_rank(axis), parameter.shape[0])
    return 0


def split_rows(region: Region, first: int, last: int, merged: bool) -> Iterator[tuple[slice, Region]]:
    """Rows ``first`` to ``last`` of the tensor that ``region`` is stored as, as boxes of the logical tensor.

    ``merged``: the region [e, R, ...] is stored with its first two dimensions as one, [e * R, ...]. Yields (the rows
    counted from ``first``, the logical box that belongs there).
    """
    if not merged:
        if last > first:
            yield slice(0, last - first), (slice(region[0].start + first, region[0].start + last), *region[1:])
        return
    experts, rows, *columns = region
    height = rows.stop - rows.start
    for index in range(first // height, -(-last // height)):
        low, high = max(first, index * height), min(last, (index + 1) * height)
        expert = experts.start + index
        box = slice(rows.start + low - index * height, rows.start + high - index * height)
        yield slice(low - first, high - first), (slice(expert, expert + 1), box, *columns)


class RandomWeights:
    """Initial weights as a function of (seed, logical name, place): the same for every layout and parallel size.

    Matrices are normal with standard deviation 0.02, norms are one (transformers' defaults for Mixtral); of an adapter,
    A is such a matrix (the reference cuts its normal at +-2, a hundred deviations: at nothing), B and the bias are zero.
    Numbers are drawn on the CPU in fp32, in blocks of rows with a generator each, so a rank draws only the blocks it
    needs.
    """

    BLOCK = 2**20  # numbers per block at most; changing it changes every model made from a seed
    STD = 0.02

    def __init__(self, cuts: dict[str, Cut], seed: int):
        self.shapes = {name: cut.shape for name, cut in cuts.items()}
        self.seed = seed

    def read(self, name: str, region: Region) -> Tensor:
        out = torch.empty(region_shape(region))
        if name.endswith(("lora_b", "bias")):
            return out.zero_()
        if out.dim() == 1:
            return out.fill_(1.0)
        matrices = out if out.dim() == 3 else out.unsqueeze(0)
        first_matrix = region[0].start if out.dim() == 3 else 0
        rows, columns = region[-2:]
        matrix_rows, width = self.shapes[name][-2:]
        height = min(max(1, self.BLOCK // width), matrix_rows)
        for index, matrix in enumerate(matrices):
            for block in range(rows.start // height, -(-rows.stop // height)):
                low, high = max(rows.start, block * height), min(rows.stop, (block + 1) * height)
                values = self._block(f"{name}/{first_matrix + index}/{block}", height, width)
                matrix[low - rows.start : high - rows.start] = values[low - block * height : high - block * height, columns]
        return out

    def _block(self, key: str, height: int, width: int) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.empty(height, width).normal_(0.0, self.STD, generator=generator)
