"""A step followed as it runs, on real tensors or on shapes alone: what it allocates, computes, sends and waits for."""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

HOST_WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal")
SENT = {  # of a collective of n ranks: its name, and bytes that a rank sends of so many that it is given (a ring's)
    "c10d._allgather_base_": ("all-gather", lambda nbytes, n: nbytes * (n - 1) / n),
    "c10d.allgather_": ("all-gather", lambda nbytes, n: nbytes * (n - 1) / n),
    "c10d._reduce_scatter_base_": ("reduce-scatter", lambda nbytes, n: nbytes * (n - 1) / n),
    "c10d.allreduce_": ("all-reduce", lambda nbytes, n: 2 * nbytes * (n - 1) / n),
}


@dataclass(frozen=True)
class Collective:
    """A kind of collective over groups of ``ranks``."""

    kind: str
    ranks: int


@dataclass
class Counts:
    """What a step, or a part of one, did.

    Attributes:
        collectives: how many of each; sent: bytes that this rank sent in them.
        flops: of matrix products, by operator. moved: bytes read and written by everything else but collectives.
        operators: how often each ran. waits: how often the host waited for the device.
    """

    collectives: Counter[Collective] = field(default_factory=Counter)
    sent: Counter[Collective] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    moved: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    waits: int = 0


class Trace(TorchDispatchMode):
    """Follows every operator inside it.

    Attributes:
        live: bytes that are allocated now; peak: the most since ``reset``.
        counts: of what has run since ``reset``.
    """

    def __init__(self, assumed: Callable[[], float] | None = None):
        """``assumed``: a number where the host asks for one and there are only shapes."""
        super().__init__()
        self.live = self.peak = 0
        self.counts, self.assumed = Counts(), assumed
        self._storages: dict[int, int] = {}

    def reset(self) -> None:
        self.peak, self.counts = self.live, Counts()

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
            return NotImplemented  # what it does to its local part comes here after it
        kwargs = kwargs or {}
        name = func._schema.name.replace("::", ".")
        self.counts.operators[name] += 1
        if name in HOST_WAITS:
            self.counts.waits += 1
            if self.assumed:
                return self.assumed()
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in results:
            self._follow(tensor.untyped_storage())
        if name in SENT:
            self._send(name, args)
        elif func._overloadpacket in flop_registry:
            self.counts.flops[name] += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        elif not name.startswith("c10d.") and "empty" not in name:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.counts.moved += sum(x.numel() * x.element_size() for x in (*given, *results))
        return out

    def _send(self, name: str, args: Any) -> None:
        kind, of = SENT[name]
        group = next(x for x in args if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
        ranks = dist.ProcessGroup.unbox(group).size()
        sizes = [x.numel() * x.element_size() for x in tree_leaves(args) if isinstance(x, Tensor)]
        whole = sum(sizes) if name == "c10d.allreduce_" else max(sizes) * (ranks if name == "c10d.allgather_" else 1)
        key = Collective(kind, ranks)
        self.counts.collectives[key] += 1
        self.counts.sent[key] += of(whole, ranks)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._storages:
            weakref.finalize(storage, self._gone, key)
        self.live += nbytes - self._storages.get(key, 0)
        self._storages[key] = nbytes
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._storages.pop(key)
