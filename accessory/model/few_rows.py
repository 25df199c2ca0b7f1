"""What a decoder does to a few tokens on a CPU, at the speed of reading its weights: few_rows.c, compiled in a blink where
there is a C compiler. Without one, torch's own operators do it.

A row's result depends neither on the other rows nor on the number of threads, to the last bit.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.console import say

FEW = 16
"""Rows up to which this is taken. On a processor that multiplies bf16 by AVX-512 oneDNN is slower even at 32; without
that it is slower up to 8 rows of bf16, and here it would be a quarter faster at 16."""
PANEL = 64
SOURCE = Path(__file__).with_suffix(".c")
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
Pointer = ctypes.c_void_p
Kept = tuple[Tensor, Tensor]
"""Keys and values as ``LayerCache`` has them."""
Places = tuple[Tensor, Tensor, Tensor]
"""``places``, ``table`` and ``used`` of ``CacheView``."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """few_rows.c, compiled for this processor; None: there is no compiler, or not one that can."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="accessory-") as folder:
        made = Path(folder, "few_rows.so")
        command = [compiler, "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", str(SOURCE), "-o", str(made), "-lm"]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if ended.returncode == 0:
                return ctypes.CDLL(str(made))
            why = ended.stderr.strip().splitlines()[-1:]
        except (OSError, subprocess.TimeoutExpired) as error:
            why = [str(error)]
    say(f"answers come more slowly than they could on this CPU: {compiler} cannot compile few_rows.c ({' '.join(why)})")
    return None


def runs(dtype: torch.dtype) -> bool:
    """Whether what is here is to be had, for values in ``dtype``; it knows no gradients."""
    return dtype in TYPES and library() is not None


@functools.cache
def _function(name: str, dtype: torch.dtype, pointers: int, sizes: int, *numbers: Any) -> Any:
    """One of the library's; between pointers and sizes come other numbers, last the number of threads."""
    function = getattr(library(), f"{name}_{TYPES[dtype]}")
    function.argtypes = [Pointer] * pointers + list(numbers) + [ctypes.c_long] * sizes + [ctypes.c_int]
    function.restype = None
    return function


@functools.cache
def lies_in_panels(shape: torch.Size, dtype: torch.dtype) -> bool:
    """Whether a packed matrix of this kind lies as few_rows.c reads it, which oneDNN promises nowhere: it is tried."""
    out, inputs = shape
    if not runs(dtype) or inputs % 2:
        return False
    generator = torch.Generator().manual_seed(0)
    x, matrix = (torch.randn(rows, inputs, generator=generator).to(dtype) for rows in (1, out))
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix, None)
    if torch.ops.mkldnn._nbytes(packed) < -(-out // PANEL) * PANEL * inputs * dtype.itemsize:
        return False
    error = (few_rows_product(x, packed) - x @ matrix.T).float().norm() / (x @ matrix.T).float().norm()
    return bool(error < (1e-5 if dtype == torch.float32 else 1e-2))


def few_rows_product(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix.T`` of ``x`` [n, in] and a packed matrix [out, in]."""
    assert x.dtype == matrix.dtype, f"{x.dtype} times {matrix.dtype}"
    (out, inputs), rows, x = matrix.shape, len(x), x.contiguous()
    y = x.new_empty(rows, out)
    function = _function("product", x.dtype, 3, 3)
    function(address(matrix), x.data_ptr(), y.data_ptr(), rows, out, inputs, torch.get_num_threads())
    return y


def address(matrix: Tensor) -> int:
    """Where a packed matrix lies."""
    place: int = torch.ops.mkldnn.data_ptr(matrix)
    return place


def addresses(matrices: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    return (Pointer * len(matrices))(*map(address, matrices))


def few_rows_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, local: range, places: Sequence[Any], hidden_dim: int
) -> Tensor:
    """The sum over each row's choices, as far as they are ``local``, of ``weight * w2(silu(w1 x) * (w3 x))``: [n, D].

    Args:
        x: [n, D]. chosen, weights: [n, K] experts, and fp32 what each counts.
        places: of w1, w2 and w3, in which ``hidden_dim`` is F, the ``addresses`` of the local experts' matrices.
    """
    assert weights.dtype == torch.float32
    x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.contiguous()
    (rows, dim), choices = x.shape, chosen.numel()
    order = chosen.new_empty(choices + len(local), dtype=torch.int32)
    sorted_x, hidden = x.new_empty(choices, dim), x.new_empty(choices, hidden_dim)
    sums, y = x.new_empty(rows, dim, dtype=torch.float32), torch.empty_like(x)
    tensors = (tensor.data_ptr() for tensor in (x, chosen, weights, order, sorted_x, hidden, sums, y))
    sizes = rows, choices // rows, local.start, len(local), dim, hidden_dim
    _function("experts", x.dtype, 11, 6)(*places, *tensors, *sizes, torch.get_num_threads())
    return y


def few_rows_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` of ``x`` [n, D]."""
    assert x.dtype == weight.dtype, f"{x.dtype} times {weight.dtype}"
    x = x.contiguous()
    y = torch.empty_like(x)
    function = _function("norm", x.dtype, 3, 2, ctypes.c_double)
    function(x.data_ptr(), weight.data_ptr(), y.data_ptr(), eps, *x.shape, torch.get_num_threads())
    return y


def few_rows_attend(
    q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, kept: Kept, documents: Places, window: int | None
) -> Tensor:
    """What the only new token of each of n documents sees, [n, H, head_dim]; its key and value are kept.

    ``q`` are queries [n, H, head_dim], ``k``, ``v`` [n, H_kv, head_dim]; ``rotation`` [n, head_dim / 2] turns them.
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    (rows, heads, size), (page, shared), most = q.shape, kept[0].shape[1:3], documents[1].shape[1]
    y, scores = torch.empty_like(q), q.new_empty(rows * heads * most * page, dtype=torch.float32)
    tensors = (tensor.data_ptr() for tensor in (q, k, v, rotation, *kept, *documents, scores, y))
    function = _function("attend", q.dtype, 11, 7)
    function(*tensors, rows, heads, shared, size, page, most, window or 0, torch.get_num_threads())
    return y


class BlockWeights(ctypes.Structure):
    """A block of the decoder that is whole on this rank, as few_rows.c knows it: where its weights lie, and its sizes."""

    _fields_ = [
        *((name, Pointer) for name in ("attention_norm", "ffn_norm", "wq", "wk", "wv", "wo", "gate", "bias")),
        *((name, ctypes.POINTER(Pointer)) for name in ("w1", "w2", "w3")),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_long) for name in ("dim", "heads", "shared", "size", "experts", "top", "hidden")),
    ]


def few_rows_block(
    block: BlockWeights, x: Tensor, rotation: Tensor, kept: Kept, documents: Places, window: int | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """``x`` [n, D], the only new token of each of n documents, behind the block; and what ``Routing`` has."""
    x, rows, page, most = x.contiguous(), len(x), kept[0].shape[1], documents[1].shape[1]
    logits, probs, weights = (x.new_empty(rows, n, dtype=torch.float32) for n in (block.experts, block.experts, block.top))
    chosen, y = x.new_empty(rows, block.top, dtype=torch.int64), torch.empty_like(x)
    tensors = (t.data_ptr() for t in (x, rotation, *kept, *documents, logits, probs, weights, chosen, y))
    function = _function("block", x.dtype, 13, 4)
    function(ctypes.addressof(block), *tensors, rows, page, most, window or 0, torch.get_num_threads())
    return y, (logits, probs, weights, chosen)
