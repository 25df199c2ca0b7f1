"""Whether Triton's kernels run: compiled on a GPU, or interpreted on a CPU, which is slow and for trying them.

Nothing here imports Triton: that takes as long as all the rest of a start.
"""

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from accessory.dtypes import at_least
from accessory.parallel.planned import is_planned

NEEDS = "a GPU of compute capability 8.0, or TRITON_INTERPRET=1 in the environment, which has no bf16"


@functools.cache
def is_installed(package: str) -> bool:
    return find_spec(package) is not None


def is_interpreted() -> bool:
    """Triton asks this once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_runs(x: Tensor) -> bool:
    """Whether a kernel runs over what lies where ``x`` does, in its dtype: the interpreter's bf16 products are garbage."""
    if x.device.type == "cuda":
        return capability(x.device) >= (8, 0) and not is_interpreted()
    return x.device.type == "cpu" and is_interpreted() and x.dtype != torch.bfloat16


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class FusedPasses(Protocol):
    """What takes one pass over memory in the place of several; the functions of these names say what they compute."""

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
    return _compiled() if x.device.type == "cuda" and is_installed("triton") and triton_runs(x) else None


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


CodesProduct = Callable[..., Tensor]
"""As ``triton_codes.times_codes``."""


def codes_product(x: Tensor) -> CodesProduct | None:
    """The product of a few rows by a matrix' codes, compiled; None: there is none here, or gradients are wanted."""
    if torch.is_grad_enabled() or x.device.type != "cuda" or not is_installed("triton") or not triton_runs(x):
        return None
    from accessory.model.triton_codes import times_codes

    return times_codes


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


def wide_type(x: Tensor) -> Any:
    """Triton's dtype for sums and statistics of such values: fp32, or fp64 for fp64, which is for the interpreter."""
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32
