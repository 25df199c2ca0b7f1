"""Matrices of a model that no longer trains, laid out as a CPU multiplies by them fastest.

In blocks, a product of few rows takes the time of reading the matrix, and else up to three times as long; many rows gain too
(benchmarks/generate.py). oneDNN lays them out, once; the values stay what they are, and can be had back. Its operators are
those that torch's own compiler uses, and know no gradients.

Of quantised ones in int8 and int4 torch has products in bf16 that make no numbers first: a product of one row takes the time
of reading the codes.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.codecs import Codec, Parts, unpacked
from accessory.model.few_rows import FEW, few_rows_product, lies_in_panels

FEW_CODED = {"int8": 32, "int4": 64}
"""Rows up to which the codes are multiplied by; with more it is faster to make the numbers first."""
LAID_OUT_AT_ONCE = 64
"""Rows of a matrix in int4: so what is in between, eight times the codes, stays small."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this processor has such products in ``dtype``."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(matrix: Tensor) -> nn.Parameter:
    """``matrix`` [out, in], laid out anew."""
    return nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), None), requires_grad=False)


def can_multiply(codec: Codec, rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether there are products by the codes of a matrix [rows, width] in ``dtype``; torch does not check all of that."""
    even = dtype == torch.bfloat16 and rows % 16 == 0 and width % 32 == 0
    return even and (codec.kind == "int8" or (codec.kind == "int4" and codec.group in (32, 64, 128, 256)))


class PackedCodes:
    """A quantised matrix [out, in] to multiply by in bf16; of int4 scales, and what zeros take off, are rounded to that."""

    def __init__(self, codec: Codec, parts: Parts):
        codes, bits = parts["codes"], parts["scales"].view(codec.scale_dtype)
        self.group, self.few, self.shape = (
            codec.group,
            FEW_CODED[codec.kind],
            torch.Size((len(codes), codec.width(codes.shape[1]))),
        )
        if self.group is None:
            self.codes, self.scales = (codes ^ 128).view(torch.int8), bits.flatten().clone()
        else:
            self.codes = torch.cat([_laid_out(unpacked(some, 4)) for some in codes.split(LAID_OUT_AT_ONCE)])
            scales = torch.stack([bits.float(), (8 - parts["zeros"].float()) * bits.float()], -1)
            self.scales = scales.transpose(0, 1).contiguous().bfloat16()

    def product(self, x: Tensor) -> Tensor:
        """Of rows [n, in]."""
        if self.group is None:
            if len(x) <= self.few:
                return torch._weight_int8pack_mm(x, self.codes, self.scales)
            return F.linear(x, (self.codes.float() * self.scales.float().unsqueeze(1)).to(x.dtype))
        together = _rows_together()
        if len(x) <= self.few or not together or self.shape[0] % together:
            y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.codes, self.group, self.scales)
            return y
        blocks = _codes_of(self.codes, self.shape, together).view(-1, self.group, self.shape[0])
        scale, offset = self.scales.unsqueeze(1).unbind(-1)
        return x @ torch.addcmul(offset, blocks.sub_(8), scale).flatten(0, 1)


def _laid_out(codes: Tensor) -> Tensor:
    """Codes of int4 [out, in], a byte each, as torch multiplies by them."""
    laid: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return laid


def _codes_of(laid: Tensor, shape: torch.Size, together: int) -> Tensor:
    """What was laid out, transposed [in, out], in bf16, where so many rows lie ``together``, half of them in high bits."""
    out, width = shape
    codes = laid.new_empty(width, out // together, 2, together // 2, dtype=torch.bfloat16)
    places = laid.view(out // together, width, together // 2).transpose(0, 1)
    codes[:, :, 0], codes[:, :, 1] = places & 15, places >> 4
    return codes.view(width, out)


@functools.cache
def _rows_together() -> int | None:
    """How many rows lie together as torch lays them out on this processor, which it promises nowhere: it is tried."""
    codes = torch.randint(16, (128, 32), generator=torch.Generator().manual_seed(0))
    laid = _laid_out(codes)
    return next((n for n in (64, 32) if torch.equal(_codes_of(laid, codes.shape, n).T, codes.bfloat16())), None)


def plain(matrix: Tensor) -> Tensor:
    """A matrix [out, in], packed or not, as any operator takes it."""
    return matrix.to_dense() if matrix.is_mkldnn else matrix


def product(x: Tensor, matrix: Tensor | PackedCodes, bias: Tensor | None = None) -> Tensor:
    """``x @ matrix.T + bias`` of ``x`` [..., in] and a matrix [out, in], packed or not."""
    if isinstance(matrix, PackedCodes):
        y = matrix.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias
    if matrix.is_mkldnn:
        if bias is None and len(x) <= FEW and x.dim() == 2 and lies_in_panels(matrix.shape, matrix.dtype):
            return few_rows_product(x, matrix)
        return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    return F.linear(x, matrix, bias)
