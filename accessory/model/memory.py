"""Whether a rank's share of a model fits into the memory there is: told before anything is read or made."""

import os
from collections.abc import Collection
from contextlib import suppress
from math import prod
from pathlib import Path

import torch

from accessory.errors import UserError
from accessory.model.logical import LogicalModel, held_dtype
from accessory.model.moe.layouts import Layout
from accessory.parallel.mesh import Mesh

MOMENTS = 2
"""AdamW's, of each parameter that trains, beside its gradient."""
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine, less where a container is given less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            there = min(there, int(Path(file).read_text()))
    return there


def share_of_a_rank(logical: LogicalModel, layout: Layout, model_parallel: int, dtype: torch.dtype) -> float:
    """Bytes of one rank's part of a model that is only used."""
    cuts = logical.cuts(layout).items()
    return sum(
        prod(cut.shape) * held_dtype(name, dtype).itemsize / (1 if cut.dim_over(model_parallel) is None else model_parallel)
        for name, cut in cuts
    )


def check_memory(
    logical: LogicalModel,
    layout: Layout,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    trains: Collection[str] = (),
    frozen_dtype: torch.dtype | None = None,
    sharing: int = 1,
) -> None:
    """Raise UserError if what this rank must hold of a model all the time cannot be there; activations are not counted.

    Args:
        logical, layout: the model, and how it is cut. mesh: the ranks that hold it together.
        dtype: of what trains; frozen_dtype: of the rest, None: the same.
        sharing: how many ranks share the device's memory.
    """
    counts = {"train": 0.0, "quantised": 0.0, "frozen": 0.0}
    nbytes = dict(counts)
    for name, cut in logical.cuts(layout).items():
        kind = "train" if name in trains else "quantised" if name in logical.parts else "frozen"
        parts = mesh.dp_shard.size * (1 if cut.dim_over(mesh.mp.size) is None else mesh.mp.size)
        each = dtype.itemsize * (2 + MOMENTS) if kind == "train" else held_dtype(name, frozen_dtype or dtype).itemsize
        counts[kind] += logical.sizes[name] / parts
        nbytes[kind] += prod(logical.shapes[name]) * each / parts
    needed = sum(nbytes.values())
    there = memory_of(device) / sharing
    if needed <= there:
        return
    kinds = {"train": "that train, with gradient and AdamW's moments", "quantised": "quantised", "frozen": "that do not"}
    each_kind = " and ".join(
        f"{counts[kind]:,.0f} parameters {words}, {nbytes[kind] / counts[kind]:.3g} bytes each"
        for kind, words in kinds.items()
        if counts[kind]
    )
    where = "the GPU" if device.type == "cuda" else "this machine"
    among = f" for {sharing} ranks" if sharing > 1 else ""
    raise UserError(
        f"the model does not fit: this rank's share is {each_kind}, {needed / 2**30:,.1f} GiB in all, and {where} has "
        f"{there * sharing / 2**30:,.1f} GiB{among}: cut it over more ranks, train less of it (tuning.lora), or hold it in "
        "fewer bits (a narrower precision, or quantised)"
    )
