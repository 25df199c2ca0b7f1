"""Build a model without a full copy: on the meta device first, then each rank allocates and fills only its own slices."""

import hashlib
import sys
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from accessory.console import listed
from accessory.dtypes import all_finite
from accessory.errors import UserError
from accessory.model.codecs import is_part
from accessory.model.decoder import Decoder
from accessory.model.holdings import holding_of
from accessory.model.logical import LogicalModel, Region, Source, check_divides, held_dtype, region_shape
from accessory.model.moe.layouts import Layout
from accessory.model.moe.offload.plan import OffloadPlan, offload_experts, place_experts
from accessory.parallel.mesh import ONE_RANK, Mesh, local_part
from accessory.parallel.watchdog import progressed
from accessory.settings import Recompute


def build_model(
    logical: LogicalModel,
    layout: Layout,
    source: Source,
    *,
    mesh: Mesh = ONE_RANK,
    dtype: torch.dtype,
    device: torch.device,
    kernel: str = "auto",
    recompute: Recompute = "none",
    trains: Collection[str] | None = None,
    frozen_dtype: torch.dtype | None = None,
    shard: Callable[[Decoder], None] | None = None,
    offload: OffloadPlan | None = None,
    refuse_damaged: bool = False,
) -> Decoder:
    """Build a decoder cut over ``mesh`` and fill it from ``source``.

    Args:
        logical: the model's tensors.
        source: where their values are read from; each rank reads only its own boxes.
        mesh: default: this rank alone.
        dtype: of the parameters (the masters, if ``shard`` sets a narrower compute dtype); the router's are at least fp32.
        trains: names of the parameters that train; None: all.
        frozen_dtype: of the other parameters, which need no masters; None: ``dtype``.
        shard: applied while the model is still on the meta device, e.g. to wrap it in FSDP.
        offload: where the experts are kept, if not on ``device``.
        refuse_damaged: raise UserError for NaN or infinite values, rather than only warn.

    Raises:
        UserError: the model-parallel size does not divide what the layout cuts; see ``refuse_damaged``.
    """
    check_divides(logical.args, layout, mesh.mp.size)
    model = model_without_weights(logical, layout, mesh, dtype, kernel, recompute, trains, frozen_dtype)
    if offload is not None:
        offload_experts(model, offload, device, guesses=shard is None)
    if shard is not None:
        shard(model)
    model.holdings = {name: holding_of(tensor, model.cuts[name], mesh) for name, tensor in model.named_tensors()}
    model.to_empty(device=device)
    damaged = mesh.world.gather(fill(model, source))
    if damaged and refuse_damaged:
        raise UserError(
            f"model.checkpoint: {listed(damaged)} hold NaN or infinite values (accessory inspect names the files): get the "
            "checkpoint anew, or set model.strict=false to train on it as it is"
        )
    if damaged and mesh.world.rank == 0:
        print(f"accessory: warning: {listed(damaged, None)} hold NaN or infinite values", file=sys.stderr)
    if offload is not None and offload.loads:
        place_experts(model, offload.loads)
    return model


def model_without_weights(
    logical: LogicalModel,
    layout: Layout,
    mesh: Mesh,
    dtype: torch.dtype,
    kernel: str = "auto",
    recompute: Recompute = "none",
    trains: Collection[str] | None = None,
    frozen_dtype: torch.dtype | None = None,
) -> Decoder:
    """The decoder on the meta device, without memory for its weights; arguments as for ``build_model``."""
    with torch.device("meta"):
        model = Decoder(logical, layout, mesh, kernel, recompute)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not is_part(name) and (trains is None or name in trains)
        kept = dtype if parameter.requires_grad else frozen_dtype or dtype
        parameter.data = parameter.data.to(held_dtype(name, kept))
    return model


@torch.no_grad()
def fill(model: Decoder, source: Source) -> list[str]:
    """Copy the logical tensors of ``source`` into parameters and buffers; an FSDP-sharded parameter reads only its rows.

    Returns:
        The names of the tensors in which this rank found NaN or infinite values.
    """
    damaged = []
    for name, parameter in model.named_tensors():
        local = local_part(parameter)
        for rows, box in model.holdings[name].boxes:
            # moved in its stored dtype: the device converts it faster than the host
            local[rows] = source.read(name, box).reshape(local[rows].shape).to(local.device)
            progressed()
        if not all_finite(local):
            damaged.append(name)
    return damaged


class RandomWeights:
    """Initial weights as a function of (seed, logical name, place): the same for every layout and parallel size.

    Matrices are normal with standard deviation 0.02, and norms are one (transformers' defaults for Mixtral). An adapter's A
    is such a matrix; its B and bias are zero. Numbers are drawn on the CPU in fp32, in blocks of rows with a generator each,
    so that a rank draws only the blocks it needs.
    """

    BLOCK = 2**20  # numbers per block at most; changing it changes every model made from a seed
    STD = 0.02

    def __init__(self, logical: LogicalModel, seed: int):
        self.logical, self.seed = logical, seed

    def read(self, name: str, region: Region) -> Tensor:
        out = torch.empty(region_shape(region))
        if name.endswith(("lora_b", "bias")):
            return out.zero_()
        if out.dim() == 1:
            return out.fill_(1.0)
        matrices = out if out.dim() == 3 else out.unsqueeze(0)
        first_matrix = region[0].start if out.dim() == 3 else 0
        rows, columns = region[-2:]
        matrix_rows, width = self.logical.shapes[name][-2:]
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
