"""How the experts' SwiGLU over sorted rows is computed: one record a kernel, in one table.

``x`` [n, D] holds the rows of expert 0, then of expert 1, ...; ``row_ends`` [e] (int32) says where each expert's rows end;
``w1, w3`` [e, F, D] and ``w2`` [e, D, F] are the experts' weights; ``weight`` [n, 1] is each row's routing weight.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from accessory.config import nearest
from accessory.errors import UserError
from accessory.model.moe.kernels.grouped import GROUPED_NEEDS, grouped, grouped_matmul, grouped_runs
from accessory.model.moe.kernels.looped import looped, looped_matmul
from accessory.model.moe.kernels.packed import packed_matmul, packed_swiglu
from accessory.model.moe.kernels.reference import reference, reference_matmul
from accessory.model.moe.weights import ExpertWeights

ExpertSwiGLU = Callable[[Tensor, ExpertWeights, ExpertWeights, ExpertWeights, Tensor, Tensor], Tensor]
ExpertMatmul = Callable[[Tensor, ExpertWeights, Tensor], Tensor]


def _runs_any(x: Tensor, hidden_dim: int) -> bool:
    return True


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
        slow_on: types of device where a kernel further down is faster.
    """

    name: str
    swiglu: ExpertSwiGLU
    matmul: ExpertMatmul
    runs: Callable[[Tensor, int], bool]
    needs: str
    slow_on: tuple[str, ...] = ()


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("grouped", grouped, grouped_matmul, grouped_runs, GROUPED_NEEDS, slow_on=("cpu",)),
        Kernel("looped", looped, looped_matmul, _runs_any, "nothing"),
        Kernel("reference", reference, reference_matmul, _runs_any, "nothing"),
    )
}

OF_PACKED = Kernel("packed", packed_swiglu, packed_matmul, _runs_any, "packed weights")  # not to be chosen: it is theirs


def pick_kernel(name: str, x: Tensor, hidden_dim: int) -> Kernel:
    """The kernel called ``name``; of "auto", the first that is right for these rows [n, D] and this rank's F.

    Raises:
        UserError: there is none of that name, or it cannot run these.
    """
    kernel = KERNELS.get(name)
    if kernel and kernel.runs(x, hidden_dim):
        return kernel
    right = next(each for each in KERNELS.values() if x.device.type not in each.slow_on and each.runs(x, hidden_dim))
    if name == "auto":
        return right
    if kernel is None:
        raise UserError(f"model.kernel: unknown kernel '{name}'{nearest(name, ['auto', *KERNELS])}")
    raise UserError(
        f"model.kernel: '{name}' cannot compute experts of {x.shape[1]} x {hidden_dim} numbers in "
        f"{str(x.dtype).removeprefix('torch.')} on {x.device.type}: it needs {kernel.needs}; '{right.name}' can"
    )
