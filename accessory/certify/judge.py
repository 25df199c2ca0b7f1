"""The verdict on a cell: its ranks' results against the plain reference, which runs in this one process."""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accessory.certify import reference
from accessory.certify.formats import largest
from accessory.certify.harness import Tensors, assemble
from accessory.certify.matrix import CacheCell, Cell, FileCell, posed_by
from accessory.certify.problem import BATCHES, OPTIM, Problem
from accessory.certify.processes import Failure
from accessory.certify.serving import ServingCell, wrong_tokens
from accessory.checkpoint.quantise import Dequantised
from accessory.data.placement import PLACE
from accessory.data.store import Sample
from accessory.model.logical import LogicalModel
from accessory.model.visual import Images
from accessory.parallel.mesh import Axis
from accessory.settings import OptimSection
from accessory.visual.images import open_image
from accessory.visual.views import padded_resize

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


def bounds(tolerance: float) -> Mapping[str, float]:
    """The largest error of each quantity that passes."""
    return defaultdict(lambda: tolerance, {"counts": 0.0, "saved": 0.0, "hf": 0.0, "tokens": 0.0})


@dataclass(frozen=True)
class Verdict:
    """A cell, and its distance from the reference.

    ``errors``: by quantity, over all steps and ranks; that of a number is relative to it, that of a tensor is the largest
    difference relative to the largest value. ``bounds``: the largest allowed errors. ``reason``: anything else that is
    wrong.
    """

    cell: Any
    errors: dict[str, float]
    bounds: Mapping[str, float]
    reason: str | None = None

    def passes(self, quantity: str) -> bool:
        return self.errors[quantity] <= self.bounds[quantity]

    @property
    def passed(self) -> bool:
        return self.reason is None and all(map(self.passes, self.errors))


class Judge:
    """Compares cells with the reference, which is computed once for each problem.

    Attributes:
        margin: the closest routing decision compared so far (see ``reference.LossParts``).
    """

    def __init__(self, problem: Problem):
        self.problem, self.bounds = problem, bounds(TOLERANCES[problem.dtype])
        self.margin = math.inf
        self._expected = functools.cache(self._compute)

    def row(self, cell: Cell | FileCell | CacheCell | ServingCell, outcome: list[Any] | Failure) -> Verdict:
        """The verdict on what ``run_jobs`` yields for a cell."""
        if isinstance(outcome, Failure):
            return Verdict(cell, {}, self.bounds, outcome.reason)
        if isinstance(cell, FileCell):
            return self._files(cell, outcome)
        if isinstance(cell, CacheCell):
            return self._cached(cell, outcome)
        if isinstance(cell, ServingCell):
            return self._served(cell, outcome)
        return self._training(cell, outcome)

    def _compute(self, problem: Problem, masks: bool, tuning_name: str, balance: str) -> list[reference.ReferenceStep]:
        rates = reference.schedule(BATCHES, OPTIM.lr, OPTIM.min_lr, OPTIM.warmup_epochs * BATCHES[0])
        return list(reference_steps(problem, tuning_name, problem.batches(masks), balance, OPTIM, rates))

    def _training(self, cell: Cell, ranks: list[Any]) -> Verdict:
        problem = posed_by(self.problem, cell)
        expected = self._expected(problem, cell.masks, cell.tuning, cell.balance)
        self.margin = min(self.margin, *(step.parts.margin for step in expected))
        errors = dict.fromkeys(("loss", "balance", "z-loss", "counts", "norm"), 0.0)
        for (number, step), rank in itertools.product(enumerate(expected), ranks):
            numbers, parts = rank["steps"][number], step.parts
            theirs = {"loss": parts.ce.item(), "balance": parts.balance.item(), "z-loss": parts.z.item(), "norm": step.norm}
            step_errors = {name: relative(numbers[name], value) for name, value in theirs.items()}
            step_errors["counts"] = float((numbers["counts"] - parts.counts).abs().max())
            errors = {name: largest((errors[name], step_errors[name])) for name in errors}

        tuning = problem.tuning(cell.tuning)
        gradients, differ = assemble([rank["gradients"] for rank in ranks], tuning.logical.shapes)
        weights, also = assemble([rank["weights"] for rank in ranks], tuning.logical.shapes)
        first = expected[0]
        # the clipping factor that was applied, whatever norm it was computed from
        applied = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values())) / first.norm
        errors["clipping"] = relative(applied, first.scale)
        errors["gradients"] = distance(gradients, first.gradients)
        weights, start = in_numbers(weights, tuning.logical), first_weights(problem, cell.tuning)
        errors["weights"] = distance(weights, {name: t for name, t in start.items()} | expected[-1].weights)
        frozen = weights.keys() & start.keys() - tuning.trains
        changed = [name for name in frozen if not torch.equal(weights[name].double(), start[name])]
        reason = None
        if any(len({rank["steps"][number]["norm"] for rank in ranks}) > 1 for number in range(len(expected))):
            reason = "the ranks' gradient norms are not bitwise the same"
        elif differ | also:
            reason = disagreement(differ | also)
        elif changed:
            reason = f"{min(changed)} is frozen, but has changed"
        return Verdict(cell, errors, self.bounds, reason)

    def _files(self, cell: FileCell, ranks: list[Any]) -> Verdict:
        tokens = torch.tensor(self.problem.batches(False)[0][0].tokens)
        logits = reference.forward(self.problem.weights(), self.problem.args, tokens)[0]
        error = largest(distance({"": rank["logits"]}, {"": logits}) for rank in ranks)
        main = ranks[0]
        return Verdict(cell, {"logits": error, "saved": main["saved"], "hf": main["hf"]}, self.bounds, main["wrong"])

    def _cached(self, cell: CacheCell, ranks: list[Any]) -> Verdict:
        weights = self.problem.weights()
        tokens = [torch.tensor(sample.tokens) for sample in self.problem.batches(False)[0]]
        right = {str(n): reference.forward(weights, self.problem.args, t)[0] for n, t in enumerate(tokens)}
        errors = (distance({str(n): t for n, t in enumerate(rank["logits"])}, right) for rank in ranks)
        return Verdict(cell, {"logits": largest(errors)}, self.bounds)

    def _served(self, cell: ServingCell, ranks: list[Any]) -> Verdict:
        told = ranks[0]
        reason = f"{told['leaked']} pages were not given back" if told["leaked"] else None
        if not told["shared"]:
            reason = "no beginning was shared"
        return Verdict(cell, {"tokens": wrong_tokens(self.problem, cell, told)}, self.bounds, reason)


def reference_steps(
    problem: Problem, tuning_name: str, batches: list[list[Sample]], balance: str, optim: OptimSection, rates: list[float]
) -> Iterator[reference.ReferenceStep]:
    """The plain reference's steps from a problem's weights over global batches, with a rate for each."""
    tuning = problem.tuning(tuning_name)
    return reference.train_steps(
        first_weights(problem, tuning_name),
        problem.args,
        [[posed(problem, sample) for sample in batch] for batch in batches],
        balance=balance,
        clip=optim.clip_grad,
        lr=rates,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        trains=tuning.trains,
        scaling=next((adapter.scaling for adapter in tuning.logical.adapters.values()), 1.0),
    )


def posed(problem: Problem, sample: Sample) -> tuple[Any, ...]:
    """A sample in the reference's form, with each image encoded alone, by one process."""
    learnt = sample.trained if sample.label is None else sample.label
    visual = problem.args.visual
    if visual is None:
        return sample.tokens, learnt
    places = (sample.tokens == PLACE).nonzero()[0][:: visual.words].tolist()
    features = [encoded(problem, image) for image in sample.images]
    return np.where(sample.tokens == PLACE, 0, sample.tokens), learnt, list(zip(places, features, strict=True))


@functools.cache
def encoded(problem: Problem, image: str) -> list[Tensor]:
    """An image's features for each group of encoders, [views, tokens, width]."""
    vision, visual = problem.vision(Axis(), torch.device("cpu")), problem.args.visual
    assert vision and visual
    pixels = padded_resize(open_image(image), visual.size)[None]
    return [group[0] for group in vision(Images(torch.zeros(0, dtype=torch.int64), pixels)).features]


def first_weights(problem: Problem, tuning_name: str) -> dict[str, Tensor]:
    """A problem's initial weights, with quantised matrices dequantised."""
    kinds = {".experts.w": "experts", ".attention.": "attention"}
    held = vars(problem.args.quantise) if problem.args.quantise else {}
    result = problem.weights(tuning_name)
    for name, tensor in result.items():
        way = next((held.get(matrices) for part, matrices in kinds.items() if part in name), None)
        if way and name.endswith(("weight", ".w1", ".w2", ".w3")):
            result[name] = reference.quantised(tensor, way)
    return result


def in_numbers(weights: dict[str, Tensor], logical: LogicalModel) -> dict[str, Tensor]:
    """Tensors of a model, with quantised matrices dequantised."""
    if not logical.codecs:
        return weights
    source, plain = (
        Dequantised(Tensors(weights), logical),
        LogicalModel(replace(logical.args, quantise=None), logical.adapters),
    )
    return {name: source.read(name, plain.whole(name)) for name in plain.shapes}


def disagreement(names: set[str]) -> str | None:
    """The reason for a verdict, from the second result of ``assemble``; None: ranks agree."""
    return f"the ranks do not hold bitwise the same {min(names)}" if names else None


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest |difference| / |largest value| over all tensors; infinite if the names differ."""
    if ours.keys() != theirs.keys():
        return math.inf
    worst = 0.0
    for name, tensor in theirs.items():
        difference = (ours[name].double() - tensor).abs().max().item()
        worst = largest((worst, difference / (tensor.abs().max().item() or 1.0)))
    return worst


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs)
