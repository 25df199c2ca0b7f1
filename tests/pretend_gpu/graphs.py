"""CUDA graphs without a GPU. A capture writes down every operator with the very tensors and numbers that it is given; a
replay runs them again, into the tensors that came out then. So what the host knew at the capture stays as it was.

Of a graph nothing is left once another one of its pool runs: before a replay all that any of them wrote is made garbage.
"""

import os
import sys
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

WAITS = {"item", "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "lift_fresh"}
"""Operators with which the host waits for a GPU, or sends it numbers of its own."""
replays = []
"""How many rows each replay had."""


class GraphError(Exception):
    """What a real capture refuses, or would get wrong; not what a program is ready for."""


class Graph:
    """In the place of ``torch.cuda.CUDAGraph``."""

    def replay(self):
        for out in self.pool:
            out.fill_(torch.nan if out.is_floating_point() or out.is_complex() else 1 if out.dtype == torch.bool else 12345)
        for run, made in self.steps:
            again = run()
            for old, new in zip(made, tree_leaves(again), strict=True):
                if old is not None:
                    old.copy_(new)
        replays.append(self.rows)


class Capture(TorchDispatchMode):
    """In the place of ``torch.cuda.graph``."""

    def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
        super().__init__()
        self.computes = False  # an operator, which may ask for numbers itself
        self.graph, graph.steps, graph.pool, graph.rows = graph, [], [] if pool is None else pool, None

    def __enter__(self):
        def tolist(tensor):
            if self.computes:
                return plain_tolist(tensor)
            raise GraphError("tolist in a graph")

        def launch(kernel, *args, **kwargs):  # of Triton's: it is no operator, and what it writes it is given
            with _disable_current_modes():
                plain(kernel, *args, **kwargs)
            self.graph.steps.append((lambda: plain(kernel, *args, **kwargs), [None]))

        plain_tolist, self.patch = Tensor.tolist, pytest.MonkeyPatch()
        self.patch.setattr(Tensor, "tolist", tolist)
        if interpreter := sys.modules.get("triton.runtime.interpreter"):
            plain = interpreter.GridExecutor.__call__
            self.patch.setattr(interpreter.GridExecutor, "__call__", launch)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        print(f"recorded a graph of {self.graph.rows} rows")
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        masked = name.startswith("index") and any(x.dtype == torch.bool for x in given[1:])
        if name in WAITS or masked:
            raise GraphError(f"{func} in a graph")
        self.computes = True
        made = func(*args, **kwargs)
        self.computes = False
        known = {_memory(x) for x in given}
        kept = [x if isinstance(x, Tensor) and _memory(x) not in known else None for x in tree_leaves(made)]
        self.graph.pool += [x for x in kept if x is not None]
        self.graph.steps.append((lambda: func(*args, **kwargs), kept))
        if name == "embedding":
            self.graph.rows = len(made)
        return made


def _memory(x):
    return getattr(x, "held", x).untyped_storage().data_ptr()


class Idle:
    """A stream or an event: what it is told to wait for has happened."""

    def __init__(self, device=None, **_):
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device is None else device

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait_stream(self, other=None):
        pass

    wait_event = record = wait = wait_stream

    def record_event(self, event=None):
        return event or Idle()

    def synchronize(self):
        pass


CUDA = {
    "Stream": Idle,
    "stream": lambda stream: nullcontext(),
    "current_stream": lambda device=None: Idle(),
    "CUDAGraph": Graph,
    "graph": Capture,
    "graph_pool_handle": list,
}
"""What ``torch.cuda`` has of these names then."""


@varlen._varlen_attn.register_kernel("cpu")
def _variable_length(
    q,
    k,
    v,
    borders,
    borders_k,
    longest,
    longest_k,
    is_causal=False,
    scale=None,
    window_size=None,
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """What ``varlen_attn`` runs."""
    left, right = window_size
    assert right == 0 and (enable_gqa or q.shape[1] == k.shape[-2]) and (block_table is None or num_splits == 1)
    ends = borders.tolist()
    if block_table is None:
        parts = [(k[start:stop], v[start:stop]) for start, stop in pairwise(ends)]
    else:
        used = zip(block_table.long(), seqused_k.tolist(), strict=True)
        parts = [[x[pages].flatten(0, 1)[:count] for x in (k, v)] for pages, count in used]
    assert all(stop - start <= longest for start, stop in pairwise(ends)) and all(len(k) <= longest_k for k, _ in parts)
    return attend_by_document(q, parts, ends, left), q.new_empty(0), q.new_empty(0)


def attend_by_document(q, parts, ends, left):
    """``q`` [T, H, head_dim], of which a document ends at each of ``ends`` behind the first, over each's keys and values."""
    out = []
    for rows, (keys, values) in zip(map(slice, ends, ends[1:]), parts, strict=True):
        wide = torch.promote_types(q.dtype, torch.float32)
        keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1).to(wide) for x in (keys, values))
        scores = q[rows].transpose(0, 1).to(wide) * q.shape[-1] ** -0.5 @ keys.mT
        places = torch.arange(keys.shape[1], device=q.device)
        behind = places[keys.shape[1] - scores.shape[1] :, None] - places
        unseen = (behind < 0) | (behind > left if left >= 0 else behind < 0)
        out.append((scores.masked_fill(unseen, -torch.inf).softmax(-1) @ values).transpose(0, 1).to(q.dtype))
    return torch.cat(out)
