"""Experts of quantised weights with a few rows on a GPU: by their codes alone; knows no gradients."""

from torch import Tensor

from accessory.model.moe.kernels.swiglu import weighted_swiglu
from accessory.model.moe.weights import ExpertWeights
from accessory.model.quantised import QuantisedWeights, codes_product


def codes_swiglu(
    x: Tensor, w1: ExpertWeights, w2: ExpertWeights, w3: ExpertWeights, weight: Tensor, row_ends: Tensor
) -> Tensor:
    gate, up = (codes_matmul(x, w, row_ends) for w in (w1, w3))
    return codes_matmul(weighted_swiglu(gate, up, weight), w2, row_ends)


def codes_matmul(x: Tensor, w: ExpertWeights, row_ends: Tensor) -> Tensor:
    times = codes_product(x)
    assert times and isinstance(w, QuantisedWeights)
    return times(x, w.codec, w.parts, row_ends)
