"""Compares the pieces of a step in bf16 with fp64 on the same inputs."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from accessory.certify import reference
from accessory.certify.formats import largest
from accessory.certify.harness import Parts, gradients
from accessory.checkpoint.state import KINDS, TrainingState
from accessory.model.decoder import Decoder
from accessory.model.documents import Documents
from accessory.model.moe.router import Routing
from accessory.model.rope import rotate
from accessory.settings import OptimSection
from accessory.tuning.spec import Tuning


def wide(x: Tensor) -> Tensor:
    return x.detach().double().cpu()


class Pieces:
    """Compares the output of every module of a running model with fp64 on the same input, until it is removed.

    Valid only while the model has its initial weights (used in bf16, except for the router's), and without recompute.

    Attributes:
        most: the largest errors so far, by piece.
        sums: by piece, two sums whose ratio gives the error: squares of the error and of the right values; wrong choices and
            all choices; or the model's values and the right ones.
    """

    def __init__(self, model: Decoder, weights: dict[str, Tensor], tuning: Tuning):
        self.args = model.args
        held = {name: t if ".gate." in name else wide(t.bfloat16()) for name, t in weights.items()}
        scaling = next((adapter.scaling for adapter in tuning.logical.adapters.values()), 1.0)
        self.weights = reference.with_adapters(held, scaling)
        self.most: dict[str, float] = defaultdict(float)
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        self._documents: Documents
        self._routing: Routing
        self._hidden: Tensor
        self._hooks: list[Any] = []
        for n, block in enumerate(model.layers):
            layer = reference.layer_of(self.weights, n)
            for name in ("attention_norm", "ffn_norm"):
                self._watch(block.get_submodule(name), self._norm, layer[f"{name}.weight"])
            self._watch(block.get_submodule("attention"), self._attention, layer)
            self._watch(block.get_submodule("feed_forward.gate"), self._router, layer)
            self._watch(block.get_submodule("feed_forward"), self._experts, layer)
        self._watch(model.norm, self._norm, self.weights["norm.weight"])
        self._watch(model, self._head)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def errors(self) -> dict[str, float]:
        """The errors over everything that has run."""
        ratios = {name: (error / right).item() for name, (error, right) in self.sums.items()}
        roots = {name: math.sqrt(ratios[name]) for name in ("norms", "rotation", "attention", "experts")}
        return {**self.most, **roots, "choices": ratios["choices"], "head": abs(ratios["head"] - 1)}

    def _watch(self, module: torch.nn.Module, look: Callable[..., None], *more: Any) -> None:
        self._hooks.append(module.register_forward_hook(lambda _, inputs, output: look(inputs, output, *more)))

    def _add(self, piece: str, ours: Tensor, right: Tensor) -> None:
        self.sums[piece] += torch.stack([(wide(ours) - right).square().sum(), right.square().sum()])

    def _no_more(self, piece: str, ours: Tensor, right: Tensor) -> None:
        error = (wide(ours) - right).abs().max() / right.abs().max()
        self.most[piece] = largest((self.most[piece], error.item()))

    def _norm(self, inputs: Any, y: Tensor, weight: Tensor) -> None:
        """Compare the factor that each row is divided by: over a row's many values their rounding averages out."""
        right = reference.norm(wide(inputs[0]), weight, self.args.norm_eps)
        factor = (wide(y) * right).sum(-1) / right.square().sum(-1)
        self._add("norms", factor, torch.ones_like(factor))
        self._hidden = y

    def _attention(self, inputs: Any, y: Tensor, layer: dict[str, Tensor]) -> None:
        x, rotation, self._documents = inputs[:3]
        args = self.args
        head = x.detach()[..., : args.head_dim]
        turned = rotate(head.unsqueeze(-2), rotation).squeeze(-2)
        for rows in _rows(self._documents):
            pairs = torch.ones(1, len(rows), args.head_dim, dtype=torch.float64)  # each (1, 1)
            of_ones = torch.view_as_real(rotation[rows] * (1 + 1j)).flatten(1)
            self._no_more("angles", of_ones, reference.rotate(pairs, args)[0])
            right = reference.rotate(wide(head[rows]).unsqueeze(0), args)[0]
            self._add("rotation", turned[rows], right)
            self._add("attention", y[rows], reference.attention(wide(x[rows]), layer, args))

    def _router(self, inputs: Any, routing: Routing, layer: dict[str, Tensor]) -> None:
        logits, top, share = reference.routing(wide(inputs[0]), layer, self.args)
        self._no_more("router", routing.logits, logits)
        self._no_more("router", routing.probs, logits.softmax(-1))
        chosen = routing.experts.cpu()
        same = (chosen.sort(-1).values == top.sort(-1).values).all(-1)
        self._no_more("router", routing.weights.cpu()[same], share.gather(1, chosen)[same])
        self.sums["choices"] += torch.tensor([len(same) - int(same.sum()), len(same)])
        self._routing = routing

    def _experts(self, inputs: Any, output: Any, layer: dict[str, Tensor]) -> None:
        x = inputs[0]
        for rows in _rows(self._documents):
            _, _, share = reference.routing(wide(x[rows]), layer, self.args)
            self._add("experts", output[0][rows], reference.experts(wide(x[rows]), share, layer))
            logits, moe = wide(self._routing.logits[rows]), self.args.moe
            counts = self._routing.experts[rows].flatten().bincount(minlength=moe.num_experts).cpu()
            uneven = moe.num_experts / moe.num_experts_per_tok * (counts * logits.softmax(-1).mean(0)).sum()
            self.sums["router losses"] += torch.stack([uneven, logits.logsumexp(-1).square().sum()])

    def _head(self, inputs: Any, output: Any) -> None:
        logits = wide(self._hidden) @ self.weights["output.weight"].T
        right = torch.nn.functional.cross_entropy(logits, inputs[1].targets.ids.cpu(), reduction="sum")
        self.sums["head"] += torch.stack([wide(output[0]), right])


def _rows(documents: Documents) -> Iterator[Tensor]:
    """The places of each document's tokens in the batch."""
    document_of = documents.document_of.cpu()
    return ((document_of == number).nonzero().squeeze(1) for number in range(1, documents.count + 1))


class Masters:
    """AdamW in fp64 on the gradients that a model's optimiser gets: its results are what the training state must hold.

    Attributes:
        gradients: this model-parallel rank's parts, of the last step.
    """

    def __init__(self, model: Decoder, optimizer: Optimizer, weights: dict[str, Tensor], settings: OptimSection):
        self._mp = model.mesh.mp
        self._cuts = model.cuts
        self._settings, self._steps = settings, 0
        trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        self._boxes = {name: self._cuts[name].region(self._mp.rank, self._mp.size) for name in trained}
        start = {name: weights[name][box].clone() for name, box in self._boxes.items()}
        zeros = ({name: torch.zeros_like(t) for name, t in start.items()} for _ in KINDS[1:])
        self._kept = dict(zip(KINDS, (start, *zeros), strict=True))
        self.gradients: Parts = {}
        optimizer.register_step_pre_hook(lambda *_: self._step(gradients(model)))

    def _step(self, parts: Parts) -> None:
        self._steps, self.gradients, settings = self._steps + 1, parts, self._settings
        for name, (_, part) in parts.items():
            weight, *moments = (self._kept[kind][name] for kind in KINDS)
            decay = settings.weight_decay if weight.dim() > 1 and not name.endswith("bias") else 0.0
            options = {"rate": settings.lr, "weight_decay": decay, "betas": settings.betas, "eps": settings.eps}
            reference.adamw(weight, wide(part).view(weight.shape), moments, self._steps, **options)

    def norm(self) -> float:
        """The 2-norm of the whole gradient (a collective)."""
        squares = torch.zeros(2, dtype=torch.float64)  # of tensors that every rank has whole, and of sharded ones
        for name, (_, part) in self.gradients.items():
            squares[int(self._cuts[name].dim_over(self._mp.size) is not None)] += wide(part).square().sum()
        self._mp.all_reduce(squares[1:])
        return math.sqrt(squares.sum())

    def error(self, state: TrainingState) -> float:
        """The largest error of a tensor in ``state``, relative to its largest value."""
        errors = []
        for kind, name in itertools.product(KINDS, self._boxes):
            right = self._kept[kind][name]
            error = wide(state.read_kind(kind, name, self._boxes[name])).view(right.shape) - right
            errors.append(error.abs().max().item() / (right.abs().max().item() or 1.0))
        return largest(errors)
