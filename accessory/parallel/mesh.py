"""The device mesh: the ranks of a job, along the axes that a model is cut over."""

import contextlib
import io
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fairscale
from torch import Tensor

from accessory.errors import UserError
from accessory.settings import LONGEST_COLLECTIVE_S


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is an FSDP-sharded DTensor; found without importing torch's DTensor module, which takes half a second."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of an FSDP-sharded tensor; a plain tensor is its own."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


@dataclass(frozen=True)
class Axis:
    """This rank's place in a group of ``size`` ranks.

    Attributes:
        group: their process group; None: this rank is alone.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Axis":
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    def all_reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """``x``, reduced in place over the axis (a collective)."""
        if self.size > 1:
            dist.all_reduce(x, operation, group=self.group)
        return x

    def gather(self, names: list[str]) -> list[str]:
        """The names given by any rank of the axis, in order of ranks, without repeats (a collective)."""
        everyones = [names] * self.size
        if self.size > 1:
            dist.all_gather_object(everyones, names, group=self.group)
        return list(dict.fromkeys(name for some in everyones for name in some))

    def broadcast(self, x: Tensor) -> Tensor:
        """``x``, overwritten by that of the first rank of the axis (a collective)."""
        if self.size > 1:
            dist.broadcast(x, group=self.group, group_src=0)
        return x


@dataclass(frozen=True)
class Mesh:
    """The axes of a model: world = dp_replicate x dp_shard x mp, mp innermost. Default: one rank alone.

    With 8 ranks, mp 2 and shards over 2, rank r is at

        dp_replicate r // 4    dp_shard r // 2 % 2    mp r % 2    dp r // 2, the two data-parallel axes as one

    Each model carries its mesh, so models with different meshes can live in one process.

    Attributes:
        mp: model parallel: ranks that hold one copy of the model together, a slice each, and see the same tokens.
        dp_shard: ranks over which FSDP shards what one model-parallel rank has.
        dp_replicate: ranks that hold the same shards (HSDP's copies).
        dp: all data-parallel ranks, which see different tokens. world: all ranks.
    """

    mp: Axis = Axis()
    dp_shard: Axis = Axis()
    dp_replicate: Axis = Axis()
    dp: Axis = Axis()
    world: Axis = Axis()


ONE_RANK = Mesh()


def make_mesh(model_parallel: int = 1, shard_size: int | None = None) -> Mesh:
    """Cut all ranks into a mesh (a collective).

    fairscale makes the groups: its ``get_model_parallel_group`` returns that of the mesh made last.

    Args:
        model_parallel: size of ``mp``. shard_size: of ``dp_shard``; None: all data-parallel ranks.

    Raises:
        UserError: the sizes do not divide the number of ranks.
    """
    size = dist.get_world_size()
    shard_size = plan_mesh(size, model_parallel, shard_size).dp_shard.size
    fairscale.destroy_model_parallel()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints three lines
        fairscale.initialize_model_parallel(model_parallel)
    mp, dp = (_axis(group) for group in (fairscale.get_model_parallel_group(), fairscale.get_data_parallel_group()))
    world = Axis(dist.get_rank(), size, dist.group.WORLD)
    if shard_size == dp.size:
        return Mesh(mp, dp, Axis(), dp, world)
    if shard_size == 1:
        return Mesh(mp, Axis(), dp, dp, world)
    ranks = dist.get_process_group_ranks(dp.group)
    first, place = dp.rank // shard_size * shard_size, dp.rank % shard_size
    neighbours, counterparts = ranks[first : first + shard_size], ranks[place::shard_size]
    shard, replicate = (_axis(dist.new_group(some, use_local_synchronization=True)) for some in (neighbours, counterparts))
    return Mesh(mp, shard, replicate, dp, world)


def plan_mesh(world: int, model_parallel: int = 1, shard_size: int | None = None) -> Mesh:
    """The mesh of the first of ``world`` ranks, with sizes but no process groups: no other rank is needed to make it.

    Raises:
        UserError: the sizes do not divide the number of ranks.
    """
    _check_size("parallel.model_parallel", model_parallel, f"{world} processes", world)
    data_parallel = world // model_parallel
    shard_size = shard_size or data_parallel
    _check_size("parallel.shard_size", shard_size, f"{data_parallel} data-parallel ranks", data_parallel)
    sizes = (model_parallel, shard_size, data_parallel // shard_size, data_parallel, world)
    return Mesh(*(Axis(0, size) for size in sizes))


def mesh_of(model_parallel_group: dist.ProcessGroup | None) -> Mesh:
    """The mesh of a model that the ranks of a group hold together, without data parallelism; None: this rank alone."""
    mp = Axis.of(model_parallel_group) if model_parallel_group else Axis()
    return Mesh(mp=mp, world=mp)


def _axis(group: dist.ProcessGroup) -> Axis:
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before torch 2.14
    set_timeout(timedelta(seconds=LONGEST_COLLECTIVE_S), group)  # it has taken torch's default
    return Axis.of(group)


def _check_size(setting: str, size: int, of: str, total: int) -> None:
    if total % size:
        allowed = [n for n in range(1, total + 1) if total % n == 0]
        raise UserError(f"{setting} {size} does not divide the {of}: use one of {allowed}")
