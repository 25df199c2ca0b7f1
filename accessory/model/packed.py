"""Matrices of a model that no longer trains, laid out as a CPU multiplies by them fastest.

In blocks, a product of few rows takes the time of reading the matrix, and else up to three times as long; many rows gain too
(benchmarks/generate.py). oneDNN lays them out, once; the values stay what they are, and can be had back. Its operators are
those that torch's own compiler uses, and know no gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.few_rows import FEW, few_rows_product, lies_in_panels


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this processor has such products in ``dtype``."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(matrix: Tensor) -> nn.Parameter:
    """``matrix`` [out, in], laid out anew."""
    return nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), None), requires_grad=False)


def plain(matrix: Tensor) -> Tensor:
    """A matrix [out, in], packed or not, as any operator takes it."""
    return matrix.to_dense() if matrix.is_mkldnn else matrix


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ matrix.T + bias`` of ``x`` [..., in] and a matrix [out, in], packed or not."""
    if matrix.is_mkldnn:
        if bias is None and len(x) <= FEW and x.dim() == 2 and lies_in_panels(matrix.shape, matrix.dtype):
            return few_rows_product(x, matrix)
        return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    return F.linear(x, matrix, bias)
