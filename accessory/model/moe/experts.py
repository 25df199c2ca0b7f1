"""The experts' maths: a grouped SwiGLU over rows sorted by expert. Shape suffixes are as in ``accessory.model.moe``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.adapter import (
    Adapter,
    TokenAdapters,
    adapter_cut_dims,
    adapter_name,
    add_parameters,
    dropped,
    name_of_a,
    scaled,
)
from accessory.model.codecs import PARTS, Codec
from accessory.model.few_rows import FEW, few_rows_experts
from accessory.model.moe.dispatch import SortedRows
from accessory.model.moe.kernels import ExpertMatmul, Kernel, pick_kernel
from accessory.model.moe.kernels.swiglu import swiglu, weighted_swiglu
from accessory.model.moe.offload.experts import OffloadedExperts, OffloadedWeights
from accessory.model.moe.offload.records import Record
from accessory.model.moe.weights import AdaptedWeights, Added, ExpertWeights, MaybeAdapted, PackedWeights, PlainWeights
from accessory.model.packed import packed
from accessory.model.quantised import QuantisedWeights, hold_quantised, packed_codes
from accessory.model.recompute import made_again
from accessory.parallel.mesh import Axis
from accessory.parallel.regions import copy_to_model_parallel_region

MATRICES = ("w1", "w3", "w2")  # in the order in which an expert uses them


class GroupedExperts(nn.Module):
    """``w2(silu(w1 x) * (w3 x))``, with weights of its own for each local expert.

    The experts' matrices are stacked into one parameter each, ``w1, w3 [e*F, D]`` and ``w2 [e*D, F]`` (the logical tensor
    with its first two dimensions merged), so that FSDP can shard dim 0 evenly however few experts a rank holds. Adapters
    are stacked likewise: ``w1_lora_a [e*R, D]``, ``w1_lora_b [e*F, R]``, ``w1_bias [e*F]``.

    Args:
        cut_dims: the dimension of each logical tensor that is cut over model-parallel ranks.
    """

    def __init__(self, num_local: int, dim: int, hidden_dim: int, kernel: str, cut_dims: dict[str, int], mp: Axis):
        super().__init__()
        self.num_local, self.kernel, self.cut_dims, self.mp = num_local, kernel, cut_dims, mp
        self.adapters: dict[str, Adapter] = {}
        self.whole: set[str] = set()  # adapter tensors that are whole on every rank
        self.codecs: dict[str, Codec] = {}  # of matrices that are held quantised
        self.packed: dict[str, PackedWeights] = {}
        self.places: list[Any] | None = None  # of w1, w2 and w3, where few_rows.c can multiply by all of them
        self.offloaded: OffloadedExperts | None = None
        self.w1 = nn.Parameter(torch.empty(num_local * hidden_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_local * dim, hidden_dim))
        self.w3 = nn.Parameter(torch.empty(num_local * hidden_dim, dim))

    def adapt(self, matrix: str, adapter: Adapter) -> None:
        self.adapters[matrix] = adapter
        add_parameters(self, matrix, adapter, self._stack(matrix).shape)
        cuts = adapter_cut_dims(3, self.cut_dims[matrix])
        self.whole |= {adapter_name(matrix, part) for part, dim in cuts.items() if dim is None}

    def quantise(self, matrix: str, codec: Codec) -> None:
        """Hold a matrix quantised."""
        self.codecs[matrix] = codec
        hold_quantised(self, matrix, codec)

    def record(self) -> Record:
        """The layout in bytes of one expert's weights, quantised or not (see ``moe.offload.records``)."""
        names = (name for matrix in MATRICES for name in (matrix, *(adapter_name(matrix, part) for part in PARTS)))
        held = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return Record({name: (tuple(self._apart(t).shape[1:]), t.dtype) for name, t in held.items()})

    def offload(self, offloaded: OffloadedExperts) -> None:
        """Take the weights from ``offloaded`` from now on; the layer's own are removed."""
        self.offloaded = offloaded
        for name in offloaded.record.tensors:
            delattr(self, name)

    def pack(self, dtype: torch.dtype) -> None:
        """Lay the weights out for fast products in ``dtype``; offloaded ones, and some quantised ones, stay as they are."""
        for matrix in MATRICES if self.offloaded is None else ():
            if matrix in self.codecs:
                codes = packed_codes(self, matrix, self.codecs[matrix], self.num_local, dtype)
                self.packed |= {matrix: PackedWeights(codes)} if codes else {}
                continue
            self.packed[matrix] = PackedWeights([packed(of_expert) for of_expert in self._stack(matrix)])
            delattr(self, matrix)
        places = [self.packed[matrix].places for matrix in ("w1", "w2", "w3")] if len(self.packed) == len(MATRICES) else []
        self.places = places if places and all(places) else None

    def forward(self, rows: SortedRows) -> Tensor:
        """The output of each row's expert, times the routing weight, [n, D]."""
        if self.offloaded is None:
            return self._outputs(rows)
        return self.offloaded.run(self._outputs, rows, lambda: [p for p in self.parameters() if p.requires_grad])

    def takes_few(self, choices: int, adapters: TokenAdapters) -> bool:
        """Whether ``few`` can compute so many choices (tokens x experts per token)."""
        if self.places is None or choices > FEW * self.num_local:
            return False
        return not any(adapter.bias or adapters.reach(adapter) for adapter in self.adapters.values())

    def few(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, local: range) -> Tensor:
        """For a few tokens: each token's weighted sum over its ``local`` experts, [T, D], without sorting rows first."""
        assert self.places is not None
        return few_rows_experts(x_TD, experts_TK, weights_TK, local, self.places, self.packed["w1"].shape[1])

    def _outputs(self, rows: SortedRows) -> Tensor:
        x_nD, weight_n1, ends_e = rows.x_nD, rows.weight_n1, rows.ends_e
        w1, w2, w3 = matrices = self._matrices(x_nD.dtype)
        kernel = self._kernel_for(x_nD, matrices)
        if not any(adapter.bias or rows.adapters.reach(adapter) for adapter in self.adapters.values()):
            return kernel.swiglu(x_nD, w1, w2, w3, weight_n1, ends_e)
        if kernel.adapted and not any(_is_composed(adapter, rows.adapters) for adapter in self.adapters.values()):
            adapted = {matrix: self._adapted(matrix, w) for matrix, w in (("w1", w1), ("w2", w2), ("w3", w3))}
            return kernel.adapted(x_nD, adapted["w1"], adapted["w2"], adapted["w3"], weight_n1, ends_e)
        has_bias = any(adapter.bias for adapter in self.adapters.values())
        products = _Products(kernel.matmul, ends_e, rows.adapters, one_hot(ends_e, x_nD) if has_bias else None)
        gate_nF, up_nF = (self._project(matrix, x_nD, products) for matrix in ("w1", "w3"))
        h_nF = made_again(weighted_swiglu(gate_nF, up_nF, weight_n1), swiglu, gate_nF, up_nF, weight_n1)
        weighted_ne = None if products.bias_ne is None else products.bias_ne * weight_n1
        return self._project("w2", h_nF, replace(products, bias_ne=weighted_ne, bias_share=weight_n1))

    def _matrices(self, dtype: torch.dtype) -> list[ExpertWeights]:
        return [self.expert_weights(matrix, dtype) for matrix in ("w1", "w2", "w3")]

    def _kernel_for(self, x_nD: Tensor, matrices: Sequence[ExpertWeights]) -> Kernel:
        return pick_kernel(self.kernel, x_nD, matrices[0].shape[1], matrices)

    def waits(self, x_nD: Tensor) -> bool:
        """Whether the host must wait for the GPU when experts without adapters compute such rows."""
        return self._kernel_for(x_nD, self._matrices(x_nD.dtype)).waits(x_nD)

    def _adapted(self, matrix: str, weights: ExpertWeights) -> MaybeAdapted:
        """A matrix of all experts with its adapter, if it has one."""
        adapter = self.adapters.get(matrix)
        if adapter is None:
            return weights
        a, b, bias = None, None, None
        if adapter.rank:
            a, b = self._stack(name_of_a(matrix, adapter)), self._stack(f"{matrix}_lora_b")
        if adapter.bias:
            bias = self._bias(matrix)
        return AdaptedWeights(weights, Added(a, b, bias, adapter.scaling))

    def _bias(self, matrix: str) -> Tensor:
        """[e, out]: the bias; this rank's share of it, if every rank has it whole and their outputs are summed."""
        bias = self._stack(f"{matrix}_bias")
        return bias / self.mp.size if f"{matrix}_bias" in self.whole else bias

    def _project(self, matrix: str, x: Tensor, rows: "_Products") -> Tensor:
        """``W x + scaling * B A x + bias`` of each row's expert."""
        adapter, added = self.adapters.get(matrix, Adapter()), None
        if rows.adapters.reach(adapter):
            first_column = self.mp.rank * x.shape[1] if self.cut_dims[matrix] == 2 else 0
            kept = dropped(x, adapter, rows.adapters.dropout_draw, first_column)
            low_nR = rows.matmul(kept, self.expert_weights(name_of_a(matrix, adapter), x.dtype), rows.ends_e)
            share = rows.bias_share / self.mp.size if f"{matrix}_lora_b" in self.whole else rows.bias_share
            low_nR = scaled(low_nR, adapter, rows.adapters, share)
            added = rows.matmul(low_nR, self.expert_weights(f"{matrix}_lora_b", x.dtype), rows.ends_e)
        y = rows.matmul(x, self.expert_weights(matrix, x.dtype), rows.ends_e)  # last: a block that runs again ends before it
        if added is not None:
            y += added
        if rows.bias_ne is not None and adapter.bias:
            y.addmm_(rows.bias_ne, self._bias(matrix))
        return y

    def expert_weights(self, matrix: str, dtype: torch.dtype) -> ExpertWeights:
        """A matrix of all experts, or of their adapters, in the form that kernels take, for rows in ``dtype``."""
        if self.offloaded and matrix in MATRICES:
            return OffloadedWeights(self.offloaded, matrix, self.codecs.get(matrix), dtype)
        if matrix in self.packed:
            return self.packed[matrix]
        if matrix in self.codecs:
            return QuantisedWeights.of(self, matrix, self.codecs[matrix], self.num_local, dtype)
        return PlainWeights(self._stack(matrix))

    def _stack(self, name: str) -> Tensor:
        """A stacked parameter as [e, ...]; one that is whole on every rank enters the region."""
        parameter = getattr(self, name)
        if name in self.whole:
            parameter = copy_to_model_parallel_region(parameter, self.mp)
        return self._apart(parameter)

    def _apart(self, stacked: Tensor) -> Tensor:
        return stacked.unflatten(0, (self.num_local, -1))


def _is_composed(adapter: Adapter, tokens: TokenAdapters) -> bool:
    """Whether rows of one expert get different additions, so that kernels cannot add them."""
    return bool(adapter.members) or (adapter.dropout > 0 and tokens.dropout_draw is not None)


@dataclass(frozen=True)
class _Products:
    """How experts with adapters multiply, when each product is a call of the kernel's own."""

    matmul: ExpertMatmul
    ends_e: Tensor
    adapters: TokenAdapters  # of each row's token
    bias_ne: Tensor | None  # the share of each expert's bias that a row gets; None: there are no biases
    bias_share: Tensor | float = 1.0  # the share of its own expert's bias, a number or [n, 1]


def one_hot(ends_e: Tensor, like_nD: Tensor) -> Tensor:
    """Which expert each of the sorted rows belongs to, [n, e] of zeros and ones. ``ends_e`` may be on the host.

    A bias is added as a product with it, so that its gradient is a product too, and not scattered additions in any order.
    """
    row_n = torch.arange(len(like_nD), device=ends_e.device, dtype=ends_e.dtype)
    return F.one_hot(torch.searchsorted(ends_e, row_n, right=True), len(ends_e)).to(like_nD)
