"""The kernels that compute the experts' SwiGLU over sorted rows, in one table with a record each.

``x`` [n, D] holds the rows of expert 0, then of expert 1, ...; ``row_ends`` [e] (int32) says where each expert's rows end;
``w1, w3`` [e, F, D] and ``w2`` [e, D, F] are the experts' weights; ``weight`` [n, 1] is each row's routing weight.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.config import nearest
from accessory.console import say
from accessory.errors import UserError
from accessory.model.moe.kernels.codes import codes_matmul, codes_suit, codes_swiglu
from accessory.model.moe.kernels.grouped import GROUPED_NEEDS, grouped, grouped_matmul, grouped_runs, grouped_waits
from accessory.model.moe.kernels.looped import looped, looped_matmul
from accessory.model.moe.kernels.megablocks import (
    MEGABLOCKS_NEEDS,
    load_megablocks,
    megablocks,
    megablocks_matmul,
    megablocks_runs,
)
from accessory.model.moe.kernels.packed import packed_matmul, packed_suit, packed_swiglu
from accessory.model.moe.kernels.reference import reference, reference_matmul
from accessory.model.moe.kernels.triton_experts import (
    TRITON_EXPERTS_NEEDS,
    load_triton,
    triton_experts,
    triton_experts_run,
    triton_experts_suit,
    triton_matmul,
)
from accessory.model.moe.weights import ExpertWeights, MaybeAdapted, PlainWeights

ExpertSwiGLU = Callable[[Tensor, ExpertWeights, ExpertWeights, ExpertWeights, Tensor, Tensor], Tensor]
AdaptedSwiGLU = Callable[[Tensor, MaybeAdapted, MaybeAdapted, MaybeAdapted, Tensor, Tensor], Tensor]
ExpertMatmul = Callable[[Tensor, ExpertWeights, Tensor], Tensor]


def _here() -> None:
    """Nothing has to be installed."""


Matrices = Sequence[ExpertWeights]
"""The experts' w1, w2 and w3; none: they are plain."""


def _plain_where(suits: Callable[[Tensor], bool]) -> Callable[[Tensor, Matrices], bool]:
    """Only for weights in one tensor: others should be dequantised or fetched a few experts at a time."""
    return lambda x, matrices: all(isinstance(w, PlainWeights) for w in matrices) and suits(x)


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _always(*_: object) -> bool:
    return True


def _never(*_: object) -> bool:
    return False


@dataclass(frozen=True)
class Kernel:
    """One way to compute the experts.

    Attributes:
        name: for ``model.kernel`` of a run.
        swiglu: of (x, w1, w2, w3, weight, row_ends): ``weight * w2(silu(w1 x) * (w3 x))``, [n, D].
        matmul: of (x, w, row_ends), with x [n, in] and w [e, out, in]: each row times its expert's matrix, [n, out]. Experts
            with adapters are composed of such products.
        runs: whether it can run, given rows [n, D] (their dtype, device and width) and this rank's F.
        needs: the same in words, for error messages.
        suits: whether "auto" picks it for rows [n, D] and these weights: the first in the table that runs and suits.
        waits: whether the host waits for the GPU to learn where each expert's rows [n, D] end.
        load: imports the packages that the kernel needs.
        by_triton: whether it is written in Triton, and so can be interpreted.
        trains: whether it has gradients. One that has none cannot be named by a run; "auto" picks it.
        adapted: like ``swiglu``, for matrices some of which are ``AdaptedWeights``; None: experts with adapters are composed
            of products.
    """

    name: str
    swiglu: ExpertSwiGLU
    matmul: ExpertMatmul
    runs: Callable[[Tensor, int], bool]
    needs: str
    suits: Callable[[Tensor, Matrices], bool] = _never
    waits: Callable[[Tensor], bool] = _always
    load: Callable[[], object] = _here
    by_triton: bool = False
    trains: bool = True
    adapted: AdaptedSwiGLU | None = None


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("packed", packed_swiglu, packed_matmul, _always, "packed weights", suits=packed_suit, trains=False),
        Kernel(
            "codes",
            codes_swiglu,
            codes_matmul,
            _always,
            "a few rows, and quantised weights on a GPU",
            suits=codes_suit,
            waits=_never,
            trains=False,
        ),
        Kernel(
            "triton",
            triton_experts,
            triton_matmul,
            triton_experts_run,
            TRITON_EXPERTS_NEEDS,
            suits=_plain_where(triton_experts_suit),
            waits=_never,
            load=load_triton,
            by_triton=True,
        ),
        Kernel(
            "grouped",
            grouped,
            grouped_matmul,
            grouped_runs,
            GROUPED_NEEDS,
            suits=_plain_where(_on_gpu),
            waits=grouped_waits,
        ),
        Kernel("looped", looped, looped_matmul, _always, "nothing", suits=_always, adapted=looped),
        Kernel(
            "megablocks",
            megablocks,
            megablocks_matmul,
            megablocks_runs,
            MEGABLOCKS_NEEDS,
            load=load_megablocks,
            by_triton=True,
        ),
        Kernel("reference", reference, reference_matmul, _always, "nothing"),
    )
}


def pick_kernel(name: str, x: Tensor, hidden_dim: int, matrices: Matrices = ()) -> Kernel:
    """The kernel called ``name``; of "auto", the first that is right for these rows [n, D], this rank's F and the weights.

    Raises:
        UserError: there is none of that name, or it cannot run these, or is not installed.
    """
    named = {kernel.name: kernel for kernel in KERNELS.values() if kernel.trains}
    kernel = named.get(name)
    if kernel and kernel.runs(x, hidden_dim):
        kernel.load()
        return kernel
    right = next(each for each in KERNELS.values() if each.suits(x, matrices) and each.runs(x, hidden_dim))
    if name == "auto":
        _say_picked(right.name, x.dtype, x.device)
        return right
    if kernel is None:
        raise UserError(f"model.kernel: unknown kernel '{name}'{nearest(name, ['auto', *named])}")
    raise UserError(
        f"model.kernel: '{name}' cannot compute experts of {x.shape[1]} x {hidden_dim} numbers in "
        f"{_name(x.dtype)} on {x.device.type}: it needs {kernel.needs}; '{right.name}' can"
    )


@functools.cache
def _say_picked(kernel: str, dtype: torch.dtype, device: torch.device) -> None:
    """Once of each; on a CPU it is always the same."""
    if device.type != "cpu":
        say(f"experts in {_name(dtype)} on {device.type} are computed by kernel '{kernel}' (model.kernel names another)")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
