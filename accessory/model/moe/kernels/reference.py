"""The definition of what every kernel computes: one expert after the other, differentiated by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.model.moe.kernels.rows import rows_of_experts
from accessory.model.moe.weights import ExpertWeights


def reference(
    x: Tensor, w1: ExpertWeights, w2: ExpertWeights, w3: ExpertWeights, weight: Tensor, row_ends: Tensor
) -> Tensor:
    gate, up = reference_matmul(x, w1, row_ends), reference_matmul(x, w3, row_ends)
    return reference_matmul(F.silu(gate) * up, w2, row_ends) * weight


def reference_matmul(x: Tensor, w: ExpertWeights, row_ends: Tensor) -> Tensor:
    y = [F.linear(x[:0], x.new_empty(w.shape[1:]))]  # in case there are no rows at all
    for expert, rows in enumerate(rows_of_experts(row_ends, len(x))):
        if rows.start < rows.stop or w.trained is not None:  # without rows its gradient is zero, not None
            y.append(F.linear(x[rows], w[expert : expert + 1][0]))
    return torch.cat(y)
