"""Experts of quantised weights with a few rows on a GPU: by their codes alone; knows no gradients."""

from collections.abc import Sequence

from torch import Tensor

from accessory.model.moe.kernels.looped import looped_matmul
from accessory.model.moe.kernels.swiglu import weighted_swiglu
from accessory.model.moe.weights import ExpertWeights
from accessory.model.quantised import FEW_ROWS, QuantisedWeights, codes_product


def codes_suit(x: Tensor, matrices: Sequence[ExpertWeights]) -> bool:
    """Whether these rows are few enough to be multiplied by codes, and can be."""
    if not matrices or not all(isinstance(w, QuantisedWeights) for w in matrices):
        return False
    return x.shape[0] <= FEW_ROWS * matrices[0].shape[0] and codes_product(x) is not None


def codes_swiglu(
    x: Tensor, w1: ExpertWeights, w2: ExpertWeights, w3: ExpertWeights, weight: Tensor, row_ends: Tensor
) -> Tensor:
    gate, up = (codes_matmul(x, w, row_ends) for w in (w1, w3))
    return codes_matmul(weighted_swiglu(gate, up, weight), w2, row_ends)


def codes_matmul(x: Tensor, w: ExpertWeights, row_ends: Tensor) -> Tensor:
    """An adapter's matrices have no codes."""
    if not isinstance(w, QuantisedWeights):
        return looped_matmul(x, w, row_ends)
    times = codes_product(x)
    assert times
    return times(x, w.codec, w.parts, row_ends)
