"""The certificate in bf16. Rounding would hide errors in the result of a whole step, so each piece is checked by itself.

The bounds leave room for rounding to bf16 only in pieces that are meant to compute in bf16, not in those in fp32.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.certify.formats import largest
from accessory.certify.harness import Tensors, build_problem, gradients, micro_batches
from accessory.certify.judge import Verdict, reference_steps, relative
from accessory.certify.matrix import Mode, mode_settings, model_parallel_sizes, modes, partition
from accessory.certify.pieces import Masters, Pieces, wide
from accessory.certify.problem import OPTIM, Z_WEIGHT, Problem
from accessory.certify.processes import Failure
from accessory.checkpoint.state import StateNotes, TrainingState
from accessory.data.loader import Batch
from accessory.model.build import build_model
from accessory.model.head import LossSum
from accessory.model.moe.layouts import LAYOUTS, get_layout
from accessory.parallel.mesh import make_mesh
from accessory.train.balance import RouterLosses, document_balance, z_loss
from accessory.train.objective import NextToken
from accessory.train.optim import make_optimizer
from accessory.train.state import save_state
from accessory.train.step import train_step

BOUNDS = {
    "router": 1e-5,
    "choices": 1e-3,
    "norms": 5e-4,
    "angles": 1e-6,
    "rotation": 2e-3,
    "attention": 1e-2,
    "experts": 1e-2,
    "head": 3e-4,
    "balance": 1e-5,
    "z-loss": 1e-5,
    "reduced": 1e-4,
    "norm": 1e-5,
    "masters": 1e-5,
    "curve": 2e-2,
}
SETTINGS = replace(OPTIM, lr=1e-3, clip_grad=math.inf)  # the rate is not changed


@dataclass(frozen=True)
class PrecisionCell:
    """One way to partition and run the steps."""

    world: int
    model_parallel: int
    data_parallel: Mode
    layout: str
    accumulation: int
    tuning: str  # of problem.TUNINGS
    kernel: str = "auto"

    def settings(self) -> dict[str, str]:
        return partition(self) | {"tuning": self.tuning, "kernel": self.kernel}


def precision_cells(worlds: Sequence[int], kernels: Sequence[str]) -> list[PrecisionCell]:
    """Every mesh with every mode, and both layouts on several model-parallel ranks; tuning and accumulation take turns.
    Then the other kernels."""
    turns = itertools.cycle([("full", 1), ("full", 3), ("lora", 1), ("lora", 3)])
    return [
        PrecisionCell(world, size, mode, layout, accumulation, tuning)
        for world in worlds
        for size in model_parallel_sizes(world)
        for mode in modes(world // size)
        for layout in list(LAYOUTS)[: None if size > 1 else 1]
        for tuning, accumulation in [next(turns)]
    ] + [PrecisionCell(worlds[0], worlds[0], "fsdp", "mixtral", 1, "full", kernel) for kernel in kernels]


def run_precision(problem: Problem, cell: PrecisionCell, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Train as one of the cell's ranks.

    Returns:
        errors: by piece. losses: of every step.
    """
    ranks, rank = cell.world // cell.model_parallel, dist.get_rank() // cell.model_parallel
    batches = problem.long_then_short()
    first = [batch.to(device) for r in range(ranks) for batch in micro_batches(batches[0], cell.accumulation, r, ranks)]
    summed = _summed_gradients(problem, cell, first, device) if cell.model_parallel == 1 else {}

    parallel = mode_settings(cell.data_parallel)
    mesh = make_mesh(cell.model_parallel, parallel.dp_shard())
    tuning = problem.tuning(cell.tuning)
    weights = problem.weights(cell.tuning)
    how: dict[str, Any] = {"mode": parallel.data_parallel, "kernel": cell.kernel}
    model = build_problem(problem, cell.layout, device, mesh, tuning=cell.tuning, **how)
    optimizer = make_optimizer(model, SETTINGS)
    masters, pieces = Masters(model, optimizer, weights, SETTINGS), Pieces(model, weights, tuning)
    errors: dict[str, float] = {}
    losses = []
    for batch in batches:
        result = train_step(
            model,
            optimizer,
            [part.to(device) for part in micro_batches(batch, cell.accumulation, rank, ranks)],
            NextToken(),
            RouterLosses("document", Z_WEIGHT),
            clip_grad=SETTINGS.clip_grad,
        )
        if not errors:  # after the first step
            pieces.remove()
            errors = pieces.errors()
            uneven, large = (pieces.sums["router losses"] / (model.args.n_layers * int(result.tokens))).tolist()
            errors |= {"balance": relative(result.balance.item(), uneven), "z-loss": relative(result.z.item(), large)}
            errors["norm"] = relative(result.grad_norm.item(), masters.norm())
            if summed:
                errors["reduced"] = largest(_rms(masters.gradients[name][1], tensor) for name, tensor in summed.items())
        loss_sum = mesh.dp.all_reduce(result.loss_sum.double())
        losses.append(loss_sum.item() / int(result.targets))
    notes = StateNotes(cell.world, len(batches), 0, len(batches), 0, "")
    save_state(model, optimizer, scratch / "state", notes, keep=1)
    return {"errors": errors | {"masters": masters.error(TrainingState(scratch / "state"))}, "losses": losses}


def _summed_gradients(
    problem: Problem, cell: PrecisionCell, batches: list[Batch], device: torch.device
) -> dict[str, Tensor]:
    """The gradients of all ranks' micro-batches, each from an unsharded model, summed in fp64."""
    tuning = problem.tuning(cell.tuning)
    source, layout = Tensors(problem.weights(cell.tuning)), get_layout(cell.layout)
    how: dict[str, Any] = {"dtype": problem.dtype, "device": device, "trains": tuning.trains, "kernel": cell.kernel}
    model = build_model(tuning.logical, layout, source, **how)
    targets, tokens = torch.tensor([[b.target_tokens, b.real_tokens] for b in batches], device=device).sum(0)
    total: dict[str, Tensor] = {}
    for batch in batches:
        loss, stats = model(batch.inputs(), LossSum(batch.targets))
        share = document_balance(stats, tokens, model.args.moe.num_experts_per_tok)
        (loss / targets + model.args.load_balancing_weight * share + Z_WEIGHT * z_loss(stats, tokens)).backward()
        total = {name: wide(gradient) + total.get(name, 0.0) for name, (_, gradient) in gradients(model).items()}
        model.zero_grad()
    return total


def _rms(ours: Tensor, right: Tensor) -> float:
    return ((wide(ours) - right).square().sum() / right.square().sum()).sqrt().item()


class PrecisionJudge:
    """Compares cells with their bounds, and their losses with the reference's."""

    def __init__(self, problem: Problem):
        self.problem, self.bounds = problem, BOUNDS
        self._losses = functools.cache(self._compute)

    def row(self, cell: PrecisionCell, outcome: list[Any] | Failure) -> Verdict:
        if isinstance(outcome, Failure):
            return Verdict(cell, {}, BOUNDS, outcome.reason)
        errors = {name: largest(rank["errors"][name] for rank in outcome) for name in outcome[0]["errors"]}
        pairs = [pair for rank in outcome for pair in zip(rank["losses"], self._losses(cell.tuning), strict=True)]
        return Verdict(cell, errors | {"curve": largest(abs(ours - right) / pairs[0][1] for ours, right in pairs)}, BOUNDS)

    def _compute(self, tuning_name: str) -> list[float]:
        batches = self.problem.long_then_short()
        rates = [SETTINGS.lr] * len(batches)
        steps = reference_steps(self.problem, tuning_name, batches, "document", SETTINGS, rates)
        return [step.parts.ce.item() for step in steps]
