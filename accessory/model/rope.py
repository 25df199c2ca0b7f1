"""Rotary position embedding over interleaved pairs (Su et al. 2021), as Mistral's own weights expect it."""

import torch
from torch import Tensor

from accessory.dtypes import at_least_fp32


def rotations(positions: Tensor, head_dim: int, theta: float, scaling: float | None, dtype: torch.dtype) -> Tensor:
    """Complex rotations [..., head_dim / 2] for integer ``positions`` [...].

    ``scaling`` multiplies positions. Computed in fp64 and kept as complex64, or complex128 for an fp64 model.
    """
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions.to(torch.float64).unsqueeze(-1) * (scaling or 1.0) * theta**-exponent
    rotation = torch.polar(torch.ones_like(angles), angles)
    return rotation if dtype == torch.float64 else rotation.to(torch.complex64)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate ``x`` [T, heads, head_dim] by ``rotation`` [T, head_dim / 2], in at least fp32."""
    pairs = torch.view_as_complex(at_least_fp32(x).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation.unsqueeze(-2)).flatten(-2).to(x.dtype)
