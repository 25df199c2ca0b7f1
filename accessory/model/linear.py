"""Linear layers and the embedding, cut over model-parallel ranks, with their adapters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.adapter import ONE_ADAPTER, Adaptable, Adapter, TokenAdapters, add_parameters, dropped, scaled
from accessory.model.codecs import Codec
from accessory.model.packed import PackedCodes, packed, product
from accessory.model.quantised import QuantisedWeights, hold_quantised, packed_codes, quantised_linear
from accessory.parallel.mesh import Axis
from accessory.parallel.regions import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)


class Quantisable(Adaptable):
    """A layer whose matrix can be held quantised."""

    codec: Codec | None = None
    packed_codes: PackedCodes | None = None

    def quantise(self, matrix: str, codec: Codec) -> None:
        """Hold the matrix quantised by ``codec``."""
        self.codec = codec
        hold_quantised(self, matrix, codec)

    def quantised(self, dtype: torch.dtype, codec: Codec) -> QuantisedWeights:
        """The quantised matrix, to multiply values in ``dtype``."""
        return QuantisedWeights.of(self, "weight", codec, 1, dtype)

    def pack(self, dtype: torch.dtype) -> None:
        """Lay the matrix out for fast products in ``dtype``; a quantised one only if there is a product by its codes."""
        if self.codec is None:
            self.weight = packed(self.weight)
        else:
            codes = packed_codes(self, "weight", self.codec, 1, dtype)
            self.packed_codes = codes[0] if codes else None


class ColumnParallelLinear(Quantisable):
    """``x @ weight.T`` with ``weight`` [out, in] cut on dim 0: the output stays cut.

    The caller enters the region (``copy_to_model_parallel_region``) once for all the layers that share an input.

    Args:
        parts: how many parts ``out`` has that cannot be cut further (key-value heads). If there are more ranks than parts,
            each rank has the whole weight, and computes one part, which its neighbours compute as well.
    """

    def __init__(self, in_features: int, out_features: int, mp: Axis, parts: int | None = None):
        super().__init__()
        self.mp = mp
        self.own_rows: slice | None = None
        if parts is not None and mp.size > parts:
            part, height = mp.rank * parts // mp.size, out_features // parts
            self.own_rows = slice(part * height, (part + 1) * height)
        self.weight = nn.Parameter(torch.empty(out_features if self.own_rows else out_features // mp.size, in_features))

    def forward(self, x: Tensor, adapters: TokenAdapters = ONE_ADAPTER) -> Tensor:
        bias, low = None if self.bias is None else self._own(self.bias), self.low_rank(x, adapters)
        if self.codec and not self.packed_codes:
            y = quantised_linear(x, self.quantised(x.dtype, self.codec).rows(self.own_rows), bias)
        else:
            y = product(x, self.packed_codes or self._own(self.weight), bias)
        return y if low is None else y + F.linear(low, self._own(self.lora_b))

    def pack(self, dtype: torch.dtype) -> None:
        """A matrix of which this rank computes only some rows is not packed."""
        if self.own_rows is None:
            super().pack(dtype)

    def _own(self, parameter: Tensor) -> Tensor:
        """The rows that this rank computes with. A whole parameter enters the region, since other ranks use other rows."""
        return parameter if self.own_rows is None else copy_to_model_parallel_region(parameter, self.mp)[self.own_rows]

    def low_rank(self, x: Tensor, adapters: TokenAdapters = ONE_ADAPTER) -> Tensor | None:
        """``scaling * A dropout(x)`` [..., R], whole on every rank; None without LoRA."""
        if not adapters.reach(self.adapter):
            return None
        lora_a = copy_to_model_parallel_region(self.lora_a, self.mp)
        return scaled(F.linear(dropped(x, self.adapter, adapters.dropout_draw), lora_a), self.adapter, adapters)


class RowParallelLinear(Quantisable):
    """``x @ weight.T`` with ``weight`` [out, in] cut on dim 1 and ``x`` cut likewise: partial products are summed."""

    def __init__(self, in_features: int, out_features: int, mp: Axis):
        super().__init__()
        self.mp = mp
        self.weight = nn.Parameter(torch.empty(out_features, in_features // mp.size))

    def forward(self, x: Tensor, adapters: TokenAdapters = ONE_ADAPTER) -> Tensor:
        if self.codec and not self.packed_codes:
            y = quantised_linear(x, self.quantised(x.dtype, self.codec))
        else:
            y = product(x, self.packed_codes or self.weight)
        if adapters.reach(self.adapter):
            x = dropped(x, self.adapter, adapters.dropout_draw, first_column=self.mp.rank * x.shape[-1])
            # this rank's part of A x; the bias must enter the sum over ranks once
            low = scaled(F.linear(x, self.lora_a), self.adapter, adapters, bias_share=1 / self.mp.size)
            y = y + F.linear(low, copy_to_model_parallel_region(self.lora_b, self.mp))
        y = reduce_from_model_parallel_region(y, self.mp)
        return y if self.bias is None else y + self.bias


class ParallelEmbedding(Adaptable):
    """Token embedding with ``weight`` [V, D] cut on dim 1: each rank looks up its columns, which are gathered.

    As a matrix it maps V to D, so its adapter has ``lora_a`` [R, V] (whole) and ``lora_b`` [D, R]; it has no dropout.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, mp: Axis):
        super().__init__()
        self.mp = mp
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim // mp.size))

    def adapt(self, matrix: str, adapter: Adapter) -> None:
        self.adapter = adapter
        add_parameters(self, matrix, adapter, self.weight.shape[::-1])

    def forward(self, tokens: Tensor, adapters: TokenAdapters = ONE_ADAPTER) -> Tensor:
        x = F.embedding(tokens, self.weight)
        if adapters.reach(self.adapter):
            low = F.embedding(tokens, copy_to_model_parallel_region(self.lora_a, self.mp).T)
            x = x + F.linear(scaled(low, self.adapter, adapters), self.lora_b)
        return gather_from_model_parallel_region(x, self.mp)
