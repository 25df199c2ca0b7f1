"""Matrices laid out for fast products on a CPU, for inference only: the operators have no gradients.

In oneDNN's blocked layout a product of few rows takes the time of reading the matrix; in the plain layout it takes up to
three times as long. Products of many rows gain too (benchmarks/generate.py). A matrix is laid out once; its values do not
change, and ``plain`` gives them back. The operators are those that torch's own compiler uses.

For quantised matrices in int8 and int4, torch has products in bf16 that work on the codes: a product of one row takes the
time of reading the codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.codecs import Codec, Parts, unpacked
from accessory.model.few_rows import FEW, few_rows_product, lies_in_panels
from accessory.model.huge_pages import into_huge_pages

FEW_CODED = 32
"""Rows up to which an int8 matrix is multiplied by its codes; with more rows it is faster to dequantise it first."""

LAID_OUT_AT_ONCE = 64
"""Rows of an int4 matrix: the conversion takes ten times the memory of the codes, and not all of it is given back."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this processor has such products in ``dtype``."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(matrix: Tensor) -> nn.Parameter:
    """``matrix`` [out, in] in oneDNN's layout."""
    laid_out = torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), None)
    into_huge_pages(torch.ops.mkldnn.data_ptr(laid_out), torch.ops.mkldnn._nbytes(laid_out))
    return nn.Parameter(laid_out, requires_grad=False)


def can_multiply(codec: Codec, rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether torch can multiply by the codes of a matrix [rows, width] in ``dtype``. It does not check all of this."""
    even = dtype == torch.bfloat16 and rows % 16 == 0 and width % 32 == 0
    return even and (codec.kind == "int8" or (codec.kind == "int4" and codec.group in (32, 64, 128, 256)))


class PackedCodes:
    """A quantised matrix [out, in] for products in bf16; the scales and zeros of int4 are rounded to bf16."""

    def __init__(self, codec: Codec, parts: Parts):
        codes, bits = parts["codes"], parts["scales"].view(codec.scale_dtype)
        self.group, self.shape = codec.group, torch.Size((len(codes), codec.width(codes.shape[1])))
        if self.group is None:
            self.codes, self.scales = (codes ^ 128).view(torch.int8), bits.flatten().clone()
        else:
            lay_out = torch.ops.aten._convert_weight_to_int4pack_for_cpu
            self.codes = torch.cat([lay_out(unpacked(some, 4).int(), 1) for some in codes.split(LAID_OUT_AT_ONCE)])
            scales = torch.stack([bits.float(), (8 - parts["zeros"].float()) * bits.float()], -1)
            self.scales = scales.transpose(0, 1).contiguous().bfloat16()
        into_huge_pages(self.codes.data_ptr(), self.codes.nbytes)

    def product(self, x: Tensor) -> Tensor:
        """``x`` [n, in] -> [n, out]."""
        if self.group is not None:
            y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.codes, self.group, self.scales)
            return y
        if len(x) <= FEW_CODED:
            return torch._weight_int8pack_mm(x, self.codes, self.scales)
        return F.linear(x, (self.codes.float() * self.scales.float().unsqueeze(1)).to(x.dtype))


def plain(matrix: Tensor) -> Tensor:
    """A matrix [out, in], packed or not, in the plain layout that every operator takes."""
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
