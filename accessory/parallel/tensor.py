"""Tensor parallelism: fairscale's model-parallel groups and layers, with four corrections (fairscale 0.4.13).

World = data parallel x model parallel, model parallel innermost: ranks r*mp .. r*mp+mp-1 hold one copy of the model.

What is corrected, each shown by a test:

- ``_reduce`` works in place, so the backward of "copy to" overwrites a gradient that others still read, and the forward
  of "reduce from" overwrites a leaf;
- ``_reduce`` hands non-contiguous tensors to gloo, which then reads and writes the wrong memory (``_gather`` fails on
  expanded ones);
- ``_initialize_affine_weight`` builds the full weight on every rank, only to keep a slice: here parameters are made
  empty (on the meta device if that is the default) and filled slice by slice by ``accessory.model.build``;
- layers ignore the default device and dtype.
"""

import contextlib
import io
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as groups
from fairscale.nn.model_parallel import layers, mappings
from fairscale.nn.model_parallel.initialize import (
    get_data_parallel_group,
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_world_size,
)
from torch import Tensor, nn

from accessory.errors import UserError
from accessory.parallel.adapter import Adaptable, Adapter, add_parameters, dropped
from accessory.parallel.watchdog import LONGEST_COLLECTIVE_S

__all__ = [
    "ColumnParallelLinear",
    "ParallelEmbedding",
    "RowParallelLinear",
    "copy_to_model_parallel_region",
    "gather_from_model_parallel_region",
    "get_data_parallel_group",
    "get_model_parallel_group",
    "get_model_parallel_rank",
    "get_model_parallel_world_size",
    "initialize_groups",
    "reduce_from_model_parallel_region",
    "use_model_parallel_group",
]


def _reduce(ctx: Any, x: Tensor) -> Tensor:
    if get_model_parallel_world_size() == 1:
        return x
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=get_model_parallel_group())
    return out


def _gather(x: Tensor) -> Tensor:
    if get_model_parallel_world_size() == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(get_model_parallel_world_size())]
    dist.all_gather(parts, x, group=get_model_parallel_group())
    return torch.cat(parts, dim=-1)


def _leave_uninitialised(*_: Any, **__: Any) -> None:
    return None


mappings._reduce = _reduce
mappings._gather = _gather
layers._initialize_affine_weight = _leave_uninitialised


def copy_to_model_parallel_region(x: Tensor) -> Tensor:
    """Enter the region where ranks compute different parts: identity forward, all-reduce backward.

    For what is whole on every rank but whose gradient is partial on each.
    """
    return mappings.copy_to_model_parallel_region(x) if get_model_parallel_world_size() > 1 else x


def reduce_from_model_parallel_region(x: Tensor) -> Tensor:
    """Leave the region: all-reduce forward (partial sums become the whole), identity backward."""
    return mappings.reduce_from_model_parallel_region(x) if get_model_parallel_world_size() > 1 else x


def gather_from_model_parallel_region(x: Tensor) -> Tensor:
    """Leave the region: all-gather along the last dimension forward, own slice backward."""
    return mappings.gather_from_model_parallel_region(x) if get_model_parallel_world_size() > 1 else x


def _on_default_device(layer: nn.Module) -> None:
    """fairscale allocates with ``torch.Tensor(...)``; give the parameter the default device and dtype instead."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    layer.weight = nn.Parameter(torch.empty(weight.shape))


class ColumnParallelLinear(Adaptable, layers.ColumnParallelLinear):
    """``x @ weight.T`` with ``weight`` [out, in] cut on dim 0: the output stays cut.

    The caller enters the region (``copy_to_model_parallel_region``) once for all the layers that share an input.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False, gather_output=False)
        _on_default_device(self)

    def forward(self, x: Tensor, draw: Tensor | None = None) -> Tensor:
        y, low = F.linear(x, self.weight, self.bias), self.low_rank(x, draw)
        return y if low is None else y + F.linear(low, self.lora_b)

    def low_rank(self, x: Tensor, draw: Tensor | None = None) -> Tensor | None:
        """``scaling * A dropout(x)`` [..., R], whole on every rank; None without LoRA. ``draw`` is dropout's."""
        if not self.adapter.rank:
            return None
        lora_a = copy_to_model_parallel_region(self.lora_a)
        return F.linear(dropped(x, self.adapter, draw), lora_a) * self.adapter.scaling


class RowParallelLinear(Adaptable, layers.RowParallelLinear):
    """``x @ weight.T`` with ``weight`` [out, in] cut on dim 1 and ``x`` cut likewise: partial products are summed."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False, input_is_parallel=True)
        _on_default_device(self)

    def forward(self, x: Tensor, draw: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.weight)
        if self.adapter.rank:
            x = dropped(x, self.adapter, draw, first_column=get_model_parallel_rank() * x.shape[-1])
            low = F.linear(x, self.lora_a) * self.adapter.scaling  # this rank's part of A x
            y = y + F.linear(low, copy_to_model_parallel_region(self.lora_b))
        y = reduce_from_model_parallel_region(y)
        return y if self.bias is None else y + self.bias


class ParallelEmbedding(Adaptable, layers.ParallelEmbedding):
    """Token embedding with ``weight`` [V, D] cut on dim 1: each rank looks up its columns, which are gathered.

    As a matrix it maps V to D, so its adapter has ``lora_a`` [R, V] (whole) and ``lora_b`` [D, R]; it has no dropout.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__(num_embeddings, embedding_dim)
        _on_default_device(self)

    def adapt(self, matrix: str, adapter: Adapter) -> None:
        self.adapter = adapter
        inner, out = self.weight.shape
        add_parameters(self, matrix, adapter, out, inner)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.embedding(tokens, self.weight)
        if self.adapter.rank:
            low = F.embedding(tokens, copy_to_model_parallel_region(self.lora_a).T) * self.adapter.scaling
            x = x + F.linear(low, self.lora_b)
        return gather_from_model_parallel_region(x)


def initialize_groups(model_parallel: int) -> None:
    """Cut the world into model-parallel groups of ``model_parallel`` neighbours and the data-parallel groups across them.

    Raises:
        UserError: ``model_parallel`` does not divide the world size.
    """
    world = dist.get_world_size()
    if world % model_parallel:
        allowed = [n for n in range(1, world + 1) if world % n == 0]
        raise UserError(
            f"parallel.model_parallel {model_parallel} does not divide the {world} processes: use one of {allowed}"
        )
    groups.destroy_model_parallel()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints three lines
        groups.initialize_model_parallel(model_parallel)
    for group in (groups.get_data_parallel_group(), groups.get_model_parallel_group()):  # they take torch's default
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=LONGEST_COLLECTIVE_S), group)


def use_model_parallel_group(group: dist.ProcessGroup | None) -> None:
    """Let the ranks of ``group`` hold one model together, each a data-parallel group of its own; None: one rank alone."""
    alone = [dist.get_rank()]
    groups.destroy_model_parallel()
    groups._DATA_PARALLEL_GROUP = dist.new_group(alone, use_local_synchronization=True)
    groups._MODEL_PARALLEL_GROUP = group or dist.new_group(alone, use_local_synchronization=True)


def check_divides(what: str, model_parallel: int, sizes: dict[str, int]) -> None:
    """Raise a UserError that lists the allowed sizes unless ``model_parallel`` divides every one of ``sizes``."""
    failing = [f"{name} {size}" for name, size in sizes.items() if model_parallel < 1 or size % model_parallel]
    if failing:
        raise UserError(
            f"{what}: model-parallel size {model_parallel} does not divide {', '.join(failing)}: "
            f"use one of {allowed_sizes(sizes)}"
        )


def allowed_sizes(sizes: dict[str, int]) -> list[int]:
    """The model-parallel sizes that divide every one of ``sizes``."""
    return [n for n in range(1, min(sizes.values()) + 1) if not any(size % n for size in sizes.values())]
