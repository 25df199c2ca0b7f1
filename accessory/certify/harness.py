"""Builds and trains a model with the same parts as a run, and assembles the ranks' results to full tensors."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from accessory.certify.problem import Problem
from accessory.checkpoint.quantise import Quantising
from accessory.data.image_reader import ImageReader
from accessory.data.loader import Batch, BatchPlan, sample_lengths
from accessory.data.packing import Rows
from accessory.data.store import Sample
from accessory.dtypes import at_least
from accessory.model.build import build_model
from accessory.model.decoder import Decoder
from accessory.model.logical import LogicalModel, Region, Shape, Source
from accessory.model.moe.layouts import get_layout
from accessory.model.moe.offload.plan import plan_offload
from accessory.parallel.fsdp import wrap
from accessory.parallel.mesh import ONE_RANK, Axis, Mesh
from accessory.settings import BalanceMode, DataParallel, OffloadSection, OptimSection, Recompute
from accessory.train.balance import RouterLosses
from accessory.train.objective import NextToken, Objective
from accessory.train.optim import make_optimizer
from accessory.train.save import gathered
from accessory.train.step import StepResult, train_step

CPU = torch.device("cpu")
Parts = dict[str, tuple[Region, Tensor]]
"""A model-parallel rank's slices of logical tensors: name -> (region, values)."""


class Tensors:
    """A dictionary of logical tensors as a source."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors

    def read(self, name: str, region: Region) -> Tensor:
        return self.tensors[name][region]


def build(
    logical: LogicalModel,
    layout: str,
    source: Source,
    *,
    mesh: Mesh = ONE_RANK,
    mode: DataParallel = "fsdp",
    dtype: torch.dtype = torch.float64,
    compute: torch.dtype | None = None,
    device: torch.device = CPU,
    recompute: Recompute = "none",
    kernel: str = "auto",
    trains: Set[str] | None = None,
    offload: OffloadSection | None = None,
) -> Decoder:
    """A decoder as in a run: masters in ``dtype``, sharded over data-parallel ranks, computing in ``compute``."""
    plan = None
    if offload:
        plan = plan_offload(offload, logical, get_layout(layout), mesh.mp.size, compute or dtype, 0.0, kernel, trains or ())
    return build_model(
        logical,
        get_layout(layout),
        source,
        mesh=mesh,
        dtype=dtype,
        device=device,
        recompute=recompute,
        kernel=kernel,
        frozen_dtype=compute,
        trains=trains,
        offload=plan,
        shard=lambda model: wrap(model, mesh, mode, compute or dtype, device.type),
    )


def build_problem(
    problem: Problem,
    layout: str,
    device: torch.device,
    mesh: Mesh,
    *,
    tuning: str = "full",
    source: Source | None = None,
    **options: Any,
) -> Decoder:
    """The problem's model, ready to train with ``tuning``; ``source``: of its weights, if not the problem's own."""
    spec = problem.tuning(tuning)
    model = build(
        spec.logical,
        layout,
        source or Quantising(Tensors(problem.weights(tuning)), spec.logical),
        mesh=mesh,
        dtype=at_least(problem.dtype),
        compute=problem.dtype,
        device=device,
        trains=spec.trains,
        **options,
    )
    model.vision = problem.vision(mesh.mp, device)
    return model


def micro_batches(
    samples: Sequence[Sample],
    accumulation: int,
    rank: int,
    ranks: int,
    width: int | None = None,
    images: ImageReader | None = None,
) -> list[Batch]:
    """A data-parallel rank's part of a global batch; ``width``: tokens of a packed row; None: one sample per row."""
    order = np.arange(len(samples))
    rows = Rows.packed(order, sample_lengths(samples), width) if width else Rows.alone(order)
    plan = BatchPlan(-(-len(rows) // (accumulation * ranks)), accumulation, rank, ranks, images=images)
    (batches,) = plan.epoch(samples, rows)
    return batches


def train(
    model: Decoder,
    batches: Sequence[Sequence[Sample]],
    optim: OptimSection,
    *,
    accumulation: int,
    balance: BalanceMode,
    z_weight: float,
    rates: Sequence[float] | None = None,
    width: int | None = None,
    objective: Objective | None = None,
) -> dict[str, Any]:
    """Take one step for each global batch, at its rate; without ``rates`` at ``optim.lr``.

    Returns:
        steps: the result of ``measured`` for each. gradients: Parts, of the first step, clipped. weights: Parts, after the
        last step.
    """
    optimizer = make_optimizer(model, optim)
    first: Parts = {}
    optimizer.register_step_pre_hook(lambda *_: None if first else first.update(gradients(model)))
    dp, visual = model.mesh.dp, model.args.visual
    reader = ImageReader(visual.size) if visual else None
    steps = []
    for samples, rate in zip(batches, rates or [optim.lr] * len(batches), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        mine = [batch.on(model) for batch in micro_batches(samples, accumulation, dp.rank, dp.size, width, reader)]
        losses = RouterLosses(balance, z_weight)
        result = train_step(model, optimizer, mine, objective or NextToken(), losses, clip_grad=optim.clip_grad)
        steps.append(measured(result, dp))
    return {"steps": steps, "gradients": first, "weights": weights(model)}


def measured(result: StepResult, dp: Axis) -> dict[str, Any]:
    """A step's losses and counts over all ranks, reduced as the log reduces them, and its gradient norm."""
    sums = torch.stack([result.loss_sum.double(), result.balance.double(), result.z.double()])
    loss, balance, z = dp.all_reduce(sums).tolist()
    return {
        "loss": loss / max(1, int(result.targets)),
        "balance": balance,
        "z-loss": z,
        "counts": dp.all_reduce(result.counts.clone()).cpu(),
        "norm": result.grad_norm.item(),
        "tokens": int(result.tokens),
        "targets": int(result.targets),
    }


def gradients(model: Decoder) -> Parts:
    """Gradients, whole over data-parallel ranks: of all that trains, and of anything else that has one by mistake."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}
    return _parts(model, whole)


def weights(model: Decoder) -> Parts:
    """Weights, whole over data-parallel ranks."""
    return _parts(model, dict(gathered(model)))


def _parts(model: Decoder, tensors: Mapping[str, Tensor]) -> Parts:
    mp = model.mesh.mp
    regions = {name: model.cuts[name].region(mp.rank, mp.size) for name in tensors}
    return {name: (regions[name], tensor.detach().to("cpu", copy=True)) for name, tensor in tensors.items()}


def assemble(ranks: Sequence[Parts], shapes: Mapping[str, Shape]) -> tuple[dict[str, Tensor], set[str]]:
    """Full logical tensors from every rank's parts, and the names of tensors on which ranks disagree bitwise.

    A tensor that only some ranks have counts as a disagreement and is left out. Values that no rank has are NaN.
    """
    full: dict[str, Tensor] = {}
    everywhere = set.intersection(*(set(parts) for parts in ranks))
    differ = set().union(*ranks) - everywhere
    for name in everywhere:
        dtype = ranks[0][name][1].dtype
        full[name] = torch.full(shapes[name], torch.nan if dtype.is_floating_point else 0, dtype=dtype)
        filled = torch.zeros(shapes[name], dtype=torch.bool)
        for region, tensor in (parts[name] for parts in ranks):
            given = tensor.view(full[name][region].shape)
            if filled[region].all() and not torch.equal(full[name][region], given):
                differ.add(name)
            full[name][region], filled[region] = given, True
    return full, differ
