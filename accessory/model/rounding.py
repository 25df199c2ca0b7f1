"""Rounding a matrix so that its products change least: GPTQ (Frantar et al. 2022), and then block by block once more.

Its inputs are rounded one after the other. What rounding one of them changes in the products, those that are not rounded yet
make up for as far as they can, which depends on how inputs go together in the rows that the matrix is multiplied with. Those
of a block are taken in an order of its own, and each block's grid is the one of several with which that ends best. When all
are rounded, each block is tried anew for what the others then lack, with grids near its own, and kept if that is better.

Shapes: K inputs, k of them a block, M outputs, C grids tried side by side.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.dtypes import at_least_fp32
from accessory.model.codecs import Codec, Parts

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Of what its values reach below zero, and above, as far as each block's grid is tried to reach."""
NEAR = (0.94, 0.97, 0.985, 1.0, 1.015, 1.03, 1.06)
"""Times the scale that suits a block's codes best, are those with which it is rounded anew."""
SWEEPS = 2
"""Over all blocks, to round them anew; a third would take less than half a percent off what is lost."""
DAMPING = 0.01
"""Added to the mean square of each input, as a share of their mean: for what the rows do not say."""
STEP = 128
"""Inputs of a block, where a row has one scale: that of rounding to the nearest."""


@dataclass
class _Rounded:
    """A block: codes uint8 [k, M], the grids [M] that they are of, and what they stand for [k, M]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    numbers: Tensor


def encode_for_rows(codec: Codec, matrix: Tensor, gram: Tensor) -> Parts:
    """The parts of ``matrix`` [out, in] whose product with certain rows x [n, in] is near to its own.

    Args:
        gram: x.T @ x [in, in] of the rows.

    Raises:
        ValueError: the matrix holds what no block can hold.
    """
    wanted = at_least_fp32(matrix).T.contiguous()
    width, step = len(wanted), codec.group or STEP
    blocks = [slice(start, min(start + step, width)) for start in range(0, width, step)]
    of_rows = None if codec.group else tuple(each.squeeze(-1)[None] for each in codec.grid(wanted.T))
    damped = _damped(gram)
    factor, cost = _factor(damped).to(wanted.dtype), damped.to(wanted.dtype)
    left, found = wanted.clone(), list[_Rounded]()
    for block in blocks:
        own = factor[block, block]
        grids = of_rows or _grids(codec, left[block])
        found.append(_round(codec, left[block], torch.cholesky_inverse(own, upper=True), *grids))
        errors = torch.linalg.solve_triangular(own.T, left[block] - found[-1].numbers, upper=False)
        left[block.stop :] -= factor[block, block.stop :].T @ errors
    rounded = torch.cat([each.numbers for each in found])
    for _, (n, block) in itertools.product(range(SWEEPS), enumerate(blocks)):
        pull = cost[block] @ (rounded - wanted)
        found[n] = _round_anew(codec, found[n], cost[block, block], pull)
        rounded[block] = found[n].numbers
    of_blocks = found if codec.group else found[:1]
    scale, zero = (torch.stack(each, 1)[..., None] for each in zip(*((b.scale, b.zero) for b in of_blocks), strict=True))
    return codec.parts(torch.cat([each.codes for each in found]).T, scale, zero)


def _round(codec: Codec, target: Tensor, cost: Tensor, scale: Tensor, zero: Tensor) -> _Rounded:
    """A block near ``target`` [k, M]: of those that GPTQ makes with each grid [C, M] what costs least in each column.

    Args:
        cost: [k, k], positive definite. An error d of a column costs d @ cost @ d.
    """
    order = _order(cost)
    factor = _factor(cost[order][:, order])
    left = target[order].unsqueeze(1).repeat(1, len(scale), 1)
    codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    lost = torch.zeros_like(left[0])
    for n, values in enumerate(left):
        codes[n] = codec.nearest(values, scale, zero)
        error = (values - codec.numbers(codes[n], scale, zero)) / factor[n, n]
        lost += error**2
        left[n + 1 :] -= factor[n, n + 1 :, None, None] * error
    best = lost.argmin(0, keepdim=True)
    scale, zero = (each.gather(0, best).squeeze(0) for each in (scale, zero))
    of_best = torch.empty_like(codes[:, 0])
    of_best[order] = codes.gather(1, best.expand(len(codes), -1, -1)).squeeze(1)
    return _Rounded(of_best, scale, zero, codec.numbers(of_best, scale, zero).to(target.dtype))


def _round_anew(codec: Codec, held: _Rounded, cost: Tensor, pull: Tensor) -> _Rounded:
    """A block that costs no more than ``held`` in any column, beside the other blocks as they are.

    Args:
        cost: [k, k], of its own errors. pull: [k, M], half of how the cost rises with each of its numbers.
    """
    scale, zero = held.scale[None], held.zero[None]
    if codec.group:
        scale, zero = _near(codec, held, cost, pull)
    tried = _round(codec, held.numbers - torch.cholesky_solve(pull, torch.linalg.cholesky(cost)), cost, scale, zero)
    step = tried.numbers - held.numbers
    better = (step * (2 * pull + cost @ step)).sum(0) < 0
    mine, theirs = vars(tried), vars(held)
    chosen = _Rounded(**{name: torch.where(better, mine[name], theirs[name]) for name in mine})
    pull = pull + cost @ (chosen.numbers - held.numbers)
    for n, values in enumerate(chosen.numbers):  # each by itself, beside all others
        wish = values - pull[n] / cost[n, n]
        chosen.codes[n] = codec.nearest(wish, chosen.scale, chosen.zero)
        changed = codec.numbers(chosen.codes[n], chosen.scale, chosen.zero) - values
        pull += torch.outer(cost[n], changed)
        values += changed
    return chosen


def _grids(codec: Codec, block: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros [C, M] for the values of a block [k, M]."""
    low, high = block.aminmax(dim=0)
    reach = [torch.stack([low * below, high * above], -1) for below, above in itertools.product(SHARES, SHARES)]
    scale, zero = codec.grid(torch.stack(reach))
    return scale.squeeze(-1), zero.squeeze(-1)


def _near(codec: Codec, held: _Rounded, cost: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros [C, M] near a block's own: about the scale that suits its codes best, with each zero's neighbours."""
    unit = codec.numbers(held.codes, torch.ones_like(held.scale), held.zero).to(cost.dtype)
    bend = (unit * (cost @ unit)).sum(0).clamp(min=torch.finfo(cost.dtype).tiny)
    fit = torch.clamp(held.scale - (unit * pull).sum(0) / bend, held.scale / 2, held.scale * 2)
    beside = (-1, 0, 1) if codec.has_zeros else (0,)
    pairs = list(itertools.product(NEAR, beside))
    zero = torch.stack([held.zero + more for _, more in pairs]).clamp(0, codec.most)
    return codec.kept(torch.stack([fit * share for share, _ in pairs])), zero


def _order(cost: Tensor) -> Tensor:
    """Of a block's inputs [k]: last those that cost least once all behind them make up for them."""
    left, order = cost.double(), list[Tensor]()
    taken = torch.zeros_like(left[0])
    for _ in range(len(cost)):
        n = (left.diagonal() + taken).argmin(keepdim=True)  # stays where it is: no GPU is waited for
        order.append(n)
        row = left.index_select(0, n)
        left = left - row.T @ row / row.index_select(1, n)
        taken.index_fill_(0, n, torch.inf)
    return torch.cat(order[::-1])


def _damped(gram: Tensor) -> Tensor:
    """In fp64, positive definite."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    return gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (DAMPING * mean if mean else 1.0)


def _factor(cost: Tensor) -> Tensor:
    """The upper triangular U of U.T @ U = inverse of ``cost``: its rows say who makes up for whom."""
    root = torch.linalg.cholesky(cost.flip(0, 1)).flip(0, 1)  # upper: root @ root.T is it
    return torch.linalg.solve_triangular(root, torch.eye(len(cost), dtype=cost.dtype, device=cost.device), upper=True)
