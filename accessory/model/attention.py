"""Causal grouped-query attention inside each document, cut over model-parallel ranks by heads."""

import functools
import inspect
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.console import say
from accessory.model.adapter import ONE_ADAPTER, TokenAdapters
from accessory.model.args import ModelArgs
from accessory.model.cache import LayerCache
from accessory.model.documents import Documents
from accessory.model.few_rows import few_rows_attend, runs
from accessory.model.linear import ColumnParallelLinear, RowParallelLinear
from accessory.model.rope import rotate
from accessory.parallel.mesh import Axis
from accessory.parallel.planned import is_planned
from accessory.parallel.regions import copy_to_model_parallel_region


@functools.cache
def takes(kernel: Callable[..., Any], argument: str) -> bool:
    """Whether this version of torch gives its kernel this argument."""
    return argument in inspect.signature(kernel).parameters


@functools.cache
def varlen_kernel() -> Callable[..., Any]:
    """torch's variable-length attention, imported on first use: importing it takes half as long as importing torch."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


class Attention(nn.Module):
    """``wo(softmax(q k^T / sqrt(head_dim)) v)``, n_heads query heads sharing n_kv_heads key-value heads (GQA).

    If there are more model-parallel ranks than n_kv_heads, several ranks compute the same key-value head, each for its own
    query heads.
    """

    few_rows = False

    def __init__(self, args: ModelArgs, mp: Axis):
        super().__init__()
        self.mp, self.head_dim, self.window = mp, args.head_dim, args.sliding_window
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * args.head_dim, mp)
        self.wk = ColumnParallelLinear(args.dim, args.n_kv_heads * args.head_dim, mp, parts=args.n_kv_heads)
        self.wv = ColumnParallelLinear(args.dim, args.n_kv_heads * args.head_dim, mp, parts=args.n_kv_heads)
        self.wo = RowParallelLinear(args.n_heads * args.head_dim, args.dim, mp)

    def pack(self, dtype: torch.dtype) -> None:
        """For a model that no longer trains."""
        self.few_rows = runs(dtype)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        documents: Documents,
        cache: LayerCache | None = None,
        adapters: TokenAdapters = ONE_ADAPTER,
    ) -> Tensor:
        """``x`` [T, D] -> [T, D]; ``rotation`` [T, head_dim / 2]: the tokens' rotary embedding (``rope.rotations``)."""
        x = copy_to_model_parallel_region(x, self.mp)
        q, k, v = (w(x, adapters).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.few_rows and cache is not None and (singles := cache.of_singles):
            return self.wo(few_rows_attend(q, k, v, rotation, *singles).flatten(1), adapters)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            cache.keep(k, v)
        if cache is None or not cache.view.continues:
            out = attend(q, k, v, documents, self.window)
        elif varlen_runs(q.device, q.dtype, paged=True):
            out = paged_varlen_attention(q, cache)
        else:
            out = cache.attend(q)
        return self.wo(out.flatten(1), adapters)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Causal attention inside each document: ``q`` [T, H, head_dim] over ``k``, ``v`` [T, H_kv, head_dim].

    No mask over documents is ever built.
    """
    if is_planned() or varlen_runs(q.device, q.dtype):
        return varlen_attention(q, k, v, documents, window)
    # documents of one length that are neighbours run together; splitting, unlike slicing, has a cheap backward
    runs = [(length, len(list(same))) for length, same in groupby(documents.lengths)]
    parts = zip(*(x.split([length * count for length, count in runs]) for x in (q, k, v)), strict=True)
    out = []
    for (length, count), part in zip(runs, parts, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in part)
        out.append(causal_attention(q, k, v, window).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)


@functools.cache
def varlen_runs(device: torch.device, dtype: torch.dtype, paged: bool = False) -> bool:
    """Whether torch's variable-length attention runs here (``paged``: over a cache's pages). A GPU's no is printed once."""
    if device.type != "cuda":
        return False
    reason = None
    if dtype not in (torch.bfloat16, torch.float16):
        reason = f"has no {dtype}"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = f"does not run on {torch.cuda.get_device_name(device)}"
    elif paged and not takes(varlen_kernel(), "block_table"):
        reason = "reads no pages before torch 2.13"
    if reason:
        say(f"attention runs document by document: torch's variable-length kernel {reason}")
    return reason is None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """One kernel over all documents: ``q`` [T, H, head_dim] over ``k``, ``v`` [T, H_kv, head_dim]."""
    shared_heads: dict[str, Any] = {"enable_gqa": True}
    if not takes(varlen_kernel(), "enable_gqa"):  # torch 2.11
        shared_heads = {}
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    span = (-1 if window is None else window - 1, 0)  # keys seen before a token, and behind it; -1: all
    borders, longest = documents.borders, max(documents.lengths)
    out = varlen_kernel()(q, k, v, borders, borders, longest, longest, window_size=span, **shared_heads)
    assert isinstance(out, Tensor)
    return out


def paged_varlen_attention(q: Tensor, cache: LayerCache) -> Tensor:
    """One kernel over all documents: ``q`` [T, H, head_dim] over the pages of a cache, in which their keys are already."""
    view, window = cache.view, cache.view.cache.window
    out = varlen_kernel()(
        q,
        cache.keys,
        cache.values,
        view.documents.borders,
        None,
        max(view.documents.lengths),
        view.table.shape[1] * cache.keys.shape[1],
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
        seqused_k=view.used,
        block_table=view.table,
        num_splits=1,  # else a document's result depends on what others run with it
    )
    assert isinstance(out, Tensor)
    return out


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention of ``q`` [B, H, S, head_dim] over ``k``, ``v`` [B, H_kv, S, head_dim].

    Without a window that matters, the kernel's own causal path: no mask is built. With one, blocks of ``window``
    queries each see at most 2 x ``window`` keys under one small mask, so that cost grows with S x window.
    """
    length = q.shape[2]
    if q.device.type == "cuda" and q.dtype not in (torch.bfloat16, torch.float16):
        # flash attention has no fp32, and the memory-efficient one no shared heads: else all scores would be in memory
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if window is None or window >= length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    out = []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        mask = (distance >= 0) & (distance < window)
        keys, values = k[:, :, first:stop], v[:, :, first:stop]
        block = F.scaled_dot_product_attention(
            q[:, :, start:stop], keys, values, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1]
        )
        out.append(block)
    return torch.cat(out, 2)
