"""What the next layer is likely to use: its own router is asked, of what goes into this layer's experts."""

from typing import Any

import torch
from torch import Tensor, nn

from accessory.model.moe.offload.experts import OffloadedExperts


class Guess:
    """While this block's experts are computed, the ones that the ``next`` would choose of the same tokens are brought.

    What a block adds is small beside what goes through it, so that often they are the right ones. It changes no result.
    """

    def __init__(self, block: Any, following: Any):
        """Both are blocks of a decoder whose experts are offloaded."""
        self._next, self._x = following, torch.empty(0)
        self._local: range = following.feed_forward.dispatcher.local_experts
        block.ffn_norm.register_forward_pre_hook(self._see)
        experts: OffloadedExperts = block.feed_forward.experts.offloaded
        experts.guess_next = self.bring

    def _see(self, _: nn.Module, given: tuple[Tensor]) -> None:
        (self._x,) = given

    @torch.no_grad()
    def bring(self) -> None:
        routing = self._next.feed_forward.gate(self._next.ffn_norm(self._x))
        chosen = set(routing.experts.flatten().tolist())
        experts: OffloadedExperts = self._next.feed_forward.experts.offloaded
        experts.bring(experts.slots.guess(expert - self._local.start for expert in chosen if expert in self._local))
