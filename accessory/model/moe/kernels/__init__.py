"""How the experts' SwiGLU over sorted rows is computed: one record a kernel, in one table.

``x`` [n, D] holds the rows of expert 0, then of expert 1, ...; ``row_ends`` [e] (int32) says where each expert's rows end;
``w1, w3`` [e, F, D] and ``w2`` [e, D, F] are the experts' weights; ``weight`` [n, 1] is each row's routing weight.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.config import nearest
from accessory.console import say
from accessory.errors import UserError
from accessory.model.moe.kernels.grouped import GROUPED_NEEDS, grouped, grouped_matmul, grouped_runs, grouped_waits
from accessory.model.moe.kernels.looped import looped, looped_matmul
from accessory.model.moe.kernels.megablocks import (
    MEGABLOCKS_NEEDS,
    load_megablocks,
    megablocks,
    megablocks_matmul,
    megablocks_runs,
)
from accessory.model.moe.kernels.packed import packed_matmul, packed_swiglu
from accessory.model.moe.kernels.reference import reference, reference_matmul
from accessory.model.moe.kernels.triton_experts import (
    TRITON_EXPERTS_NEEDS,
    load_triton,
    triton_experts,
    triton_experts_run,
    triton_experts_suit,
    triton_matmul,
)
from accessory.model.moe.weights import ExpertWeights, MaybeAdapted

ExpertSwiGLU = Callable[[Tensor, ExpertWeights, ExpertWeights, ExpertWeights, Tensor, Tensor], Tensor]
AdaptedSwiGLU = Callable[[Tensor, MaybeAdapted, MaybeAdapted, MaybeAdapted, Tensor, Tensor], Tensor]
ExpertMatmul = Callable[[Tensor, ExpertWeights, Tensor], Tensor]


def _runs_any(x: Tensor, hidden_dim: int) -> bool:
    return True


def _here() -> None:
    """Nothing has to be installed."""


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _anywhere(x: Tensor) -> bool:
    return True


def _never(x: Tensor) -> bool:
    return False


@dataclass(frozen=True)
class Kernel:
    """One way to compute the experts.

    Attributes:
        name: for ``model.kernel`` of a run.
        swiglu: of (x, w1, w2, w3, weight, row_ends): ``weight * w2(silu(w1 x) * (w3 x))``, [n, D].
        matmul: of (x, w, row_ends), with x [n, in] and w [e, out, in]: each row times its expert's matrix, [n, out]. Of such
            products experts with adapters are composed.
        runs: whether it can, by dtype, device and widths of rows [n, D] and this rank's F.
        needs: the same in words.
        suits: whether "auto" takes it for rows [n, D], if it runs and none before it in the table does.
        waits: whether the host waits for a GPU to say where each expert's rows [n, D] end.
        load: imports what the kernel is made of.
        by_triton: whether that is Triton, which may interpret it.
        adapted: the same as ``swiglu``, of matrices some of which are ``AdaptedWeights``; None: experts with adapters are
            composed of products.
    """

    name: str
    swiglu: ExpertSwiGLU
    matmul: ExpertMatmul
    runs: Callable[[Tensor, int], bool]
    needs: str
    suits: Callable[[Tensor], bool] = _never
    waits: Callable[[Tensor], bool] = _anywhere
    load: Callable[[], object] = _here
    by_triton: bool = False
    adapted: AdaptedSwiGLU | None = None


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel(
            "triton",
            triton_experts,
            triton_matmul,
            triton_experts_run,
            TRITON_EXPERTS_NEEDS,
            suits=triton_experts_suit,
            waits=_never,
            load=load_triton,
            by_triton=True,
        ),
        Kernel("grouped", grouped, grouped_matmul, grouped_runs, GROUPED_NEEDS, suits=_on_gpu, waits=grouped_waits),
        Kernel("looped", looped, looped_matmul, _runs_any, "nothing", suits=_anywhere, adapted=looped),
        Kernel(
            "megablocks",
            megablocks,
            megablocks_matmul,
            megablocks_runs,
            MEGABLOCKS_NEEDS,
            load=load_megablocks,
            by_triton=True,
        ),
        Kernel("reference", reference, reference_matmul, _runs_any, "nothing"),
    )
}

OF_PACKED = Kernel("packed", packed_swiglu, packed_matmul, _runs_any, "packed weights")  # not to be chosen: it is theirs


def pick_kernel(name: str, x: Tensor, hidden_dim: int) -> Kernel:
    """The kernel called ``name``; of "auto", the first that is right for these rows [n, D] and this rank's F.

    Raises:
        UserError: there is none of that name, or it cannot run these, or is not installed.
    """
    kernel = KERNELS.get(name)
    if kernel and kernel.runs(x, hidden_dim):
        kernel.load()
        return kernel
    right = next(each for each in KERNELS.values() if each.suits(x) and each.runs(x, hidden_dim))
    if name == "auto":
        _say_picked(right.name, x.dtype, x.device)
        return right
    if kernel is None:
        raise UserError(f"model.kernel: unknown kernel '{name}'{nearest(name, ['auto', *KERNELS])}")
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
