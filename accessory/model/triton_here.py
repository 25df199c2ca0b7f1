"""Whether Triton's kernels run: compiled on a GPU, or interpreted on a CPU, which is slow and for trying them.

Nothing here imports Triton: that takes as long as all the rest of a start.
"""

import functools
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

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


def triton_compiles(x: Tensor) -> bool:
    """Whether a kernel over what lies where ``x`` does is compiled, and so worth its while."""
    return x.device.type == "cuda" and is_installed("triton") and triton_runs(x)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def wide_type(x: Tensor) -> Any:
    """Triton's dtype for sums and statistics of such values: fp32, or fp64 for fp64, which is for the interpreter."""
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32
