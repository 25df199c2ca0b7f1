"""Causal grouped-query attention inside each document, cut over model-parallel ranks by heads."""

import functools
import inspect
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from accessory.console import say
from accessory.model.args import ModelArgs
from accessory.model.documents import Documents
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
        documents: Documents,
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
        if cache is not None and positions is not None:
            rows = torch.arange(len(x), device=x.device).unsqueeze(1)
            cache.keys[rows, positions] = k
            cache.values[rows, positions] = v
            if x.shape[1] == 1:
                q, k, v = (y.transpose(1, 2) for y in (q, cache.keys, cache.values))
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._seen(positions, k.shape[2]), enable_gqa=True)
                return self.wo(out.transpose(1, 2).flatten(2), draw)
        return self.wo(attend(q, k, v, documents, self.window).flatten(2), draw)

    def _seen(self, positions: Tensor, length: int) -> Tensor:
        """Which of ``length`` cached keys the one new token of each row sees: bool [B, 1, 1, length]."""
        keys = torch.arange(length, device=positions.device)
        seen = keys <= positions
        if self.window is not None:
            seen &= keys > positions - self.window
        return seen[:, None, None, :]


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Causal attention inside each document: ``q`` [B, S, H, head_dim] over ``k``, ``v`` [B, S, H_kv, head_dim].

    The padding of a row is treated as one more document. No mask over documents is ever built.
    """
    shape = q.shape
    q_T, k_T, v_T = (x.flatten(0, 1) for x in (q, k, v))
    if varlen_runs(q.device, q.dtype):
        return varlen_attention(q_T, k_T, v_T, documents, window).view(shape)
    # documents of one length that are neighbours run together; splitting, unlike slicing, has a cheap backward
    runs = [(length, len(list(same))) for length, same in groupby(documents.stretches)]
    parts = zip(*(x.split([length * count for length, count in runs]) for x in (q_T, k_T, v_T)), strict=True)
    out = []
    for (length, count), part in zip(runs, parts, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in part)
        out.append(causal_attention(q, k, v, window).transpose(1, 2).flatten(0, 1))
    return torch.cat(out).view(shape)


@functools.cache
def varlen_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length attention does; says so once where a GPU must do without."""
    if device.type != "cuda":
        return False
    reason = None
    if dtype not in (torch.bfloat16, torch.float16):
        reason = f"has no {dtype}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = f"does not run on {torch.cuda.get_device_name(device)}"
    if reason:
        say(f"attention runs document by document: torch's variable-length kernel {reason}")
    return reason is None


def varlen_attention(q_T: Tensor, k_T: Tensor, v_T: Tensor, documents: Documents, window: int | None) -> Tensor:
    """One kernel over all documents: ``q_T`` [B * S, H, head_dim] over ``k_T``, ``v_T`` [B * S, H_kv, head_dim]."""
    shared_heads: dict[str, Any] = {"enable_gqa": True}
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # torch 2.11
        shared_heads = {}
        k_T, v_T = (x.repeat_interleave(q_T.shape[1] // x.shape[1], 1) for x in (k_T, v_T))
    span = (-1 if window is None else window - 1, 0)  # keys seen before a token, and behind it; -1: all
    borders, longest = documents.borders, max(documents.stretches)
    out = varlen_attn(q_T, k_T, v_T, borders, borders, longest, longest, window_size=span, **shared_heads)
    assert isinstance(out, Tensor)
    return out


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
