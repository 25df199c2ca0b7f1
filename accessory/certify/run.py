"""Runs a cell on each rank, with the product's own model, data order, training step and files."""

import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.certify import formats
from accessory.certify.harness import build_problem, train
from accessory.certify.matrix import CacheCell, Cell, FileCell, KernelCell, OffloadedCell, mode_settings, posed_by
from accessory.certify.problem import BATCHES, OPTIM, PACKED_WIDTH, Z_WEIGHT, Problem
from accessory.certify.serving import ServingCell, run_serving
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.open import Checkpoint
from accessory.model.decoder import Inputs
from accessory.model.documents import Documents
from accessory.model.head import Logits
from accessory.parallel.mesh import make_mesh
from accessory.settings import OffloadSection
from accessory.train.objective import Classification
from accessory.train.optim import learning_rate
from accessory.train.plan import Plan
from accessory.train.save import save_model

CACHE_PAGE = 4  # tokens, so that sequences take many pages


def run_cell(
    problem: Problem, cell: Cell | FileCell | CacheCell | ServingCell, device: torch.device, scratch: Path
) -> dict[str, Any]:
    """Run a cell as one of its ranks."""
    if isinstance(cell, FileCell):
        return pass_through_files(problem, cell, device, scratch)
    if isinstance(cell, CacheCell):
        return {"logits": run_in_chunks(problem, cell, device)}
    if isinstance(cell, ServingCell):
        return run_serving(problem, cell, device)
    return train_on_problem(posed_by(problem, cell), cell, device)


def train_on_problem(problem: Problem, cell: Cell, device: torch.device) -> dict[str, Any]:
    """Train on the problem's global batches, each an epoch of its own; returns the result of ``harness.train``."""
    parallel = mode_settings(cell.data_parallel)
    mesh = make_mesh(cell.model_parallel, parallel.dp_shard())
    model = build_problem(
        problem,
        cell.layout,
        device,
        mesh,
        tuning=cell.tuning,
        mode=parallel.data_parallel,
        recompute=cell.recompute,
        kernel=cell.kernel if isinstance(cell, KernelCell) else "auto",
        offload=OffloadSection(experts=cell.slots) if isinstance(cell, OffloadedCell) else None,
    )
    plan = Plan(BATCHES, max(BATCHES))
    return train(
        model,
        problem.batches(cell.masks),
        OPTIM,
        accumulation=cell.accumulation,
        balance=cell.balance,
        z_weight=Z_WEIGHT,
        rates=[learning_rate(step, plan, OPTIM) for step in plan.steps()],
        width=PACKED_WIDTH if cell.packing else None,
        objective=Classification() if problem.args.labels else None,
    )


def pass_through_files(problem: Problem, cell: FileCell, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Load a checkpoint written from the format's description; save it in the layout and as Hugging Face's, and convert the
    first to the second.

    Returns:
        logits: of the first sequence. saved, hf: the largest difference of a tensor from the description, in the files saved
        in the layout and in Hugging Face's. wrong: a setting that differs from the description, or None (on rank 0).
    """
    main = dist.get_rank() == 0
    weights = {name: tensor.to(problem.dtype) for name, tensor in problem.weights().items()}
    if main:
        formats.write(scratch / "given", weights, problem.args, cell.given, cell.size)
    dist.barrier()
    mesh = make_mesh(cell.model_parallel)
    model = build_problem(problem, cell.layout, device, mesh, source=Checkpoint(scratch / "given"))
    tokens = problem.batches(False)[0][0].tokens
    with torch.no_grad():
        inputs = Inputs(torch.tensor(tokens, device=device), Documents.of([len(tokens)]).to(device))
        logits = model(inputs, Logits())[0].cpu()
    save_model(model, scratch / "saved", {}, problem.dtype, "safetensors")
    save_model(model, scratch / "saved_hf", {}, problem.dtype, "hf")
    result: dict[str, Any] = {"logits": logits}
    if main:
        convert(Checkpoint(scratch / "saved"), scratch / "converted", Target("hf"))
        of_hf = scratch / "saved_hf", scratch / "converted"
        saved = formats.tensors(weights, problem.args, cell.layout, cell.model_parallel)
        result["saved"] = formats.difference(scratch / "saved", saved)
        expected = formats.tensors(weights, problem.args, "hf")
        result["hf"] = max(formats.difference(directory, expected) for directory in of_hf)
        written = ((scratch / "saved", cell.layout), *((directory, "hf") for directory in of_hf))
        wrong = (formats.wrong_setting(directory, problem.args, format) for directory, format in written)
        result["wrong"] = next(filter(None, wrong), None)
    return result


@torch.inference_mode()
def run_in_chunks(problem: Problem, cell: CacheCell, device: torch.device) -> list[Tensor]:
    """Logits [S, V] of the first step's sequences, from chunks of one or several tokens; not all advance in each round."""
    mesh = make_mesh(cell.world)
    model = build_problem(problem, cell.layout, device, mesh)
    sequences = [sample.tokens.tolist() for sample in problem.batches(False)[0]]
    rng, done = random.Random(problem.seed), [0] * len(sequences)
    longest = -(-problem.args.max_seq_len // CACHE_PAGE)
    cache = model.make_cache(longest * len(sequences), CACHE_PAGE)
    places = rng.sample(range(1, longest * len(sequences) + 1), longest * len(sequences))
    pages = [places[n :: len(sequences)] for n in range(len(sequences))]
    logits: list[list[Tensor]] = [[] for _ in sequences]
    while unfinished := [n for n, sequence in enumerate(sequences) if done[n] < len(sequence)]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        lengths = [min(rng.choice((1, 1, 2, 7, 20)), len(sequences[n]) - done[n]) for n in chosen]
        documents = Documents.of(lengths, [done[n] for n in chosen]).to(device)
        tokens = [t for n, length in zip(chosen, lengths, strict=True) for t in sequences[n][done[n] : done[n] + length]]
        view = cache.at(documents, [pages[n] for n in chosen])
        out, _ = model(Inputs(torch.tensor(tokens, device=device), documents, view), Logits())
        for n, length, part in zip(chosen, lengths, out.cpu().split(lengths), strict=True):
            done[n] += length
            logits[n].append(part)
    return [torch.cat(parts) for parts in logits]
