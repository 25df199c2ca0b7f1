"""Checks that every adapter learns: one without a gradient would be trained, saved and served without any effect."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from accessory.errors import UserError
from accessory.parallel.mesh import local_part


def watch_adapters(model: nn.Module, optimizer: Optimizer, names: Collection[str]) -> None:
    """Stop the run, before its first steps change a weight, if a parameter in ``names`` has no gradient on any rank.

    Each parameter is judged as a whole, over all ranks, since a single expert's gradient is rightly zero if it got no token.
    While B is zero, so is A's gradient: A is judged in the first step in which B is not zero. Then the check ends.

    Raises:
        UserError: (from the optimiser's step, on all ranks together) with the names.
    """
    parameters = dict(model.named_parameters())
    waiting = [name for name in parameters if name in names]

    def check(*_: Any) -> None:
        learns = _not_zero_anywhere([parameters[name].grad for name in waiting], parameters[waiting[0]].device)
        of_b = [parameters[name.removesuffix("lora_a") + "lora_b"] if name.endswith("lora_a") else None for name in waiting]
        b_changed = _not_zero_anywhere(of_b, parameters[waiting[0]].device)
        judged = [changed or not name.endswith("lora_a") for name, changed in zip(waiting, b_changed, strict=True)]
        inert = [name for name, ok, due in zip(waiting, learns, judged, strict=True) if due and not ok]
        if inert:
            raise UserError(
                f"no gradient reaches these adapters on any rank, they would never learn: {', '.join(inert)}. This step "
                "changed no weight; leave their matrices out of tuning, or find why the loss does not depend on them"
            )
        waiting[:] = [name for name, ok in zip(waiting, learns, strict=True) if not ok]
        if not waiting:
            handle.remove()

    if waiting:
        handle = optimizer.register_step_pre_hook(check)


def _not_zero_anywhere(tensors: Sequence[Tensor | None], device: torch.device) -> list[bool]:
    """Whether each tensor has a value other than zero on any rank; None counts as zero."""
    flags = [(local_part(t) != 0).any() if t is not None else torch.zeros((), device=device) for t in tensors]
    result = torch.stack([flag.float() for flag in flags])
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return result.bool().tolist()
