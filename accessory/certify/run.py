"""What each rank does for a cell: the product's own model, data order, training step and files."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from accessory.certify import formats
from accessory.certify.matrix import CacheCell, Cell, FileCell, mode_settings
from accessory.certify.problem import BATCHES, OPTIM, PACKED_WIDTH, Z_WEIGHT, Problem
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.open import Checkpoint
from accessory.data.loader import BatchPlan
from accessory.data.packing import Rows
from accessory.dtypes import at_least
from accessory.infer.generate import make_cache
from accessory.model.build import build_model
from accessory.model.decoder import Decoder, Inputs
from accessory.model.documents import Documents
from accessory.model.head import Logits
from accessory.model.logical import Region, Source
from accessory.model.moe.layouts import get_layout
from accessory.parallel.fsdp import wrap
from accessory.parallel.mesh import Axis, Mesh, make_mesh
from accessory.settings import DataParallel
from accessory.train.balance import RouterLosses
from accessory.train.objective import NextToken
from accessory.train.optim import learning_rate, make_optimizer
from accessory.train.plan import Plan
from accessory.train.save import gathered, save_model
from accessory.train.step import StepResult, train_step
from accessory.tuning.spec import Tuning


class Tensors:
    """A dictionary of logical tensors as a source."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def read(self, name: str, region: Region) -> Tensor:
        return self.tensors[name][region]


def run_cell(problem: Problem, cell: Cell | FileCell | CacheCell, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Do a cell as one of its ranks."""
    if isinstance(cell, FileCell):
        return pass_through_files(problem, cell, device, scratch)
    if isinstance(cell, CacheCell):
        return {"logits": run_in_chunks(problem, cell, device)}
    return train(problem, cell, device)


def train(problem: Problem, cell: Cell, device: torch.device) -> dict[str, Any]:
    """Train through the problem's global batches.

    Returns:
        steps: of each what ``_numbers`` says. gradients: of the first step, clipped; weights: after the last; both this
        model-parallel rank's parts of logical tensors, whole over data-parallel ranks.
    """
    parallel = mode_settings(cell.data_parallel)
    mesh = make_mesh(cell.model_parallel, parallel.dp_shard())
    tuning = problem.tuning(cell.tuning)
    source = Tensors(problem.weights(cell.tuning))
    model = build(problem, cell.layout, source, device, mesh, tuning, parallel.data_parallel, cell.recompute)
    optimizer = make_optimizer(model, OPTIM)
    first: dict[str, Tensor] = {}
    optimizer.register_step_pre_hook(lambda *_: None if first else first.update(gradients(model)))
    batches = problem.batches(cell.masks)
    rows = [_rows([len(sample.tokens) for sample in batch], cell.packing) for batch in batches]
    most = max(len(some) for some in rows)
    cut_to = BatchPlan(-(-most // (cell.accumulation * mesh.dp.size)), cell.accumulation, mesh.dp.rank, mesh.dp.size)
    plan = Plan(BATCHES, max(BATCHES))
    steps = []
    for step, samples, some in zip(plan.steps(), batches, rows, strict=True):
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(step, plan, OPTIM)
        (micro_batches,) = cut_to.epoch(samples, some)
        result = train_step(
            model,
            optimizer,
            [batch.to(device) for batch in micro_batches],
            NextToken(),
            RouterLosses(cell.balance, Z_WEIGHT),
            clip_grad=OPTIM.clip_grad,
        )
        steps.append(_numbers(result, mesh.dp))
    weights = {name: tensor.detach().cpu() for name, tensor in gathered(model)}
    return {"steps": steps, "gradients": first, "weights": weights}


def _rows(lengths: list[int], packing: bool) -> Rows:
    order = np.arange(len(lengths))
    return Rows.packed(order, np.array(lengths), PACKED_WIDTH) if packing else Rows.alone(order)


def _numbers(result: StepResult, dp: Axis) -> dict[str, Any]:
    """A step's losses and counts over all ranks, reduced as the log reduces them, and its gradient norm."""
    sums = torch.stack([result.loss_sum.double(), result.balance.double(), result.z.double()])
    loss, balance, z = dp.all_reduce(sums).tolist()
    return {
        "loss": loss / int(result.targets),
        "balance": balance,
        "z-loss": z,
        "counts": dp.all_reduce(result.counts.clone()).cpu(),
        "norm": result.grad_norm.item(),
    }


@torch.no_grad()
def gradients(model: Decoder) -> dict[str, Tensor]:
    parts = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            parts[name] = whole.to("cpu", copy=True)
    return parts


def pass_through_files(problem: Problem, cell: FileCell, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Load a checkpoint written by the format's description; save it, and convert what was saved to Hugging Face.

    Returns:
        logits: of the first sequence. saved, hf: the largest difference between a tensor of what was saved, and of what
        was converted, and the description; wrong: a setting that these say otherwise, or None (all of rank 0).
    """
    main = dist.get_rank() == 0
    weights = {name: tensor.to(problem.dtype) for name, tensor in problem.weights().items()}
    if main:
        formats.write(scratch / "given", weights, problem.args, cell.given, cell.size)
    dist.barrier()
    mesh = make_mesh(cell.model_parallel)
    model = build(problem, cell.layout, Checkpoint(scratch / "given"), device, mesh, problem.tuning("full"))
    tokens = problem.batches(False)[0][0].tokens
    with torch.no_grad():
        inputs = Inputs(torch.tensor(tokens, device=device), Documents.of([len(tokens)]).to(device))
        logits = model(inputs, Logits())[0].cpu()
    save_model(model, scratch / "saved", {}, problem.dtype, "safetensors")
    result: dict[str, Any] = {"logits": logits}
    if main:
        convert(Checkpoint(scratch / "saved"), scratch / "hf", Target("hf"))
        saved = formats.tensors(weights, problem.args, cell.layout, cell.model_parallel)
        result["saved"] = formats.difference(scratch / "saved", saved)
        result["hf"] = formats.difference(scratch / "hf", formats.tensors(weights, problem.args, "hf"))
        written = ((scratch / "saved", cell.layout), (scratch / "hf", "hf"))
        wrong = (formats.wrong_setting(directory, problem.args, format) for directory, format in written)
        result["wrong"] = next(filter(None, wrong), None)
    return result


@torch.inference_mode()
def run_in_chunks(problem: Problem, cell: CacheCell, device: torch.device) -> list[Tensor]:
    """Logits [S, V] of the first step's sequences, each from chunks of one token or several; not all go on in each round."""
    mesh = make_mesh(cell.world)
    model = build(problem, cell.layout, Tensors(problem.weights()), device, mesh, problem.tuning("full"))
    sequences = [sample.tokens.tolist() for sample in problem.batches(False)[0]]
    cache = make_cache(model, len(sequences), problem.args.max_seq_len)
    rng, done = random.Random(problem.seed), [0] * len(sequences)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    while unfinished := [n for n, sequence in enumerate(sequences) if done[n] < len(sequence)]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        lengths = [min(rng.choice((1, 1, 2, 7, 20)), len(sequences[n]) - done[n]) for n in chosen]
        documents = Documents.of(lengths, [done[n] for n in chosen], chosen).to(device)
        tokens = [t for n, length in zip(chosen, lengths, strict=True) for t in sequences[n][done[n] : done[n] + length]]
        out, _ = model(Inputs(torch.tensor(tokens, device=device), documents, cache), Logits())
        for n, length, part in zip(chosen, lengths, out.cpu().split(lengths), strict=True):
            done[n] += length
            logits[n].append(part)
    return [torch.cat(parts) for parts in logits]


def build(
    problem: Problem,
    layout: str,
    source: Source,
    device: torch.device,
    mesh: Mesh,
    tuning: Tuning,
    mode: DataParallel = "fsdp",
    recompute: bool = False,
) -> Decoder:
    return build_model(
        tuning.logical,
        get_layout(layout),
        source,
        mesh=mesh,
        dtype=at_least(problem.dtype),
        device=device,
        recompute=recompute,
        trains=tuning.trains,
        frozen_dtype=problem.dtype,
        shard=lambda model: wrap(model, mesh, mode, problem.dtype, device.type),
    )
