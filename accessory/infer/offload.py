"""A model that answers with experts offloaded: what fits beside its answers, and what it is told to have done."""

from collections.abc import Callable, Mapping
from typing import Any

from accessory.console import tell
from accessory.model.answering import in_pages
from accessory.model.decoder import Decoder
from accessory.model.moe.offload.meter import told
from accessory.model.moe.offload.plan import OffloadPlan
from accessory.settings import OffloadSection

Offload = str | Mapping[str, Any] | OffloadSection | None


def where_experts_are(
    section: OffloadSection | None, max_seq_len: int, plan_of: Callable[[OffloadSection], OffloadPlan]
) -> tuple[OffloadPlan | None, int | None]:
    """The ``section`` as a plan (None: all are on the device), and how many tokens the cache is to have, if it says so."""
    if section is None:
        return None, None
    plan = plan_of(section)
    tell(f"offload: {plan}")
    return plan, in_pages(max_seq_len) if section.device_memory else None


def tell_offload(model: Decoder) -> None:
    """Say how often experts were on the device, if they are offloaded."""
    if layers := model.offloaded:
        tell(told(layers))
