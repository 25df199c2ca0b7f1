"""Causal grouped-query attention, cut over model-parallel ranks by heads."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.args import ModelArgs
from accessory.model.rope import rotate
from accessory.parallel.tensor import ColumnParallelLinear, RowParallelLinear, copy_to_model_parallel_region


@dataclass
class KVCache:
    """Keys and values of one layer: each [B, S_max, local kv heads, head_dim]; a row writes at its own position."""

    keys: Tensor
    values: Tensor


class Attention(nn.Module):
    """``wo(softmax(q k^T / sqrt(head_dim)) v)`` with n_kv_heads shared by n_heads (GQA)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.head_dim, self.window = args.head_dim, args.sliding_window
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * args.head_dim)
        self.wk = ColumnParallelLinear(args.dim, args.n_kv_heads * args.head_dim)
        self.wv = ColumnParallelLinear(args.dim, args.n_kv_heads * args.head_dim)
        self.wo = RowParallelLinear(args.n_heads * args.head_dim, args.dim)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        draw: Tensor | None = None,
    ) -> Tensor:
        """``x`` [B, S, D] -> [B, S, D]. With a cache, ``positions`` [B, S] says where each token of a row stands.

        ``draw`` [B, S] is the adapters', for dropout.
        """
        x = copy_to_model_parallel_region(x)
        q, k, v = (w(x, draw).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, rotation), rotate(k, rotation)
        decoding = False
        if cache is not None and positions is not None:
            rows = torch.arange(len(x), device=x.device).unsqueeze(1)
            cache.keys[rows, positions] = k
            cache.values[rows, positions] = v
            decoding = x.shape[1] == 1
        q = q.transpose(1, 2)
        if decoding:
            assert cache is not None and positions is not None
            k, v = cache.keys.transpose(1, 2), cache.values.transpose(1, 2)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._seen(positions, k.shape[2]), enable_gqa=True)
        else:
            out = causal_attention(q, k.transpose(1, 2), v.transpose(1, 2), self.window)
        return self.wo(out.transpose(1, 2).flatten(2), draw)

    def _seen(self, positions: Tensor, length: int) -> Tensor:
        """Which of ``length`` cached keys the one new token of each row sees: bool [B, 1, 1, length]."""
        keys = torch.arange(length, device=positions.device)
        seen = keys <= positions
        if self.window is not None:
            seen &= keys > positions - self.window
        return seen[:, None, None, :]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention of ``q`` [B, H, S, head_dim] over ``k``, ``v`` [B, H_kv, S, head_dim].

    Without a window that matters, the kernel's own causal path: no mask is built. With one, blocks of ``window``
    queries each see at most 2 x ``window`` keys under one small mask, so that cost grows with S x window.
    """
    length = q.shape[2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    out = []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        mask = (distance >= 0) & (distance < window)
        keys, values = k[:, :, first:stop], v[:, :, first:stop]
        block = F.scaled_dot_product_attention(q[:, :, start:stop], keys, values, attn_mask=mask, enable_gqa=True)
        out.append(block)
    return torch.cat(out, 2)
