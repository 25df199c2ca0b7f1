"""The logical checkpoint: full tensors by name, and the part of each that a rank holds.

Logical names and shapes (``{n}`` a layer; V vocabulary, D dim, F hidden_dim, E experts):

    tok_embeddings.weight                             [V, D]
    layers.{n}.attention_norm.weight, .ffn_norm.weight [D]
    layers.{n}.attention.wq.weight                    [n_heads * head_dim, D]
    layers.{n}.attention.wk.weight, .wv.weight        [n_kv_heads * head_dim, D]
    layers.{n}.attention.wo.weight                    [D, n_heads * head_dim]
    layers.{n}.feed_forward.gate.weight               [E, D]
    layers.{n}.feed_forward.experts.w1, .w3           [E, F, D]
    layers.{n}.feed_forward.experts.w2                [E, D, F]
    norm.weight                                       [D]
    output.weight                                     [V, D]

and, of a model whose routers have one (``moe.score_bias``), ``layers.{n}.feed_forward.gate.score_bias [E]``: a buffer.

An adapter on a matrix [..., out, in] adds the tensors (R its rank)

    lora_a [..., R, in]    lora_b [..., out, R]    bias [..., out]

called ``layers.{n}.attention.wq.lora_a`` beside ``.wq.weight`` and ``experts.w1_lora_a`` beside ``experts.w1``; the
embedding counts as a matrix that maps V to D. They are the names of the decoder's own parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from accessory.dtypes import at_least
from accessory.model.adapter import Adapter, adapter_cut_dims, adapter_name
from accessory.model.args import ModelArgs
from accessory.model.moe.layouts import Layout

Region = tuple[slice, ...]
"""A box of a logical tensor: one slice with explicit start and stop per dimension."""


Adapters = Mapping[str, Adapter]
"""The adapters of a model, by the logical name of their matrix; a matrix without one is not in it."""


class Source(Protocol):
    """Anything that logical tensors can be read from: a checkpoint view, a model, a random initialiser."""

    def read(self, name: str, region: Region) -> Tensor:
        """The values of logical tensor ``name`` in ``region``; reads no more than it must."""
        ...


@dataclass(frozen=True)
class Cut:
    """How a logical tensor of ``shape`` is cut over model-parallel ranks: along ``dim``, or not at all (None)."""

    shape: tuple[int, ...]
    dim: int | None

    def region(self, rank: int, size: int) -> Region:
        """The part that rank ``rank`` of ``size`` holds."""
        box = [slice(0, n) for n in self.shape]
        if self.dim is not None:
            each = self.shape[self.dim] // size
            box[self.dim] = slice(rank * each, (rank + 1) * each)
        return tuple(box)


def is_buffer(name: str) -> bool:
    """Whether no gradient trains a logical tensor."""
    return name.endswith(".score_bias")


def is_router(name: str) -> bool:
    """Whether a logical tensor is the router's, which computes in at least fp32 and must get it unrounded: in bf16 0.2 %
    of the choices are others."""
    return ".feed_forward.gate." in name


def held_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a logical tensor is held and saved in, if the model is in ``dtype``."""
    return at_least(dtype) if is_router(name) else dtype


def region_shape(region: Region) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in region)


def logical_cuts(args: ModelArgs, layout: Layout, adapters: Adapters | None = None) -> dict[str, Cut]:
    """Every logical tensor of a model with ``adapters``, and how ``layout`` cuts it; adapters follow their matrix."""
    d, f, v, e = args.dim, args.hidden_dim, args.vocab_size, args.moe.num_experts
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    cuts = {"tok_embeddings.weight": Cut((v, d), 1)}
    for n in range(args.n_layers):
        layer = f"layers.{n}"
        cuts |= {
            f"{layer}.attention.wq.weight": Cut((q, d), 0),
            f"{layer}.attention.wk.weight": Cut((kv, d), 0),
            f"{layer}.attention.wv.weight": Cut((kv, d), 0),
            f"{layer}.attention.wo.weight": Cut((d, q), 1),
            f"{layer}.feed_forward.gate.weight": Cut((e, d), None),
            f"{layer}.feed_forward.experts.w1": Cut((e, f, d), layout.cut_dims["w1"]),
            f"{layer}.feed_forward.experts.w2": Cut((e, d, f), layout.cut_dims["w2"]),
            f"{layer}.feed_forward.experts.w3": Cut((e, f, d), layout.cut_dims["w3"]),
            f"{layer}.attention_norm.weight": Cut((d,), None),
            f"{layer}.ffn_norm.weight": Cut((d,), None),
        }
        if args.moe.score_bias:
            cuts[f"{layer}.feed_forward.gate.score_bias"] = Cut((e,), None)
    cuts |= {"norm.weight": Cut((d,), None), "output.weight": Cut((v, d), 0)}
    result = {}
    for name, cut in cuts.items():
        result[name] = cut
        if adapters and name in adapters:
            result |= adapter_cuts(name, cut, adapters[name])
    return result


def adapter_cuts(matrix: str, cut: Cut, adapter: Adapter) -> dict[str, Cut]:
    """The logical tensors of one matrix' adapter, by name."""
    shape, dim = cut.shape, cut.dim
    if matrix == "tok_embeddings.weight":  # stored [V, D], maps V to D
        shape, dim = shape[::-1], 0
    *groups, out, inner = shape
    shapes = {"bias": (*groups, out)} if adapter.bias else {}
    if adapter.rank:
        shapes |= {"lora_a": (*groups, adapter.rank, inner), "lora_b": (*groups, out, adapter.rank)}
    dims = adapter_cut_dims(len(shape), dim)
    return {adapter_name(matrix, part): Cut(shape, dims[part]) for part, shape in shapes.items()}


def divided_sizes(args: ModelArgs, layout: Layout) -> dict[str, int]:
    """What the model-parallel size must divide."""
    sizes = {"n_heads": args.n_heads, "n_kv_heads": args.n_kv_heads, "vocab_size": args.vocab_size, "dim": args.dim}
    return layout.cut_size(args) | sizes
