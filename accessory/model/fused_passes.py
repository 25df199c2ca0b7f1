"""Kernels in Triton that take one pass over memory in the place of several of torch's."""

import functools
from types import SimpleNamespace
from typing import Protocol, cast

import torch
from torch import Tensor

from accessory.dtypes import at_least
from accessory.model.triton_here import triton_compiles
from accessory.parallel.planned import is_planned


class FusedPasses(Protocol):
    """The functions of these names say what they compute."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...

    def rms_norm_backward(
        self, x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, with_weight: bool
    ) -> tuple[Tensor, Tensor | None]: ...

    def swiglu(self, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor: ...

    def swiglu_backward(
        self, gate: Tensor, up: Tensor, weight: Tensor, dh: Tensor, with_h: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...


def fused(x: Tensor) -> FusedPasses | None:
    """The kernels that take the place of several passes of torch over ``x``, compiled; None: there are none here."""
    if is_planned():
        return _ShapesAlone()
    return _compiled() if triton_compiles(x) else None


@functools.cache
def _compiled() -> FusedPasses:
    from accessory.model import triton_norm
    from accessory.model.moe.kernels import triton_swiglu

    return cast(
        FusedPasses,
        SimpleNamespace(
            rms_norm=triton_norm.rms_norm,
            rms_norm_backward=triton_norm.rms_norm_backward,
            swiglu=triton_swiglu.swiglu,
            swiglu_backward=triton_swiglu.swiglu_backward,
        ),
    )


class _ShapesAlone:
    """Of a GPU that is not there: what is read and written, and what has which shape, are as there."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return x.neg(), x.new_empty(*x.shape[:-1], 1, dtype=at_least(x.dtype))

    def rms_norm_backward(
        self, x: Tensor, weight: Tensor, scale: Tensor, dy: Tensor, with_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        return x + dy, torch.empty_like(weight) if with_weight else None

    def swiglu(self, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        return gate + up

    def swiglu_backward(
        self, gate: Tensor, up: Tensor, weight: Tensor, dh: Tensor, with_h: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        h = torch.zeros_like(gate) if with_h else None
        return torch.addcmul(gate, up, dh), torch.zeros_like(up), torch.empty_like(weight), h
