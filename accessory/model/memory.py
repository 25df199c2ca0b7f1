"""How much memory a rank needs, and whether it has that much: known before anything is read or allocated."""

import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from math import prod
from pathlib import Path

import torch

from accessory.dtypes import at_least
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.logical import SCORE, LogicalModel, held_dtype
from accessory.model.moe.layouts import Layout
from accessory.parallel.cross_entropy import CHUNK
from accessory.parallel.mesh import Mesh
from accessory.settings import ParallelSection, Recompute

MOMENTS = 2
"""AdamW's moments of each parameter that trains, beside its gradient."""
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a GPU or of this machine; of the container, if that is limited to less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            there = min(there, int(Path(file).read_text()))
    return there


def weight_bytes(
    logical: LogicalModel, layout: Layout, model_parallel: int, dtype: torch.dtype, without_experts: bool = False
) -> float:
    """Bytes of one rank's weights, for a model that does not train."""
    shares = shares_of_rank(logical, layout, model_parallel, without_experts).items()
    return sum(prod(logical.shapes[name]) * held_dtype(name, dtype).itemsize * share for name, share in shares)


def check_memory(
    logical: LogicalModel,
    layout: Layout,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    *,
    trains: Collection[str] = (),
    frozen_dtype: torch.dtype | None = None,
    sharing: int = 1,
    beside: int = 0,
    slot_bytes: int | None = None,
) -> None:
    """Raise UserError if this rank's weights, gradients and moments do not fit; activations are not counted.

    Args:
        logical, layout, mesh: the model, how it is cut, and the ranks that hold it together.
        dtype: of what trains. frozen_dtype: of the rest; None: the same.
        sharing: how many ranks share the device's memory.
        beside: frozen parameters that each rank has whole beside the model, its encoders'.
        slot_bytes: bytes of experts on the device, if experts are offloaded; else None.
    """
    counts = {"train": 0.0, "quantised": 0.0, "frozen": 0.0}
    nbytes = dict(counts)
    for name, share in shares_of_rank(logical, layout, mesh.mp.size, slot_bytes is not None).items():
        kind = "train" if name in trains else "quantised" if name in logical.parts else "frozen"
        each = dtype.itemsize * (2 + MOMENTS) if kind == "train" else held_dtype(name, frozen_dtype or dtype).itemsize
        counts[kind] += logical.sizes[name] * share / mesh.dp_shard.size
        nbytes[kind] += prod(logical.shapes[name]) * each * share / mesh.dp_shard.size
    counts["frozen"] += beside
    nbytes["frozen"] += beside * (frozen_dtype or dtype).itemsize
    needed = sum(nbytes.values()) + (slot_bytes or 0)
    there = memory_of(device) / sharing
    if needed <= there:
        return
    kinds = {"train": "that train, with gradient and AdamW's moments", "quantised": "quantised", "frozen": "that do not"}
    each_kind = " and ".join(
        f"{counts[kind]:,.0f} parameters {words}, {nbytes[kind] / counts[kind]:.3g} bytes each"
        for kind, words in kinds.items()
        if counts[kind]
    )
    if slot_bytes:
        each_kind += f" and {slot_bytes / 2**30:,.1f} GiB of experts on the device"
    where = "the GPU" if device.type == "cuda" else "this machine"
    among = f" for {sharing} ranks" if sharing > 1 else ""
    raise UserError(
        f"the model does not fit: this rank's share is {each_kind}, {needed / 2**30:,.1f} GiB in all, and {where} has "
        f"{there * sharing / 2**30:,.1f} GiB{among}: cut it over more ranks, train less of it (tuning.lora), or hold it in "
        "fewer bits (a narrower precision, or quantised)"
    )


def shares_of_rank(
    logical: LogicalModel, layout: Layout, model_parallel: int, without_experts: bool = False
) -> dict[str, float]:
    """The share of each tensor that a model-parallel rank has, before data-parallel ranks shard it.

    ``without_experts``: leave out the experts' matrices, which are offloaded.
    """
    cuts, left_out = logical.cuts(layout), logical.of_experts if without_experts else ()
    return {
        name: 1.0 if cuts[name].dim_over(model_parallel) is None else 1 / model_parallel
        for name in logical.shapes
        if name not in left_out
    }


@dataclass(frozen=True)
class Footprint:
    """Bytes of a rank's memory in training, by use.

    Weights, gradients and moments are exact. The rest is an estimate: parameters that FSDP has gathered, with their
    gradients before these are scattered; the activations that backward needs, with those of the block at work.
    """

    weights: float
    gradients: float
    moments: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return sum(astuple(self))

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {size / 2**30:,.2f}" for kind, size in asdict(self).items())
        return f"about {self.total / 2**30:,.2f} GiB: {kinds}"


def footprint(
    logical: LogicalModel,
    layout: Layout,
    mesh: Mesh,
    parallel: ParallelSection,
    *,
    compute: torch.dtype,
    trains: Collection[str],
    tokens: int,
    accumulation: int,
    device_type: str,
    beside: int = 0,
    slot_bytes: int | None = None,
) -> Footprint:
    """The memory that a rank needs to train.

    Args:
        compute: dtype of forward and backward. trains: names of the tensors that train.
        tokens: most tokens of a micro-batch. accumulation: micro-batches of a step.
        beside, slot_bytes: as in ``check_memory``.
    """
    narrow, wide, args = compute.itemsize, at_least(compute).itemsize, logical.args
    shares = shares_of_rank(logical, layout, mesh.mp.size, slot_bytes is not None)
    own = {name: prod(logical.shapes[name]) * share for name, share in shares.items()}
    computed = {name: n * held_dtype(name, compute).itemsize for name, n in own.items()}
    trained = {name: n for name, n in own.items() if name in trains}
    frozen = sum(nbytes for name, nbytes in computed.items() if name not in trains)
    masters = wide * sum(trained.values()) / mesh.dp_shard.size
    block, trained_block = (
        sum(n for name, n in some.items() if name.startswith("layers.0.")) for some in (computed, trained)
    )
    gathered, gradients = 0.0, masters
    if mesh.dp_shard.size == 1:  # frozen ones are used as they lie
        computed = {name: n for name, n in computed.items() if name in trains}
        block = sum(n for name, n in computed.items() if name.startswith("layers.0."))
    if mesh.dp.size > 1 or narrow < wide:  # FSDP's: a block is gathered while the one before is computed
        everything = sum(computed.values())
        root = everything - args.n_layers * block
        at_a_time = root + 2 * block if parallel.data_parallel == "fsdp" else everything
        gathered = at_a_time + (narrow + wide) * trained_block
        if parallel.data_parallel != "fsdp" and accumulation > 1:
            gradients += wide * sum(trained.values())
    # of offloaded experts backward has an expert's gradients beside their sum
    summed = 2 * narrow * trained_block if slot_bytes is not None else 0
    saved = tokens * saved_bytes(args, mesh.mp.size, compute, "none")
    kept = args.n_layers * tokens * saved_bytes(args, mesh.mp.size, compute, parallel.recompute)
    vocabulary = own.get("output.weight", own.get(SCORE, 0.0)) / args.dim
    head = min(tokens, CHUNK[device_type]) * vocabulary * (narrow + wide)
    return Footprint(
        weights=masters + frozen / mesh.dp_shard.size + beside * narrow + (slot_bytes or 0),
        gradients=gradients,
        moments=MOMENTS * masters,
        gathered=gathered,
        activations=kept + 2 * saved + head + summed,  # what a block computes in backward is about as much again
    )


def saved_bytes(args: ModelArgs, model_parallel: int, compute: torch.dtype, recompute: Recompute) -> float:
    """Bytes that one block keeps of each token for backward, if all of it trains and experts get equally many tokens."""
    if recompute == "block":
        return compute.itemsize * args.dim
    queries, keys = args.n_heads * args.head_dim / model_parallel, max(1, args.n_kv_heads / model_parallel) * args.head_dim
    top_k = args.moe.num_experts_per_tok
    # the input of either norm; q, k, v and the output of attention; gate and up
    kept = 2 * args.dim + 2 * queries + 2 * keys + top_k * 2 * args.hidden_dim / model_parallel
    if recompute == "none":  # the outputs of the norms, and the experts' rows of them
        kept += 2 * args.dim + top_k * args.dim
    return compute.itemsize * kept
