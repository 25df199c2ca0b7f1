"""Rounding a matrix so that its products change least: GPTQ (Frantar et al. 2022).

Its inputs are taken one after the other. What rounding one of them changes in the products, those that are not rounded yet
make up for as far as they can, which depends on how inputs go together in the rows that the matrix is multiplied with.
"""

import torch
from torch import Tensor

from accessory.dtypes import at_least_fp32
from accessory.model.codecs import Codec, Parts

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Of its width, among which each block's grid takes the best: where few values lie far out, finer steps are worth more."""
DAMPING = 0.01
"""Added to the mean square of each input, as a share of their mean: for what the rows do not say."""
STEP = 128
"""Inputs after which what they leave to the others is added up, where a row is one block."""


def encode_for_rows(codec: Codec, matrix: Tensor, gram: Tensor) -> Parts:
    """The parts of ``matrix`` [out, in] whose product with certain rows x [n, in] is nearest to its own.

    Each block's grid is made for its values once they make up for the inputs before.

    Args:
        gram: x.T @ x [in, in] of the rows.

    Raises:
        ValueError: the matrix holds what no block can hold.
    """
    width = matrix.shape[1]
    group = codec.group or width
    left = at_least_fp32(matrix).T.contiguous()  # [in, out]: of each input what is to be rounded
    factor = _factor(gram).to(left.dtype)
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    grids: list[tuple[Tensor, Tensor]] = []
    for start in range(0, width, codec.group or STEP):
        stop = min(start + (codec.group or STEP), width)
        if start % group == 0:
            weight = factor.diagonal()[start : start + group] ** -2  # of an input's error: what no other can make up for
            grids.append(_best_grid(codec, left[start : start + group].T.contiguous(), weight))
        grid = [each.squeeze(1) for each in grids[-1]]
        block, errors, inside = left[start:stop], torch.empty_like(left[start:stop]), factor[start:stop, start:stop]
        for n, values in enumerate(block):
            codes[start + n] = codec.nearest(values, *grid)
            errors[n] = (values - codec.numbers(codes[start + n], *grid)) / inside[n, n]
            block[n + 1 :] -= torch.outer(inside[n, n + 1 :], errors[n])
        left[stop:] -= factor[start:stop, stop:].T @ errors
    scale, zero = (torch.stack(each, 1) for each in zip(*grids, strict=True))
    return codec.parts(codes.T, scale, zero)


def _best_grid(codec: Codec, block: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero [out, 1] with which the values of each row of a block [out, group] lose least."""
    grids = [codec.grid(block * share) for share in SHARES]
    errors = torch.stack([codec.numbers(codec.nearest(block, *grid), *grid) - block for grid in grids])
    best = (errors**2 * weight).sum(-1, keepdim=True).argmin(0, keepdim=True)
    scale, zero = (torch.stack(each).gather(0, best).squeeze(0) for each in zip(*grids, strict=True))
    return scale, zero


def _factor(gram: Tensor) -> Tensor:
    """The upper triangular U of U.T @ U = inverse of the damped ``gram``, in fp64: its rows say who makes up for whom."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    damped = gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (DAMPING * mean if mean else 1.0)
    root = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)  # upper: root @ root.T is it
    return torch.linalg.solve_triangular(root, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), upper=True)
