"""A model that answers with experts offloaded: what fits beside its answers, and what it is told to have done."""

from collections.abc import Mapping
from typing import Any

import torch

from accessory.console import tell
from accessory.infer.engine import CHUNK_TOKENS, GPU_PAGE
from accessory.model.decoder import Decoder
from accessory.model.logical import LogicalModel
from accessory.model.memory import saved_bytes, share_of_a_rank
from accessory.model.moe.layouts import Layout
from accessory.model.moe.offload.meter import told
from accessory.model.moe.offload.plan import OffloadPlan, plan_offload
from accessory.settings import OffloadSection

Offload = str | Mapping[str, Any] | OffloadSection | None


def in_pages(tokens: int) -> int:
    """So many tokens, as whole pages of the cache hold them on any device."""
    return -(-tokens // GPU_PAGE) * GPU_PAGE


def plan_answers(
    section: OffloadSection,
    logical: LogicalModel,
    layout: Layout,
    size: int,
    dtype: torch.dtype,
    max_seq_len: int,
    beside: int = 0,
) -> OffloadPlan:
    """Where the experts are of a model that answers, cut into ``size`` parts; in a given memory it answers one at a time.

    Args:
        beside: numbers of what it sees with, whole on every rank.

    Raises:
        UserError: that is too little (see ``plan_offload``).
    """
    args = logical.args
    weights = share_of_a_rank(logical, layout, size, dtype, without_experts=True)
    kv_heads = max(1, args.n_kv_heads // size)
    of_a_token = 2 * args.n_layers * kv_heads * args.head_dim * dtype.itemsize  # its keys and values
    cache = (in_pages(max_seq_len) + GPU_PAGE) * of_a_token
    step = 2 * CHUNK_TOKENS * saved_bytes(args, size, dtype, "none")  # of a block at work, and what it makes of that
    return plan_offload(section, logical, layout, size, dtype, weights + cache + step + beside * dtype.itemsize)


def where_experts_are(
    given: Offload,
    logical: LogicalModel,
    layout: Layout,
    size: int,
    dtype: torch.dtype,
    max_seq_len: int,
    beside: int = 0,
) -> tuple[OffloadPlan | None, int | None]:
    """What is ``given`` as a plan (None: all are on the device), and how many tokens the cache is to have, if it says so."""
    section = OffloadSection.read(given)
    if section is None:
        return None, None
    plan = plan_answers(section, logical, layout, size, dtype, max_seq_len, beside)
    tell(f"offload: {plan}")
    return plan, in_pages(max_seq_len) if section.device_memory else None


def tell_offload(model: Decoder) -> None:
    """Say how often experts were on the device, if they are offloaded."""
    if layers := model.offloaded:
        tell(told(layers))
