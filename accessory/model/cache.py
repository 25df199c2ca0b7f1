"""Keys and values of tokens that came before."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.model.documents import Documents


@dataclass(frozen=True)
class LayerCache:
    """Of one layer: ``keys`` and ``values`` [slots, S, local kv heads, head_dim], where S is the longest sequence."""

    keys: Tensor
    values: Tensor

    def keep(self, k: Tensor, v: Tensor, documents: Documents) -> None:
        """Add ``k``, ``v`` [T, H_kv, head_dim]."""
        slots, positions = documents.slot_of, documents.positions
        self.keys[slots, positions], self.values[slots, positions] = k, v

    def attend(self, q: Tensor, documents: Documents, window: int | None) -> Tensor:
        """Attend ``q`` [T, H, head_dim], whose keys are kept already, over them and what came before."""
        out, start = torch.empty_like(q), 0
        for n, past, slot in zip(documents.lengths, documents.past, documents.slots, strict=True):
            if n > 1:
                out[start : start + n] = self._attend_chunk(q[start : start + n], slot, past, window)
            start += n
        rows = documents.singles
        if len(rows):
            longest = 1 + max(past for n, past in zip(documents.lengths, documents.past, strict=True) if n == 1)
            out[rows] = self._attend_singles(q[rows], documents.slot_of[rows], documents.positions[rows], longest, window)
        return out

    def _attend_singles(self, q: Tensor, slots: Tensor, positions: Tensor, length: int, window: int | None) -> Tensor:
        """One token of each of ``slots`` [n], at ``positions`` [n] below ``length``, together: ``q`` [n, H, head_dim]."""
        keys, values = (x[slots, :length].transpose(1, 2) for x in (self.keys, self.values))
        behind = positions[:, None] - torch.arange(length, device=q.device)
        seen = _seen(behind, window)[:, None, None]
        return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=seen, enable_gqa=True).squeeze(2)

    def _attend_chunk(self, q: Tensor, slot: int, past: int, window: int | None) -> Tensor:
        """Several tokens of one slot, behind ``past`` others: ``q`` [n, H, head_dim]."""
        first = max(0, past - window + 1) if window else 0
        keys, values = (x[slot, first : past + len(q)].transpose(0, 1) for x in (self.keys, self.values))
        steps = torch.arange(first, past + len(q), device=q.device)
        seen = _seen(steps[past - first :, None] - steps, window)
        q = q.transpose(0, 1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True).transpose(0, 1)


def _seen(behind: Tensor, window: int | None) -> Tensor:
    """Whether a key is seen that is so many tokens ``behind`` its query."""
    return (behind >= 0) & (behind < window) if window else behind >= 0


class KVCache:
    """Of all layers, for ``slots`` sequences of at most ``length`` tokens.

    Attributes:
        layers: a ``LayerCache`` each. length: S.
    """

    def __init__(self, layers: int, slots: int, length: int, kv_heads: int, head_dim: int, like: Tensor):
        """``kv_heads``: this rank's; ``like``: has the dtype and the device."""
        shape = (slots, length, kv_heads, head_dim)
        self.length = length
        self.layers = [LayerCache(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(layers)]
