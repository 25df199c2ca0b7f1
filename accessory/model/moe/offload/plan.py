"""How many of each layer's experts are on the device, and a model that has the others elsewhere."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accessory.config import read_bytes
from accessory.console import in_bytes
from accessory.errors import UserError
from accessory.model.logical import LogicalModel, held_dtype, region_shape
from accessory.model.memory import memory_of
from accessory.model.moe.layouts import Layout
from accessory.model.moe.offload.experts import OffloadedExperts
from accessory.model.moe.offload.guess import Guess
from accessory.model.moe.offload.lane import Lane
from accessory.model.moe.offload.loads import read_loads
from accessory.model.moe.offload.records import DiskStore, HostStore, Record
from accessory.model.moe.offload.slots import Policy, Slots
from accessory.settings import OffloadSection

if TYPE_CHECKING:
    from accessory.model.decoder import Decoder

KERNELS = ("auto", "looped", "reference")
"""Those that ask for experts one by one."""


@dataclass(frozen=True)
class OffloadPlan:
    """What of the experts is where.

    Attributes:
        slots: of each layer on a rank's device. of: how many experts of a layer a rank has.
        slot_bytes: of all of them. host_bytes: of all experts.
        guesses: whether a layer has the next one's experts brought.
        loads: of each layer how often a token uses each expert, if that is known.
    """

    slots: int
    of: int
    slot_bytes: int
    host_bytes: int
    policy: Policy
    guesses: bool
    disk: Path | None
    loads: list[list[float]] | None

    def __str__(self) -> str:
        where = f"on the disk of {self.disk}" if self.disk else "in host memory"
        return (
            f"{self.slots} of {self.of} experts of each layer on the device, {in_bytes(self.slot_bytes)}; "
            f"all of them {where}, {in_bytes(self.host_bytes)}"
        )


def decoded_bytes(logical: LogicalModel, dtype: torch.dtype) -> int:
    """Of the numbers of two matrices, if experts are quantised: they are made for a product."""
    return 2 * logical.args.dim * logical.args.hidden_dim * dtype.itemsize if logical.codecs else 0


def plan_offload(
    section: OffloadSection,
    logical: LogicalModel,
    layout: Layout,
    model_parallel: int,
    dtype: torch.dtype,
    others: float,
    kernel: str = "auto",
    trains: Collection[str] = (),
) -> OffloadPlan:
    """What ``section`` makes of a model's experts, held in ``dtype`` if they are not quantised.

    Args:
        others: bytes of all else that a rank has on its device. trains: names of what trains.

    Raises:
        UserError: the memory does not suffice for as many experts as a token takes, or there are not so many; experts train;
            the kernel takes all of them at once; the loads are of another model.
    """
    if trained := sorted(set(logical.of_experts) & set(trains)):
        raise UserError(f"model.offload: {trained[0]} trains, and stays on the device: train adapters (tuning.lora)")
    if kernel not in KERNELS:
        raise UserError(f"model.offload: kernel '{kernel}' takes all experts at once; set model.kernel=looped, or auto")
    args, size = logical.args, model_parallel
    cuts = logical.cuts(layout)
    here = {name: region_shape(cuts[name].region(0, size)) for name in logical.of_experts}
    of = next(iter(here.values()))[0]
    of_layer = {name: shape for name, shape in here.items() if name.startswith("layers.0.")}
    each = Record({name: (shape[1:], held_dtype(name, dtype)) for name, shape in of_layer.items()}).nbytes
    least = min(args.moe.num_experts_per_tok, of)
    if section.experts is not None:
        slots, top_k, most = section.experts, args.moe.num_experts_per_tok, args.moe.num_experts
        if not top_k <= slots <= most:
            raise UserError(
                f"offload.experts {slots}: a token takes {top_k} of a layer's {most}; name a number from {top_k} to {most}"
            )
    else:
        assert section.device_memory  # the section has checked
        memory = read_bytes(section.device_memory, "offload.device_memory")
        others += decoded_bytes(logical, dtype)
        slots = int((memory - others) // (args.n_layers * each))
        if slots < least:
            needed = others + least * args.n_layers * each
            raise UserError(
                f"offload.device_memory {section.device_memory}: with {least} experts of each layer, as many as a token "
                f"takes, {in_bytes(needed)} are needed; name that or more, lower max_seq_len, or quantise the model"
            )
    slots, total = min(slots, of), args.n_layers * each
    disk = Path(section.disk) if section.disk else None
    loads = read_loads(Path(section.loads), args) if section.loads else None
    return OffloadPlan(slots, of, slots * total, of * total, section.policy, section.prefetch == "speculative", disk, loads)


def offload_experts(model: "Decoder", plan: OffloadPlan, device: torch.device, guesses: bool) -> None:
    """Give a model on the meta device, whose tensors have their dtypes, its experts elsewhere; they are yet to be filled.

    ``guesses``: only where each layer can be asked at any time, unlike parameters that are gathered for their layer.

    Raises:
        UserError: the machine has no room for them.
    """
    if not plan.disk and plan.host_bytes > (there := memory_of(torch.device("cpu"))):
        raise UserError(
            f"offload: {in_bytes(plan.host_bytes)} of experts do not fit into this machine's {in_bytes(there)} of memory: "
            "quantise the model, or name a directory on a disk (offload.disk)"
        )
    lane, blocks = Lane(device), list[Any](model.layers)
    for block in blocks:
        experts = block.feed_forward.experts
        record = experts.record()
        if plan.disk:
            store: DiskStore | HostStore = DiskStore(plan.disk, plan.of, record.nbytes, device)
        else:
            store = HostStore(plan.of, record.nbytes, device)
        experts.offload(OffloadedExperts(record, store, Slots(plan.slots, plan.policy), lane, device))
    if guesses and plan.guesses:
        for block, following in pairwise(blocks):
            Guess(block, following)


def place_experts(model: "Decoder", loads: list[list[float]]) -> None:
    """Bring those that tokens use most, now that the model is filled."""
    for block, of_layer in zip(list[Any](model.layers), loads, strict=True):
        local = block.feed_forward.dispatcher.local_experts
        offloaded: OffloadedExperts = block.feed_forward.experts.offloaded
        offloaded.bring(offloaded.slots.place(of_layer[local.start : local.stop]))
