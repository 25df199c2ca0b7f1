"""Calibrated quantisation: each matrix is rounded for the inputs that it gets from a data mix, layer by layer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.checkpoint.open import Checkpoint
from accessory.console import listed, progress, say
from accessory.data.image_reader import ImageReader
from accessory.data.loader import Batch, BatchPlan
from accessory.data.mix import load_mix
from accessory.data.packing import Rows
from accessory.data.tokenizer import Tokenizer
from accessory.dtypes import all_finite, at_least
from accessory.errors import UserError
from accessory.model.adapter import ONE_ADAPTER, adapter_name
from accessory.model.build import model_without_weights
from accessory.model.codecs import Parts
from accessory.model.decoder import Block
from accessory.model.logical import EMBEDDING, LogicalModel, Region
from accessory.model.moe.dispatch import SortedRows
from accessory.model.moe.experts import GroupedExperts
from accessory.model.moe.kernels.swiglu import weighted_swiglu
from accessory.model.moe.layouts import EXPERT
from accessory.model.rope import rotations
from accessory.model.rounding import encode_for_rows
from accessory.parallel.launch import own_device
from accessory.parallel.mesh import ONE_RANK

LEAST_ROWS = 256
"""With fewer rows than this, an expert's inputs are known too little, and it is rounded to nearest."""
LONGEST_SAMPLE, AT_ONCE = 2048, 4096
"""The most tokens of a sample, and of the samples that run through a layer together."""


def calibration_batches(checkpoint: Checkpoint, mix: Path, tokens: int, seed: int) -> list[Batch]:
    """Samples of a mix with about ``tokens`` tokens in all, in the order of its first epoch."""
    if checkpoint.tokenizer is None:
        raise UserError(f"{checkpoint.directories[0].directory}: no tokenizer in it, which --calibrate needs for {mix}")
    tokenizer, args = Tokenizer(checkpoint.tokenizer), checkpoint.args
    longest, visual = min(args.max_seq_len or LONGEST_SAMPLE, LONGEST_SAMPLE), args.visual
    data = load_mix(mix, tokenizer, longest, seed, labels=args.labels, visual=visual)
    order, lengths = data.epoch(0), data.training.lengths
    numbers = np.asarray(order[: len(order)])
    ends = lengths[numbers].cumsum()
    numbers = numbers[: int(ends.searchsorted(tokens)) + 1]
    rows = Rows.packed(numbers, lengths, max(AT_ONCE, int(lengths.max())))
    plan = BatchPlan(1, 1, 0, 1, images=ImageReader(visual.size, False) if visual else None)
    batches = [batch for (batch,) in plan.epoch(data.training, rows)]
    say(f"{mix}: {len(numbers)} samples, {sum(batch.real_tokens for batch in batches):,} tokens to calibrate with")
    return batches


class Calibrated:
    """The parts of the matrices that are quantised in ``logical``, each rounded for its inputs in ``batches``.

    A matrix's inputs come from the layers and stages before it, already quantised. One layer at a time is in memory, in
    fp32 at least. All of it runs on one rank.
    """

    def __init__(self, original: Checkpoint, logical: LogicalModel, batches: Sequence[Batch]):
        self.original, self.logical = original, logical
        self.device = own_device()
        whole = LogicalModel(replace(logical.args, quantise=None))
        dtype = at_least(original.dtype(EMBEDDING))
        self._model = model_without_weights(whole, EXPERT, ONE_RANK, dtype)
        self._documents = [batch.documents.to(self.device) for batch in batches]
        self._hidden = list(self._embedded(batches, dtype))
        self._layer, self._parts = -1, dict[str, Tensor]()
        self._bar = progress(total=logical.args.n_layers, unit=" layers", desc="calibrate")

    def read(self, name: str, region: Region) -> Tensor:
        """The values of a part. A layer's parts are made when the first is read, and freed when those of the next are."""
        layer = int(name.split(".")[1])
        assert layer >= self._layer
        while self._layer < layer:
            self._advance()
        return self._parts[name][region]

    @torch.no_grad()
    def _embedded(self, batches: Sequence[Batch], dtype: torch.dtype) -> Iterator[Tensor]:
        """The inputs of the first layer, including the words of images."""
        embedding = self.original.read(EMBEDDING, self._model.logical.whole(EMBEDDING))
        connector, vision = self._model.connector, self.original.vision(ONE_RANK.mp, dtype, self.device)
        if connector:
            self._fill(connector.to_empty(device=self.device), "connector.")
        for batch in batches:
            x = embedding[batch.tokens].to(self.device, dtype)
            yield connector(x, vision(batch.images.to(self.device))) if connector and vision and batch.images else x

    def _fill(self, module: nn.Module, prefix: str) -> None:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            region = self._model.logical.whole(prefix + name)
            tensor.copy_(self.original.read(prefix + name, region).reshape(tensor.shape))

    @torch.no_grad()
    def _advance(self) -> None:
        """Quantise the next layer, and run the batches through it."""
        self._layer += 1
        self._parts = {}
        block = self._model.layers[self._layer].to_empty(device=self.device)
        assert isinstance(block, Block)
        prefix, few = f"layers.{self._layer}.", dict[int, int]()
        self._fill(block, prefix)
        for layer, rows_of, names in STAGES:
            if prefix + names[0] in self.logical.codecs:
                grams, counts = self._watch(block, layer, rows_of)
                for name in names:
                    few |= self._round(prefix + name, block.get_parameter(name), grams, counts)
        self._hidden = list(self._run(block))
        block.to("meta")
        self._bar.update()
        if few:
            told = listed([f"{e} ({count})" for e, count in sorted(few.items())], None)
            say(f"layer {self._layer}: fewer than {LEAST_ROWS} rows come to expert {told}: rounded to the nearest")

    def _run(self, block: Block) -> Iterator[Tensor]:
        """The layer's outputs for each batch."""
        args = self.logical.args
        for x, documents in zip(self._hidden, self._documents, strict=True):
            rotation = rotations(documents.positions, args.head_dim, args.rope_theta, args.rope_scaling, x.dtype)
            yield block(x, rotation, documents, None, ONE_ADAPTER)[0]

    def _watch(self, block: Block, layer: str, rows_of: "RowsOf") -> tuple[list[Tensor], list[int]]:
        """For each expert x.T @ x over its input rows x, and the number of rows."""
        grams: list[Tensor] = []
        counts: list[int] = []

        def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            for e, x in enumerate(rows_of(module, arguments[0])):
                if e == len(grams):
                    grams.append(x.new_zeros(x.shape[1], x.shape[1]))
                    counts.append(0)
                grams[e].addmm_(x.T, x)
                counts[e] += len(x)

        watching = block.get_submodule(layer).register_forward_pre_hook(note)
        for _ in self._run(block):
            pass
        watching.remove()
        return grams, counts

    def _round(self, name: str, held: Tensor, grams: list[Tensor], counts: list[int]) -> dict[int, int]:
        """Quantise a matrix (each expert's) in place. Returns the experts with too few rows, and their numbers of rows."""
        codec, few, rounded = self.logical.codecs[name], {}, list[Parts]()
        stacked = held.view(len(grams), -1, held.shape[-1])
        for e, (matrix, gram, count) in enumerate(zip(stacked, grams, counts, strict=True)):
            if not all_finite(gram):
                raise UserError(f"what comes to {name} holds NaN or infinite values (accessory inspect names damaged files)")
            try:
                parts = codec.encode(matrix) if count < LEAST_ROWS else encode_for_rows(codec, matrix, gram)
            except ValueError as error:
                raise UserError(f"{name} holds {error}, and cannot be quantised (accessory inspect names files)") from error
            if count < LEAST_ROWS:
                few[e] = count
            matrix.copy_(codec.decode(parts, matrix.dtype))
            rounded.append({part: tensor.cpu() for part, tensor in parts.items()})
        for part, shape in codec.shapes(self.logical.dense[name]).items():
            self._parts[adapter_name(name, part)] = torch.stack([parts[part] for parts in rounded]).view(shape)
        return few


RowsOf = Callable[[nn.Module, Any], Iterable[Tensor]]
"""The input rows of each expert of a layer [n, in]; where there are no experts, all rows as one."""


def _all_rows(_: nn.Module, x: Tensor) -> Iterator[Tensor]:
    yield x


def _rows_of_experts(_: nn.Module, rows: SortedRows) -> Iterator[Tensor]:
    yield from rows.x_nD.split(_counts(rows))


def _hidden_of_experts(experts: nn.Module, rows: SortedRows) -> Iterator[Tensor]:
    """The inputs of w2, multiplied by the routing weights as in the model."""
    assert isinstance(experts, GroupedExperts)
    w1, w3 = (experts.expert_weights(matrix, rows.x_nD.dtype)[:] for matrix in ("w1", "w3"))
    counts = _counts(rows)
    for e, (x, weight) in enumerate(zip(rows.x_nD.split(counts), rows.weight_n1.split(counts), strict=True)):
        yield weighted_swiglu(F.linear(x, w1[e]), F.linear(x, w3[e]), weight)


def _counts(rows: SortedRows) -> list[int]:
    """The number of rows of each expert."""
    return rows.ends_e.diff(prepend=rows.ends_e.new_zeros(1)).tolist()


STAGES: tuple[tuple[str, RowsOf, tuple[str, ...]], ...] = (
    ("attention.wq", _all_rows, ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight")),
    ("attention.wo", _all_rows, ("attention.wo.weight",)),
    ("feed_forward.experts", _rows_of_experts, ("feed_forward.experts.w1", "feed_forward.experts.w3")),
    ("feed_forward.experts", _hidden_of_experts, ("feed_forward.experts.w2",)),
)
"""The stages of a layer, in order: the module to watch, its input rows, and the matrices that take them. The matrices of a
stage are quantised before the next stage's rows are watched."""
