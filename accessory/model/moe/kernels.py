"""How a grouped matrix product over sorted rows is computed.

``x`` [N, in] holds the rows of group 0, then of group 1, ...; ``ends`` [E] (int32) says where each group ends; row n is
multiplied by its group's ``w[e]`` [out, in]. Every kernel gives the same result; another one (block-sparse megablocks,
say) is another entry in KERNELS.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

GroupedMM = Callable[[Tensor, Tensor, Tensor], Tensor]


def loop_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """One product per group. The plain reference; runs in any dtype, fp64 too, and waits for ``ends`` on the host."""
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    # unbind, not w[e]: the backward of indexing fills a whole [E, out, in] gradient for every group
    return torch.cat([x[a:b] @ w_e.T for a, b, w_e in zip(starts, stops, w.unbind(0), strict=True)])


def torch_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """torch's grouped matmul: CUTLASS on GPU, without a host sync; not in fp64."""
    return F.grouped_mm(x, w.transpose(1, 2), offs=ends)


KERNELS: dict[str, GroupedMM] = {"loop": loop_mm, "grouped": torch_mm}


def grouped_mm(kernel: str, x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Grouped product by the named kernel; "auto" is torch's wherever dtype and strides let it run."""
    if kernel == "auto":
        aligned = all(size * x.element_size() % 16 == 0 for size in w.shape[1:])
        kernel = "grouped" if aligned and x.dtype in (torch.float32, torch.bfloat16, torch.float16) else "loop"
    return KERNELS[kernel](x, w, ends)


def swiglu(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """``silu(gate) * up * weight`` for ``gate``, ``up`` [N, F] and one ``weight`` [N, 1] per row.

    Plain arithmetic keeps silu(gate) and silu(gate) * up for backward; this keeps only the inputs, and on CPU works
    through blocks of rows that stay in cache.
    """
    return _SwiGLU.apply(gate, up, weight)


def swiglu_reference(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    return F.silu(gate) * up * weight


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        out = torch.empty_like(gate)
        for g, u, w, o in _blocks(gate, up, weight, out):
            torch.mul(F.silu(g).mul_(u), w, out=o)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        d_gate, d_up, d_weight = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(weight)
        for g, u, w, d, dg, du, dw in _blocks(gate, up, weight, grad, d_gate, d_up, d_weight):
            grad_silu = d * F.silu(g)
            torch.sum(grad_silu * u, -1, keepdim=True, out=dw)
            torch.mul(grad_silu, w, out=du)
            torch.ops.aten.silu_backward(d * u * w, g, grad_input=dg)
        return d_gate, d_up, d_weight


def _blocks(*tensors: Tensor) -> "zip[tuple[Tensor, ...]]":
    rows = max(1, 2**17 // tensors[0].shape[1]) if tensors[0].device.type == "cpu" else max(1, len(tensors[0]))
    return zip(*(t.split(rows) for t in tensors), strict=True)
