"""Precisions by the names users write."""

import torch
from torch import Tensor

from accessory.config import nearest
from accessory.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def get_dtype(name: str | torch.dtype) -> torch.dtype:
    """One of DTYPES by its name, or itself. Raises UserError: it is none of them."""
    if isinstance(name, torch.dtype) and name in DTYPES.values():
        return name
    if not isinstance(name, str) or name not in DTYPES:
        raise UserError(f"unknown precision '{name}'{nearest(str(name), list(DTYPES))}")
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
