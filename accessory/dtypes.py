"""Precisions by the names users write."""

import torch
from torch import Tensor

from accessory.config import nearest
from accessory.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def get_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"unknown precision '{name}'{nearest(name, list(DTYPES))}")
    return DTYPES[name]


def at_least(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and statistics of values in ``dtype``: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def at_least_fp32(x: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; fp32 and fp64 stay: where precision matters, never less than fp32."""
    return x.to(at_least(x.dtype))


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite; one fast sum says so unless it overflows."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
