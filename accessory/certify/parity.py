"""The same weights in Hugging Face's Mixtral or LLaVA, through a converted checkpoint: same logits, loss and gradients."""

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from accessory.certify import formats
from accessory.certify.formats import largest
from accessory.certify.harness import assemble, build_problem, gradients, micro_batches
from accessory.certify.judge import Verdict, bounds, disagreement, distance, relative
from accessory.certify.problem import Problem
from accessory.certify.processes import Failure
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.encoders import FILE as ENCODERS_FILE
from accessory.checkpoint.encoders import write_encoders
from accessory.checkpoint.huggingface import model_tiles
from accessory.checkpoint.open import Checkpoint
from accessory.data.image_reader import ImageReader
from accessory.data.loader import Batch
from accessory.errors import UserError
from accessory.model.head import Logits
from accessory.model.logical import LogicalModel, region_shape, whole_region
from accessory.model.moe.layouts import LAYOUTS
from accessory.model.visual import PresetName
from accessory.parallel.mesh import Axis, make_mesh
from accessory.train.objective import Classification, NextToken, Objective
from accessory.visual.views import normalised

Learns = Literal["tokens", "labels", "to see", "to see by SigLIP"]
SIGHTS: dict[Learns, PresetName] = {"to see": "llava", "to see by SigLIP": "llava_siglip"}


@dataclass(frozen=True)
class ParityCell:
    """A language model, classifier or visual model on ``world`` model-parallel ranks."""

    world: int
    layout: str
    learns: Learns = "tokens"

    def settings(self) -> dict[str, str]:
        return {"learns": self.learns, "mp": str(self.world), "layout": self.layout}

    def poses(self, problem: Problem) -> Problem:
        if self.learns == "labels":
            return problem.of_labels()
        return problem if self.learns == "tokens" else problem.seeing(SIGHTS[self.learns])


def parity_cells(worlds: Sequence[int]) -> list[ParityCell]:
    return [ParityCell(world, layout, learns) for world in worlds for layout in LAYOUTS for learns in get_args(Learns)]


def run_parity(problem: Problem, cell: ParityCell, device: torch.device, scratch: Path) -> dict[str, Any]:
    """Logits, loss and gradients of a batch, as one of the cell's ranks."""
    mesh = make_mesh(cell.world)
    problem = cell.poses(problem)
    objective: Objective = Classification() if problem.args.labels else NextToken()
    model = build_problem(problem, cell.layout, device, mesh)
    batch = _batch(problem).on(model)
    with torch.no_grad():
        logits, _ = model(batch.inputs(), Logits(batch.documents.ends if problem.args.labels else None))
    loss = objective.loss(model, batch).loss_sum / objective.targets(batch)
    loss.backward()
    return {"logits": logits.cpu(), "loss": loss.item(), "gradients": gradients(model)}


def _batch(problem: Problem) -> Batch:
    visual = problem.args.visual
    reader = ImageReader(visual.size) if visual else None
    (batch,) = micro_batches(problem.batches(masks=True)[0], 1, 0, 1, images=reader)
    return batch


def grid(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """A batch in transformers' form: a row for each document, padded on the right; tokens, labels and attention mask."""
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
        self.version = _transformers().__version__
        self._problem, self._expected = problem, functools.cache(_run)

    def row(self, cell: ParityCell, outcome: list[Any] | Failure) -> Verdict:
        if isinstance(outcome, Failure):
            return Verdict(cell, {}, self.bounds, outcome.reason)
        expected = self._expected(cell.poses(self._problem))
        shapes = {name: gradient.shape for name, gradient in expected["gradients"].items()}
        ours, differ = assemble([rank["gradients"] for rank in outcome], shapes)
        logits = (distance({"": rank["logits"]}, {"": expected["logits"]}) for rank in outcome)
        losses = (relative(rank["loss"], expected["loss"]) for rank in outcome)
        errors = {"logits": largest(logits), "loss": largest(losses), "gradients": distance(ours, expected["gradients"])}
        return Verdict(cell, errors, self.bounds, disagreement(differ))


def _run(problem: Problem) -> dict[str, Any]:
    """transformers' results for the problem: logits, loss, and gradients by logical name."""
    model, batch = load_in_transformers(problem), _batch(problem)
    tokens, labels, real = grid(batch)
    if problem.args.labels:  # it finds a document's end by the padding token, which the problem's documents also contain
        padding = min(set(range(problem.args.vocab_size)) - set(batch.tokens[batch.documents.ends].tolist()))
        model.config.pad_token_id, model.model.embed_tokens.padding_idx = padding, None
        out = model(input_ids=tokens.masked_fill(~real, padding), attention_mask=real.long(), labels=batch.labels)
    elif problem.args.visual and batch.images and batch.images.pixels is not None:
        pixels, token = batch.images.pixels, model.config.image_token_id
        siglip = model.config.vision_config.model_type == "siglip_vision_model"
        pixels = pixels.float() / 127.5 - 1 if siglip else normalised(pixels)
        tokens, labels, real = grid(replace(batch, tokens=batch.tokens.index_fill(0, batch.images.rows, token)))
        out = model(input_ids=tokens, pixel_values=pixels, attention_mask=real.long(), labels=labels)
    else:
        out = model(input_ids=tokens, attention_mask=real.long(), labels=labels)
    out.loss.backward()
    logits = out.logits.detach() if problem.args.labels else out.logits.detach()[real]
    stored, found = {}, {}
    for name, parameter in model.named_parameters():
        name = name.replace("model.language_model.", "model.").replace("model.multi_modal_", "multi_modal_")  # of LLaVA
        stored[name] = parameter.grad
    for tile in model_tiles(LogicalModel(problem.args), fused=True):  # they say where our tensors are in its tensors
        found[tile.name] = tile.read(stored[tile.key], whole_region(region_shape(tile.region))).double()
    return {"logits": logits.double(), "loss": out.loss.item(), "gradients": found}


def _transformers() -> Any:
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(
            "--against hf compares with transformers, which is not here: pip install 'transformers>=5,<6'"
        ) from error
    logging.disable_progress_bar()
    return transformers


def load_in_transformers(problem: Problem) -> Any:
    """The problem's model, loaded in transformers."""
    kind = f"MixtralFor{'SequenceClassification' if problem.args.labels else 'CausalLM'}"
    if problem.args.visual:
        kind = "LlavaForConditionalGeneration"
    with tempfile.TemporaryDirectory(prefix="accessory-certify-") as name:
        weights = {key: tensor.float() for key, tensor in problem.weights().items()}
        formats.write(Path(name, "given"), weights, problem.args, "mixtral")
        if vision := problem.vision(Axis(), torch.device("cpu")):
            write_encoders(Path(name, "given", ENCODERS_FILE), vision, torch.float32)
        convert(Checkpoint(Path(name, "given")), Path(name, "hf"), Target("hf"))
        return getattr(_transformers(), kind).from_pretrained(Path(name, "hf"), dtype=torch.float32)
