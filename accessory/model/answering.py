"""What a model that answers takes of a device, and how many of its experts fit beside that.

What is allocated, what ``inspect --fit`` prints and what ``plan`` prints go by this.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from accessory.console import in_bytes
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.logical import LogicalModel, check_divides
from accessory.model.memory import saved_bytes, weight_bytes
from accessory.model.moe.layouts import Layout
from accessory.model.moe.offload.plan import OffloadPlan, decoded_bytes, plan_offload
from accessory.settings import OffloadSection, QuantiseSection

GPU_PAGE = 256
"""Tokens of a page of the cache: the smallest that the GPU's kernel takes."""
CHUNK_TOKENS = 512
"""Of prompts in a step."""
USUAL_TOKENS = 4096
"""Of a prompt and its answer, where nothing is said."""
WAYS = (None, *(QuantiseSection(name, name) for name in ("int8", "nf4", "int3")))
"""To hold a model that is not quantised yet."""


def in_pages(tokens: int) -> int:
    """So many tokens, as whole pages of the cache hold them on any device."""
    return -(-tokens // GPU_PAGE) * GPU_PAGE


def cache_bytes_of_token(args: ModelArgs, size: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token, on one of ``size`` ranks."""
    return 2 * args.n_layers * max(1, args.n_kv_heads // size) * args.head_dim * dtype.itemsize


def beside_experts(
    logical: LogicalModel, layout: Layout, size: int, dtype: torch.dtype, max_seq_len: int, encoders: int = 0
) -> dict[str, float]:
    """Bytes that one of ``size`` ranks has on its device beside experts, by kind, while it answers one request.

    They are the other weights, the keys and values of a sequence of ``max_seq_len``, and what a step makes.

    Args:
        encoders: numbers of what it sees with, whole on every rank.
    """
    args = logical.args
    return {
        "weights": weight_bytes(logical, layout, size, dtype, without_experts=True) + encoders * dtype.itemsize,
        "cache": (in_pages(max_seq_len) + GPU_PAGE) * cache_bytes_of_token(args, size, dtype),
        # of a block at work, and what it makes of that
        "step": 2 * CHUNK_TOKENS * saved_bytes(args, size, dtype, "none"),
    }


def plan_answers(
    section: OffloadSection,
    logical: LogicalModel,
    layout: Layout,
    size: int,
    dtype: torch.dtype,
    max_seq_len: int,
    encoders: int = 0,
) -> OffloadPlan:
    """Where the experts are of a model that answers, cut into ``size`` parts; in a given memory it answers one at a time.

    ``encoders``: see ``beside_experts``.

    Raises:
        UserError: that is too little (see ``plan_offload``).
    """
    others = sum(beside_experts(logical, layout, size, dtype, max_seq_len, encoders).values())
    return plan_offload(section, logical, layout, size, dtype, others)


@dataclass(frozen=True)
class Fit:
    """A way to hold a model that answers, in bf16 what is not quantised, and what of it a card has room for.

    Attributes:
        quantise: the way. plan: where its experts are; None: the card has no room for as many as a token takes.
        memory: bytes on the device by kind; "experts" are those on it.
    """

    quantise: QuantiseSection | None
    plan: OffloadPlan | None
    memory: dict[str, float]

    def __str__(self) -> str:
        """How many experts, and the memory by kind."""
        if self.plan is None:
            return f"too little: {in_bytes(sum(self.memory.values()))} are needed"
        kinds = " + ".join(f"{kind} {in_bytes(nbytes)}" for kind, nbytes in self.memory.items())
        return f"{self.plan.slots} of {self.plan.of}: {kinds}"


def fits_of(args: ModelArgs, layout: Layout, size: int, memory: float, max_seq_len: int, encoders: int = 0) -> Iterator[Fit]:
    """Each way to hold a model, cut into ``size`` parts, in so many bytes of a rank; as it is, if it is quantised."""
    for quantise in (args.quantise,) if args.quantise else WAYS:
        try:
            logical = LogicalModel(replace(args, quantise=quantise))
            check_divides(logical.args, layout, size)
        except UserError:  # blocks do not come out even
            continue
        kinds = beside_experts(logical, layout, size, torch.bfloat16, max_seq_len, encoders)
        kinds["step"] += decoded_bytes(logical, torch.bfloat16)
        section, plan = OffloadSection(device_memory=f"{int(memory)}B"), None
        try:
            plan = plan_answers(section, logical, layout, size, torch.bfloat16, max_seq_len, encoders)
        except UserError:  # a token's experts do not fit
            least = OffloadSection(experts=args.moe.num_experts_per_tok)
            kinds["experts"] = plan_answers(least, logical, layout, size, torch.bfloat16, max_seq_len).slot_bytes
        else:
            kinds["experts"] = plan.slot_bytes
        yield Fit(quantise, plan, kinds)
