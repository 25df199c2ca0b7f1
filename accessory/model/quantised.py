"""Quantised matrices of a layer: dequantised where a product needs them.

A product keeps the quantised form for its backward pass, and dequantises once more there.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.adapter import adapter_name
from accessory.model.codecs import PARTS, Codec, Parts
from accessory.model.packed import PackedCodes, can_multiply
from accessory.model.triton_here import triton_compiles

FEW_ROWS = 32
"""Rows up to which a GPU multiplies by a matrix' codes; not yet measured on one."""
AT_ONCE_BYTES = 2**28
"""Most bytes that are dequantised at a time, if one matrix is not more already."""


def hold_quantised(layer: nn.Module, matrix: str, codec: Codec) -> None:
    """Replace the parameter ``matrix`` [rows, in] of ``layer`` by the parts of its quantised form."""
    shapes = codec.shapes(getattr(layer, matrix).shape)
    delattr(layer, matrix)
    for part, shape in shapes.items():
        values = torch.empty(shape, dtype=torch.uint8)
        layer.register_parameter(adapter_name(matrix, part), nn.Parameter(values, requires_grad=False))


def packed_codes(layer: nn.Module, matrix: str, codec: Codec, groups: int, dtype: torch.dtype) -> list[PackedCodes] | None:
    """Take the parts of ``groups`` stacked matrices out of a layer, laid out for products by their codes.

    Returns:
        Each matrix so laid out; None, and the layer is unchanged, if there are no such products.
    """
    weights = QuantisedWeights.of(layer, matrix, codec, groups, dtype)
    _, rows, width = weights.shape
    if not can_multiply(codec, rows, width, dtype):
        return None
    for part in weights.parts:
        delattr(layer, adapter_name(matrix, part))
    return [PackedCodes(codec, {part: tensor[n] for part, tensor in weights.parts.items()}) for n in range(groups)]


class QuantisedWeights:
    """Quantised ``ExpertWeights`` [e, out, in], dequantised to ``dtype`` when they are asked for."""

    trained = None

    def __init__(self, codec: Codec, parts: Parts, dtype: torch.dtype):
        self.codec, self.parts, self.dtype = codec, parts, dtype
        e, out, width = parts["codes"].shape
        self.shape = torch.Size((e, out, codec.width(width)))
        self.at_once = max(1, AT_ONCE_BYTES // (self.shape[1:].numel() * dtype.itemsize))

    @classmethod
    def of(cls, layer: nn.Module, matrix: str, codec: Codec, groups: int, dtype: torch.dtype) -> "QuantisedWeights":
        """The weights of a layer that holds the matrices of ``groups`` experts stacked by rows."""
        names = {part: adapter_name(matrix, part) for part in PARTS}
        parts = {part: getattr(layer, name) for part, name in names.items() if hasattr(layer, name)}
        return cls(codec, {part: stacked.unflatten(0, (groups, -1)) for part, stacked in parts.items()}, dtype)

    def rows(self, rows: slice | None) -> "QuantisedWeights":
        """These rows of each matrix; None: all."""
        if rows is None:
            return self
        return QuantisedWeights(self.codec, {part: stacked[:, rows] for part, stacked in self.parts.items()}, self.dtype)

    def __getitem__(self, experts: slice) -> Tensor:
        return self.codec.decode({part: stacked[experts] for part, stacked in self.parts.items()}, self.dtype)

    def prefetch(self, experts: slice) -> None:
        pass


def quantised_linear(x: Tensor, weights: QuantisedWeights, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with the one matrix of ``weights``."""
    by_codes = codes_product(x) if x.shape[:-1].numel() <= FEW_ROWS else None
    y: Tensor
    if by_codes:
        y = by_codes(x.flatten(0, -2), weights.codec, weights.parts).unflatten(0, x.shape[:-1])
    else:
        y = _QuantisedLinear.apply(x, weights)
    return y if bias is None else y + bias


CodesProduct = Callable[..., Tensor]
"""As ``triton_codes.times_codes``."""


def codes_product(x: Tensor) -> CodesProduct | None:
    """The compiled product of a few rows by a matrix' codes; None: there is none here, or gradients are wanted."""
    if torch.is_grad_enabled() or not triton_compiles(x):
        return None
    from accessory.model.triton_codes import times_codes

    return times_codes


class _QuantisedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: QuantisedWeights) -> Tensor:
        ctx.weights = weights
        return F.linear(x, weights[:][0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.weights[:][0], None
