"""The dropless experts of MegaBlocks (Gale et al. 2022) of the packages' own parts: rows padded to blocks of 128, and their
products with all experts' matrices at once, of which only the blocks on the diagonal are computed (stk).

The packages are from 2025, and are used with what is current as they were then (docs/kernels.md): ``load_megablocks`` and
``topology`` say what is mended, and nobody else's use of Triton changes.
"""

import functools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.errors import needs
from accessory.model import triton_here
from accessory.model.moe.kernels import megablocks_ops
from accessory.model.moe.kernels.grouped import grouped_matmul
from accessory.model.moe.kernels.looped import looped
from accessory.model.moe.weights import ExpertWeights

BLOCK = 128
INSTALL = "make megablocks, where this program's sources are"
MEGABLOCKS_NEEDS = f"fp32, fp16 or bf16, widths that {BLOCK} divides, and {triton_here.NEEDS}"


def megablocks_runs(x: Tensor, hidden_dim: int) -> bool:
    return x.dtype != torch.float64 and x.shape[1] % BLOCK == 0 and hidden_dim % BLOCK == 0 and triton_here.triton_runs(x)


class _Packages(NamedTuple):
    stk: Any
    ops: Any  # of megablocks
    act_fn: Any  # its way to apply a function to the values of stk's matrices


@functools.cache
def load_megablocks() -> _Packages:
    """The packages.

    Raises:
        UserError: one is not installed.
    """
    with needs("model.kernel=megablocks", INSTALL), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grouped GEMM not available")  # it is not used
        import stk
        import stk.ops

        with _standing_in("megablocks_ops", megablocks_ops):
            import megablocks.backend.kernels as megablocks_kernels
            from megablocks import ops
            from megablocks.layers.activation_fn import act_fn
    if triton_here.is_interpreted():  # the tuner asks for a GPU as soon as there is a choice
        for kernel in (megablocks_kernels._padded_copy, megablocks_kernels._padded_copy_wgrad):
            kernel.configs = kernel.configs[-1:]
    return _Packages(stk, ops, act_fn)


@contextmanager
def _standing_in(name: str, module: ModuleType) -> Iterator[None]:
    """``module`` is what ``import name`` finds meanwhile, unless there is one."""
    if triton_here.is_installed(name):
        yield
        return
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


@dataclass(frozen=True)
class _Padding:
    """Where the rows go when each expert's get a whole number of blocks: as megablocks' gather and scatter take it."""

    order_n: Tensor
    expert_n: Tensor
    ends_e: Tensor
    padded_ends_e: Tensor

    @classmethod
    def of(cls, row_ends: Tensor, n: int) -> "_Padding":
        ops = load_megablocks().ops
        counts = ops.round_up(torch.diff(row_ends, prepend=row_ends.new_zeros(1)), BLOCK)
        order = torch.arange(n, dtype=torch.int32, device=row_ends.device)
        expert = torch.searchsorted(row_ends, order, right=True, out_int32=True)
        return cls(order, expert, row_ends, ops.inclusive_cumsum(counts, 0).reshape(-1))  # of one expert it is a scalar

    def pad(self, x: Tensor) -> Tensor:
        """[n, W] -> [padded rows, W], zeros between; their number comes to the host."""
        gather = load_megablocks().ops.padded_gather
        return gather(x.contiguous(), self.order_n, self.expert_n, self.ends_e, self.padded_ends_e, 1)

    def unpad(self, y: Tensor, weight_n: Tensor) -> Tensor:
        """[padded rows, W] -> [n, W], each row times its weight."""
        scatter = load_megablocks().ops.padded_scatter
        return scatter(y, self.order_n, self.expert_n, weight_n, self.ends_e, self.padded_ends_e, 1)


def topology(padded_ends_e: Tensor, x: Tensor, width: int) -> Any:
    """An stk matrix of no values, [rows of ``x``, e * width]: the rows of expert e have blocks in its columns alone.

    The numbers of blocks are int32: Triton since 3.2 multiplies int16 ones, as megablocks makes them, in int16, and
    beyond 255 blocks (32640 rows, or columns) products were read from, and written to, anywhere.
    """
    stk, ops, _ = load_megablocks()
    block_rows, columns = len(x) // BLOCK, width // BLOCK
    offsets = torch.arange(0, block_rows * columns + 1, columns, dtype=torch.int32, device=x.device)
    column_indices = ops.topology(padded_ends_e, BLOCK, block_rows, columns).int()
    shape = torch.Size((len(x), len(padded_ends_e) * width))
    data = x.new_empty(1).expand(len(column_indices), BLOCK, BLOCK)
    row_indices = stk.ops.row_indices(shape, data, offsets, column_indices)
    return stk.Matrix(shape, data, row_indices, column_indices, offsets)


def megablocks(
    x: Tensor, w1: ExpertWeights, w2: ExpertWeights, w3: ExpertWeights, weight: Tensor, row_ends: Tensor
) -> Tensor:
    """All experts' matrices are asked for, and w2 is copied into stk's order, [e * F, D]."""
    stk, _, act_fn = load_megablocks()
    if not len(x):
        return looped(x, w1, w2, w3, weight, row_ends)
    padding = _Padding.of(row_ends, len(x))
    x = padding.pad(x)
    blocks = topology(padding.padded_ends_e, x, w1.shape[1])
    gate, up = (stk.ops.sdd(x, w[:].flatten(0, 1).t(), blocks) for w in (w1, w3))
    h = stk.ops.mul(act_fn(gate, F.silu), up)
    return padding.unpad(stk.ops.dsd(h, w2[:].mT.flatten(0, 1)), weight.flatten())


def megablocks_matmul(x: Tensor, w: ExpertWeights, row_ends: Tensor) -> Tensor:
    """By stk where 128 divides the widths, and as the grouped kernel does where not: an adapter's rank."""
    stk = load_megablocks().stk
    if w.shape[1] % BLOCK or w.shape[2] % BLOCK or not len(x):
        return grouped_matmul(x, w, row_ends)
    padding = _Padding.of(row_ends, len(x))
    padded = padding.pad(x)
    blocks = stk.ops.sdd(padded, w[:].flatten(0, 1).t(), topology(padding.padded_ends_e, padded, w.shape[1])).data
    y = blocks.view(len(padded) // BLOCK, -1, BLOCK, BLOCK).transpose(1, 2).reshape(len(padded), w.shape[1])
    return padding.unpad(y, x.new_ones(len(x))).clone()  # what it returns is a view, to which nothing may be added
