"""The same weights in Hugging Face's MixtralForCausalLM, by way of a converted checkpoint: same logits, loss, gradients."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from accessory.certify import formats
from accessory.certify.formats import largest
from accessory.certify.harness import assemble, gradients
from accessory.certify.judge import Verdict, bounds, disagreement, distance, relative
from accessory.certify.problem import Problem
from accessory.certify.processes import Failure
from accessory.certify.run import build_problem
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.huggingface import model_tiles
from accessory.checkpoint.open import Checkpoint
from accessory.data.loader import Batch, collate
from accessory.errors import UserError
from accessory.model.head import Logits, LossSum
from accessory.model.logical import LogicalModel, region_shape, whole_region
from accessory.model.moe.layouts import LAYOUTS
from accessory.parallel.mesh import make_mesh


@dataclass(frozen=True)
class ParityCell:
    """One model on ``world`` model-parallel ranks."""

    world: int
    layout: str

    def settings(self) -> dict[str, str]:
        return {"mp": str(self.world), "layout": self.layout}


def parity_cells(worlds: Sequence[int]) -> list[ParityCell]:
    return [ParityCell(world, layout) for world in worlds for layout in LAYOUTS]


def run_parity(problem: Problem, cell: ParityCell, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Logits, loss and gradients of a batch, as one of the cell's ranks."""
    mesh = make_mesh(cell.world)
    model = build_problem(problem, cell.layout, device, mesh)
    batch = _batch(problem).to(device)
    with torch.no_grad():
        logits, _ = model(batch.inputs(), Logits())
    loss_sum, _ = model(batch.inputs(), LossSum(batch.targets))
    loss = loss_sum / batch.target_tokens
    loss.backward()
    return {"logits": logits.cpu(), "loss": loss.item(), "gradients": gradients(model)}


def _batch(problem: Problem) -> Batch:
    return collate(problem.batches(masks=True)[0])


def grid(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """As transformers takes a batch: a row for each document, padded on the right; tokens, labels, and what is real."""
    labels = torch.full_like(batch.tokens, -100)
    labels[batch.targets.rows + 1] = batch.targets.ids
    lengths = batch.documents.lengths
    parts = (batch.tokens, labels, torch.ones_like(batch.tokens, dtype=torch.bool))
    tokens, labels, real = (pad_sequence(part.split(lengths), batch_first=True) for part in parts)
    return tokens, labels.masked_fill(~real, -100), real


class TransformersJudge:
    """Compares cells with transformers, in fp32."""

    bounds = bounds(1e-5)

    def __init__(self, problem: Problem):
        self.logical = LogicalModel(problem.args)
        model, self.version = _load(problem)
        tokens, labels, real = grid(_batch(problem))
        out = model(input_ids=tokens, attention_mask=real.long(), labels=labels)
        out.loss.backward()
        self.logits, self.loss = out.logits.detach()[real].double(), out.loss.item()
        self.gradients = self._by_logical_name({name: p.grad for name, p in model.named_parameters()})

    def row(self, cell: ParityCell, outcome: list[Any] | Failure) -> Verdict:
        if isinstance(outcome, Failure):
            return Verdict(cell, {}, self.bounds, outcome.reason)
        ours, differ = assemble([rank["gradients"] for rank in outcome], self.logical.shapes)
        logits = (distance({"": rank["logits"]}, {"": self.logits}) for rank in outcome)
        losses = (relative(rank["loss"], self.loss) for rank in outcome)
        errors = {"logits": largest(logits), "loss": largest(losses), "gradients": distance(ours, self.gradients)}
        return Verdict(cell, errors, self.bounds, disagreement(differ))

    def _by_logical_name(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """transformers holds the experts fused, and halves for rotary pairs: the tiles of its files say where."""
        result = {}
        for tile in model_tiles(self.logical, fused=True):
            result[tile.name] = tile.read(stored[tile.key], whole_region(region_shape(tile.region))).double()
        return result


def _load(problem: Problem) -> tuple[Any, str]:
    """The problem's weights in transformers' hands, and its version."""
    try:
        from transformers import MixtralForCausalLM, __version__
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(
            "--against hf compares with transformers, which is not here: pip install 'transformers>=5,<6'"
        ) from error
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="accessory-certify-") as name:
        weights = {key: tensor.float() for key, tensor in problem.weights().items()}
        formats.write(Path(name, "given"), weights, problem.args, "mixtral")
        convert(Checkpoint(Path(name, "given")), Path(name, "hf"), Target("hf"))
        return MixtralForCausalLM.from_pretrained(Path(name, "hf"), dtype=torch.float32), __version__
