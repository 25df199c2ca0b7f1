"""Which boxes of each logical tensor this rank holds, and whether its copy of them is the one that counts."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from accessory.model.logical import Cut, Region
from accessory.parallel.mesh import Mesh, is_sharded


@dataclass(frozen=True)
class Holding:
    """What this rank holds of a logical tensor.

    Attributes:
        boxes: pairs (rows of the local tensor, the box of the logical tensor that they hold); empty for an empty shard.
        is_owner: of the ranks that hold the same boxes, the first is their owner. Where each value must count once, as in
            the gradient norm or a saved file, only the owner's does.
    """

    boxes: tuple[tuple[slice, Region], ...]
    is_owner: bool


def holding_of(tensor: Tensor, cut: Cut, mesh: Mesh) -> Holding:
    """The holding of a parameter or buffer, cut over ``mesh.mp``; FSDP shards a DTensor on dim 0, like torch.chunk."""
    region = cut.region(mesh.mp.rank, mesh.mp.size)
    rows, is_first = len(tensor), mesh.dp.rank == 0
    first, last = 0, rows
    if is_sharded(tensor):
        each, is_first = -(-rows // mesh.dp_shard.size), mesh.dp_replicate.rank == 0
        first, last = (min(each * place, rows) for place in (mesh.dp_shard.rank, mesh.dp_shard.rank + 1))
    boxes = tuple(split_rows(region, first, last, merged=tensor.dim() < len(region)))
    return Holding(boxes, is_first and (cut.dim_over(mesh.mp.size) is not None or mesh.mp.rank == 0))


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
