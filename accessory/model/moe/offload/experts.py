"""A layer's experts that lie elsewhere: kernels get those that a batch uses, one by one, while they are on the device."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accessory.model.adapter import adapter_name
from accessory.model.codecs import PARTS, Codec
from accessory.model.moe.dispatch import SortedRows
from accessory.model.moe.kernels.rows import rows_of_experts
from accessory.model.moe.offload.lane import Lane, Load
from accessory.model.moe.offload.records import ExpertStore, Record
from accessory.model.moe.offload.slots import Place, Slots, in_turn

Compute = Callable[[SortedRows], Tensor]
"""The outputs [n, D] of sorted rows, by experts that are held."""


class OffloadedExperts:
    """A layer's experts.

    Attributes:
        slots: which of them are on the device. record: what is in a slot. on_device: the slots, [count, nbytes].
        moved_bytes, waited_s: since the model was made.
        guess_next: brings what the next layer is likely to use; called when this one's own experts are on their way.
    """

    def __init__(self, record: Record, store: ExpertStore, slots: Slots, lane: Lane, device: torch.device):
        self.record, self.store, self.slots = record, store, slots
        self.count = len(store.rows)
        self.waited_s = 0.0
        self.guess_next: Callable[[], None] = lambda: None
        self._lane, self._loads = lane, dict[int, Load]()  # by slot
        self.on_device = torch.empty(slots.count, record.nbytes, dtype=torch.uint8, device=device)
        lane.fills(self.on_device)

    @property
    def moved_bytes(self) -> int:
        return self.slots.tally.moved * self.record.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """All experts' tensors where they lie, [e, ...]: a model is filled, and saved, there."""
        return {name: self.record.view(self.store.rows, name) for name in self.record.tensors}

    def bring(self, places: Sequence[Place]) -> None:
        """Begin to."""
        for expert, slot in places:
            self._loads[slot] = self._lane.bring(self.store, expert, self.on_device[slot])

    def _forget_failed(self) -> None:
        """What a guess did not get is tried anew where it is needed."""
        for expert, slot in list(self.slots.slot_of.items()):
            if slot in self._loads and self._loads[slot].failed:
                del self._loads[slot]
                self.slots.lose(expert)

    def tensor(self, name: str, expert: int) -> Tensor:
        """One of the tensors of an expert that is held, on the device; waits for it."""
        slot = self.slots.slot_of[expert]
        if load := self._loads.pop(slot, None):
            try:
                self.waited_s += load.wait()
            except BaseException:
                self.slots.lose(expert)
                raise
        return self.record.view(self.on_device[slot], name)

    def each(self, rows: SortedRows) -> Iterator[tuple[slice, SortedRows]]:
        """Where each expert's rows are that has some, and they alone, while it is held (see ``in_turn``)."""
        ends_e = rows.ends_e.cpu()  # once, rather than for each expert
        of_expert = rows_of_experts(ends_e, len(rows.x_nD))
        used = [expert for expert, where in enumerate(of_expert) if where.start < where.stop]
        self._forget_failed()
        self.slots.judge(used)
        for expert in in_turn(self.slots, used, self.bring, self.guess_next):
            where = of_expert[expert]
            own_ends_e = (ends_e - where.start).clamp(0, where.stop - where.start)
            own = rows.x_nD[where], rows.weight_n1[where], own_ends_e, rows.adapters.of(where), rows.plan
            yield where, SortedRows(*own)

    def run(self, compute: Compute, rows: SortedRows, trained: Callable[[], list[Tensor]]) -> Tensor:
        """What ``compute`` makes of all rows; it gets them expert by expert.

        Args:
            trained: what trains of what it computes with, beside the rows and their weights.
        """
        parameters = trained()
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (rows.x_nD, rows.weight_n1, *parameters))):
            return self.forward(compute, rows)
        kept: list[Any] = []
        x_nD, weight_n1 = _Keep.apply(kept, rows.x_nD, rows.weight_n1, *parameters[:1])
        bare = replace(rows, x_nD=x_nD.new_empty(0), weight_n1=weight_n1.new_empty(0))  # keeps no activation
        return _OneByOne.apply(self, compute, trained, kept, bare, x_nD, weight_n1, *parameters)

    def forward(self, compute: Compute, rows: SortedRows) -> Tensor:
        """Without gradients."""
        y_nD = torch.empty_like(rows.x_nD)
        for where, own in self.each(rows):
            y_nD[where] = compute(own)
        return y_nD


class _Keep(torch.autograd.Function):
    """What goes in comes out, and is kept for the backward pass of ``_OneByOne``.

    That keeps nothing itself. So where a block is recomputed, recomputing ends here, and no expert is brought for it.
    """

    @staticmethod
    def forward(ctx: Any, kept: list[Any], x_nD: Tensor, weight_n1: Tensor, *trained: Tensor) -> tuple[Tensor, Tensor]:
        """``trained``: something that trains, for autograd to keep at all where nothing before the experts does."""
        ctx.save_for_backward(x_nD, weight_n1)
        ctx.trained = len(trained)
        kept.append(ctx)
        return x_nD.view_as(x_nD), weight_n1.view_as(weight_n1)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, d_weight: Tensor) -> tuple[Tensor | None, ...]:
        return None, dx, d_weight, *[None] * ctx.trained


class _OneByOne(torch.autograd.Function):
    """Backward computes each expert's rows once more, with their gradients, so that it comes once for that."""

    @staticmethod
    def forward(
        ctx: Any,
        experts: OffloadedExperts,
        compute: Compute,
        trained: Callable[[], list[Tensor]],
        kept: list[Any],
        bare: SortedRows,
        x_nD: Tensor,
        weight_n1: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        """``kept``: the context of ``_Keep``. ``bare``: the rows without what it keeps of them."""
        ctx.experts, ctx.compute, ctx.trained, ctx.kept, ctx.bare = experts, compute, trained, kept, bare
        return experts.forward(compute, replace(bare, x_nD=x_nD, weight_n1=weight_n1))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_nD, weight_n1 = ctx.kept[0].saved_tensors
        rows = replace(ctx.bare, x_nD=x_nD, weight_n1=weight_n1)
        parameters = ctx.trained()
        sums: list[Tensor | None] = [None for _ in parameters]
        dx, d_weight = torch.empty_like(x_nD), torch.empty_like(weight_n1)
        for where, own in ctx.experts.each(rows):
            leaves = [own.x_nD.detach().requires_grad_(), own.weight_n1.detach().requires_grad_()]
            with torch.enable_grad():
                y_nD = ctx.compute(replace(own, x_nD=leaves[0], weight_n1=leaves[1]))
            found = torch.autograd.grad(y_nD, [*leaves, *parameters], dy[where], allow_unused=True)
            dx[where], d_weight[where] = found[:2]
            for number, gradient in enumerate(found[2:]):
                if gradient is not None:
                    total = sums[number]
                    sums[number] = gradient if total is None else total + gradient
        return *[None] * 5, dx, d_weight, *sums


class OffloadedWeights:
    """One matrix of each of a layer's experts, as kernels ask for it."""

    trained = None
    at_once = 1

    def __init__(self, experts: OffloadedExperts, matrix: str, codec: Codec | None, dtype: torch.dtype):
        self.experts, self.matrix, self.codec, self.dtype = experts, matrix, codec, dtype
        names = {part: adapter_name(matrix, part) for part in PARTS} if codec else {}
        self.parts = {part: name for part, name in names.items() if name in experts.record.tensors}
        (out, width), _ = experts.record.tensors[self.parts.get("codes", matrix)]
        self.shape = torch.Size((experts.count, out, codec.width(width) if codec else width))

    def __getitem__(self, experts: slice) -> Tensor:
        matrices = [self._of(expert) for expert in range(self.experts.count)[experts]]
        return matrices[0].unsqueeze(0) if len(matrices) == 1 else torch.stack(matrices)

    def _of(self, expert: int) -> Tensor:
        if self.codec is None:
            return self.experts.tensor(self.matrix, expert)
        parts = {part: self.experts.tensor(name, expert) for part, name in self.parts.items()}
        return self.codec.decode(parts, self.dtype)

    def prefetch(self, experts: slice) -> None:
        """Nothing to do: the expert that is computed is on its way."""
