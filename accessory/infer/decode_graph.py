"""CUDA graphs for decoding: the kernels of a step are recorded once, and then launched together.

A step has hundreds of kernels of a few microseconds each, and the host cannot launch them as fast as the GPU runs them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.console import say
from accessory.infer.plan import StepPlan
from accessory.model.adapter import ONE_ADAPTER
from accessory.model.attention import varlen_runs
from accessory.model.cache import CacheView, PagedCache
from accessory.model.decoder import Decoder, Inputs
from accessory.model.documents import Documents
from accessory.model.head import Logits
from accessory.model.moe.experts import GroupedExperts


def can_record(model: Decoder) -> bool:
    """Whether the decoding steps of this model can be recorded: no kernel may depend on a value that the host must wait for.

    Not over several ranks: collectives in a graph have not been tried.
    """
    like = model.norm.weight
    if model.mesh.mp.size > 1 or not varlen_runs(like.device, like.dtype, paged=True):
        return False
    if any(one.bias or ONE_ADAPTER.reach(one) for one in model.logical.adapters.values()):
        return False
    return not host_waits(model, tokens=1)


@torch.no_grad()
def host_waits(model: Decoder, tokens: int) -> bool:
    """Whether a step of so many tokens has the host wait for the experts' rows, as quantised experts with many rows do."""
    rows = model.norm.weight.expand(tokens * model.args.moe.num_experts_per_tok, -1)
    return any(layer.waits(rows) for layer in model.modules() if isinstance(layer, GroupedExperts))


class _Recorded(NamedTuple):
    numbers: Tensor  # what the graph reads
    graph: torch.cuda.CUDAGraph
    results: tuple[Tensor, Tensor]  # what it writes


class DecodeGraphs:
    """The graphs of one model and cache, for steps of 1, 2, 4, ... documents; each is recorded when it is first needed.

    A step of another size is padded with copies of the shortest document's row: these need no further experts, and attend to
    few tokens. Their keys go to page 0, which nobody reads.
    """

    def __init__(self, model: Decoder, cache: PagedCache, longest: int):
        """``longest``: tokens of a sequence."""
        seen = longest if cache.window is None else min(longest, cache.window + cache.page_size)
        self._model, self._cache, self._most_pages = model, cache, -(-seen // cache.page_size)
        self._device = model.norm.weight.device
        self._recorded: dict[int, _Recorded | None] = {}  # None: of so many documents none can be
        self._failed = False
        # the graphs' memory is the same, as no two run at a time
        self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()

    def run(self, plan: StepPlan) -> tuple[Tensor, Tensor] | None:
        """Logits and counts as ``Engine._run`` returns them, valid until the next step; None: the plan has no graph."""
        single = all(len(tokens) == 1 and tokens[0] >= 0 for tokens in plan.tokens)
        if self._failed or not single or any(plan.members) or len(plan.ends) < len(plan.tokens):
            return None
        count = len(plan.tokens)
        size = 1 << (count - 1).bit_length()
        told = torch.tensor(self._told(plan, size))
        if size not in self._recorded:
            try:
                waits = host_waits(self._model, size)
                self._recorded[size] = None if waits else self._record(told.to(self._device), size)
            except RuntimeError as error:
                say(f"answers come more slowly than they could: a step cannot be recorded as a CUDA graph here ({error})")
                self._failed = True
                return None
        if (recorded := self._recorded[size]) is None:
            return None
        numbers, graph, (logits, counts) = recorded
        numbers.copy_(told)
        graph.replay()
        return logits[:count], counts[:, :count]

    def _told(self, plan: StepPlan, size: int) -> list[int]:
        """The graph's input for ``size`` rows: all tokens, all positions, all places of keys, the number of tokens in each
        row's pages; then each row's pages."""
        own = range(len(plan.tokens))
        before = [past - begin for past, begin in zip(plan.past, plan.begins, strict=True)]
        rows = [*own, *[min(own, key=before.__getitem__)] * (size - len(own))]
        places = [self._cache.place(plan.pages[n], before[n]) for n in own] + [0] * (size - len(own))
        fields = [plan.tokens[n][0] for n in rows], [plan.past[n] for n in rows], places, [before[n] + 1 for n in rows]
        return [number for field in (*fields, *(self._row_of(plan.pages[n]) for n in rows)) for number in field]

    def _row_of(self, pages: Sequence[int]) -> list[int]:
        return [*pages, *[0] * (self._most_pages - len(pages))]

    def _step(self, numbers: Tensor, size: int) -> tuple[Tensor, Tensor]:
        tokens, positions, places, used = numbers[: 4 * size].view(4, size)
        borders = torch.arange(size + 1, dtype=torch.int32, device=self._device)
        documents = Documents(borders[1:].long(), positions, borders, lengths=(1,) * size, past=(), count=size)
        view = CacheView(
            self._cache,
            documents,
            places=places,
            table=numbers[4 * size :].view(size, -1).int(),
            used=used.int(),
            chunks=[],
            singles=borders[:-1].long(),
            continues=True,
        )
        logits, stats = self._model(Inputs(tokens, documents, view), Logits())
        return logits, stats.counts

    def _record(self, numbers: Tensor, size: int) -> _Recorded:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            self._step(numbers, size)  # compiles and loads what it needs, which cannot be recorded
        here.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # of other threads, what they do to the GPU meanwhile is no concern of this one's
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            results = self._step(numbers, size)
        return _Recorded(numbers, graph, results)
