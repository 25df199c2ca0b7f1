"""A step followed as it runs, on real tensors or on shapes alone: what it allocates, computes, sends and waits for."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from accessory.data.loader import Batch
from accessory.model.decoder import Decoder
from accessory.train.balance import RouterLosses
from accessory.train.objective import NextToken
from accessory.train.step import train_step

HOST_WAITS = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal"}
COLLECTIVES = {
    "c10d._allgather_base_": "all-gather",
    "c10d.allgather_": "all-gather",
    "c10d._reduce_scatter_base_": "reduce-scatter",
    "c10d.allreduce_": "all-reduce",
}
EMPTY = {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided"}


class Collective(NamedTuple):
    """A kind of collective among ``ranks`` ranks, ``stride`` ranks of the job apart."""

    kind: str
    ranks: int
    stride: int

    def sent(self, nbytes: float) -> float:
        """Bytes that a rank sends in a ring, for a tensor of ``nbytes`` that it gathers, reduces or reduces and scatters."""
        return (2 if self.kind == "all-reduce" else 1) * nbytes * (self.ranks - 1) / self.ranks


class Figure(NamedTuple):
    """The name of a number of a step on this rank.

    Attributes:
        what: state, peak (bytes: before the step, at most during it); flops (of the products by operator ``of``); moved
            (bytes that all else reads and writes); launches, waits (operators, and how often the host waits for one);
            collectives, sent (how many of the kind ``of``, and their bytes); ran (how often the operator ``of``).
    """

    what: str
    of: str | Collective = ""


class Figures(dict[Figure, float]):
    """Numbers by name; what did not happen is 0."""

    def __missing__(self, name: Figure) -> float:
        return 0.0


STATE, PEAK = Figure("state"), Figure("peak")


def total(figures: Figures, what: str) -> float:
    """Of all operators or collectives."""
    return sum(value for name, value in figures.items() if name.what == what)


def follow_step(trace: "Trace", model: Decoder, optimizer: Optimizer, batches: Sequence[Batch]) -> Figures:
    """The figures of a step. ``trace`` has followed all that is there; the first step is unlike others: the optimiser makes
    its state in it."""
    state = trace.live
    trace.reset()
    train_step(model, optimizer, batches, NextToken(), RouterLosses(), clip_grad=1.0)
    trace.figures[STATE], trace.figures[PEAK] = state, trace.peak
    return trace.figures


class Trace(TorchDispatchMode):
    """Follows every operator inside it.

    Attributes:
        live: bytes that are allocated now; peak: the most since ``reset``. figures: of what has run since then.
    """

    def __init__(self, assumed: Callable[[], float] | None = None):
        """``assumed``: a number where the host asks for one and there are only shapes."""
        super().__init__()
        self.live = self.peak = 0
        self.figures, self.assumed = Figures(), assumed
        self._storages: dict[int, int] = {}

    def reset(self) -> None:
        self.peak, self.figures = self.live, Figures()

    def __enter__(self) -> "Trace":
        resize = torch.UntypedStorage.resize_

        def followed(storage: torch.UntypedStorage, nbytes: int) -> Any:
            result = resize(storage, nbytes)
            if storage._cdata in self._storages:
                self._follow(storage)
            return result

        self._patch = patch.object(torch.UntypedStorage, "resize_", followed)  # FSDP frees so, which is no operator
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what it does to its local part comes here then
        name = func._schema.name.replace("::", ".")
        self.figures[Figure("ran", name)] += 1
        if name in HOST_WAITS:
            self.figures[Figure("waits")] += 1
            if self.assumed:
                return self.assumed()
        out = func(*args, **(kwargs or {}))
        if func.is_view or name.startswith(("prim.", "profiler.")):
            return out
        results = _tensors(out)
        for tensor in results:
            self._follow(tensor.untyped_storage())
        if name in COLLECTIVES:
            self._count_collective(name, args)
        elif not name.startswith("c10d.") and name not in EMPTY:
            self.figures[Figure("launches")] += 1
            if flops := _product(func, args, out):
                self.figures[Figure("flops", name)] += flops
            else:
                given = _tensors((args, kwargs))
                self.figures[Figure("moved")] += sum(x.numel() * x.element_size() for x in (*given, *results))
        return out

    def _count_collective(self, name: str, args: Any) -> None:
        group = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        if len(ranks) == 1:
            return
        collective = Collective(COLLECTIVES[name], len(ranks), ranks[1] - ranks[0])
        sizes = [x.numel() * x.element_size() for x in _tensors(args)]
        whole = max(sizes) * (len(ranks) if name == "c10d.allgather_" else 1)
        self.figures[Figure("collectives", collective)] += 1
        self.figures[Figure("sent", collective)] += collective.sent(whole)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._storages:
            weakref.finalize(storage, self._gone, key)
        self.live += nbytes - self._storages.get(key, 0)
        self._storages[key] = nbytes
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._storages.pop(key)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _product(func: Any, args: Any, out: Any) -> float:
    """FLOPs of a product of matrices or of an attention; 0 of anything else."""
    if func._schema.name == "aten::_grouped_mm":  # rows x matrices of experts, or the sums of outer products of theirs
        x, w = args[:2]
        return 2.0 * x.shape[0] * x.shape[1] * w.shape[-1]
    counted = flop_registry.get(func._overloadpacket)
    flops = float(counted(*args, out_val=out)) if counted else 0.0
    return flops / 2 if "attn" in func._schema.name else flops  # half of the pairs of a causal one
