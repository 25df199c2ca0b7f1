"""The logical checkpoint: full tensors by name, and the part of each that a rank holds.

``_decoder_shapes`` lists their names and shapes. An adapter of rank R on a matrix [..., out, in] adds the tensors

    lora_a [..., R, in]    lora_b [..., out, R]    bias [..., out]

named ``layers.{n}.attention.wq.lora_a`` beside ``.wq.weight`` and ``experts.w1_lora_a`` beside ``experts.w1``; the
embedding counts as a matrix that maps V to D. A quantised matrix is replaced by its codec's parts, named likewise:
``wq.codes``, ``experts.w1_codes``. These are also the names of the decoder's parameters.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from accessory.dtypes import at_least
from accessory.errors import UserError
from accessory.model.adapter import Adapter, adapter_cut_dims, adapter_name
from accessory.model.args import ModelArgs
from accessory.model.codecs import Codec, get_codec, is_part
from accessory.model.connector import Connector
from accessory.model.moe.layouts import Layout

T = TypeVar("T")

Shape = tuple[int, ...]
Region = tuple[slice, ...]
"""A box of a logical tensor: one slice with explicit start and stop per dimension."""
Adapters = Mapping[str, Adapter]
"""The adapters of a model, by the logical name of their matrix; a matrix without one is not in it."""
EMBEDDING = "tok_embeddings.weight"
SCORE = "score.weight"
"""A classifier's layer in place of the output layer. It never has an adapter: it is new, and small."""
CONNECTOR = "connector."
"""What the names of a visual model's connector begin with."""


class Source(Protocol):
    """Anything that logical tensors can be read from: a checkpoint view, a model, a random initialiser."""

    def read(self, name: str, region: Region) -> Tensor:
        """The values of logical tensor ``name`` in ``region``; reads no more than it must."""
        ...


class Overlaid:
    """The tensors ``names`` from the source ``above``, all others from ``below``."""

    def __init__(self, below: Source, above: Source, names: Collection[str]):
        self.below, self.above, self.names = below, above, names

    def read(self, name: str, region: Region) -> Tensor:
        return (self.above if name in self.names else self.below).read(name, region)


def whole_region(shape: Shape) -> Region:
    """All of a tensor."""
    return tuple(slice(0, n) for n in shape)


def region_shape(region: Region) -> Shape:
    return tuple(s.stop - s.start for s in region)


@dataclass(frozen=True)
class Cut:
    """How a logical tensor of ``shape`` is cut over model-parallel ranks: along ``dim``, or not at all (None).

    ``most``: if there are more ranks than this, each has the tensor whole; None: no such limit.
    """

    shape: Shape
    dim: int | None
    most: int | None = None

    def dim_over(self, size: int) -> int | None:
        """The dimension along which ``size`` ranks cut it; None: each has it whole."""
        return None if self.most is not None and size > self.most else self.dim

    def region(self, rank: int, size: int) -> Region:
        """The part that rank ``rank`` of ``size`` holds."""
        box = list(whole_region(self.shape))
        dim = self.dim_over(size)
        if dim is not None:
            each = self.shape[dim] // size
            box[dim] = slice(rank * each, (rank + 1) * each)
        return tuple(box)


@dataclass(frozen=True)
class LogicalModel:
    """The tensors of a model: its own, and those of the ``adapters`` on some of its matrices.

    It knows nothing of ranks or files; ``cuts`` says how a layout cuts each tensor.

    ``members``: the names of adapters that are loaded side by side (``Adapter.members``); a document uses one or none.
    """

    args: ModelArgs
    adapters: Adapters = field(default_factory=dict)
    members: tuple[str, ...] = ()

    @cached_property
    def dense(self) -> dict[str, Shape]:
        """The shapes of the model's own tensors, by name and in order, as if none were quantised."""
        return _decoder_shapes(self.args)

    @cached_property
    def codecs(self) -> dict[str, Codec]:
        """The codecs of the quantised ones, by name."""
        quantise = self.args.quantise
        names = {".experts.": quantise and quantise.experts, ".attention.": quantise and quantise.attention}
        chosen = {matrices: get_codec(name) for matrices, name in names.items() if name}
        return {name: codec for name in self.dense for matrices, codec in chosen.items() if matrices in name}

    @cached_property
    def parts(self) -> dict[str, tuple[str, str]]:
        """The name of each part of a quantised matrix -> (the matrix, which part of it)."""
        return {
            adapter_name(name, part): (name, part)
            for name, codec in self.codecs.items()
            for part in codec.shapes(self.dense[name])
        }

    @cached_property
    def base(self) -> dict[str, Shape]:
        """The shapes of the model's own tensors as they are held, by name and in order."""
        return {name: shape for held in self._held.values() for name, shape in held.items()}

    @cached_property
    def of_experts(self) -> list[str]:
        """The names in ``base`` of the experts' matrices, or of their parts."""
        return [name for name in self.base if ".experts." in name]

    @cached_property
    def _held(self) -> dict[str, dict[str, Shape]]:
        """What is held of each own tensor, by name: the tensor itself, or its parts."""

        def held(name: str, shape: Shape) -> dict[str, Shape]:
            codec = self.codecs.get(name)
            parts = codec.shapes(shape) if codec else {}
            return {adapter_name(name, part): part_shape for part, part_shape in parts.items()} or {name: shape}

        return {name: held(name, shape) for name, shape in self.dense.items()}

    @cached_property
    def matrices(self) -> dict[str, Shape]:
        """The shapes of the matrices that can have an adapter, quantised or not."""
        return {
            name: shape
            for name, shape in self.dense.items()
            if len(shape) > 1 and name != SCORE and not name.startswith(CONNECTOR)
        }

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of all tensors; those of an adapter follow their matrix."""
        result: dict[str, Shape] = {}
        for name, shape in self.dense.items():
            result |= self._held[name]
            if name in self.adapters:
                parts = self.adapters[name].shapes(as_matrix(name, shape))
                result |= {adapter_name(name, part): part_shape for part, part_shape in parts.items()}
        return result

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many parameters each tensor counts for; the codes of a quantised matrix count for the whole matrix."""
        counted = {part: self.dense[matrix] if kind == "codes" else (0,) for part, (matrix, kind) in self.parts.items()}
        return {name: prod(shape) for name, shape in (self.shapes | counted).items()}

    @property
    def added(self) -> set[str]:
        """The names of the adapters' tensors."""
        return self.shapes.keys() - self.base.keys()

    def member(self, name: str | None) -> int:
        """The number of the adapter called ``name``, from 1; 0 for None: the base alone.

        Raises:
            UserError: there is no such adapter.
        """
        if name is not None and name not in self.members:
            there = f"there are {', '.join(self.members)}" if self.members else "the model was loaded without adapters"
            raise UserError(f"no adapter is called '{name}': {there}")
        return 0 if name is None else 1 + self.members.index(name)

    def whole(self, name: str) -> Region:
        """All of a tensor."""
        return whole_region(self.shapes[name])

    def cuts(self, layout: Layout) -> dict[str, Cut]:
        """How ``layout`` cuts every tensor."""
        by_kind = _CUT_DIMS | layout.cut_dims
        dims = {name: by_kind.get(name.removesuffix(".weight").rpartition(".")[2]) for name in self.dense}
        for name in self.adapters:
            dim = 0 if name == EMBEDDING else dims[name]  # cut along D, which as_matrix puts first
            of_parts = adapter_cut_dims(len(self.dense[name]), dim)
            dims |= {adapter_name(name, part): part_dim for part, part_dim in of_parts.items()}
        for name, (matrix, part) in self.parts.items():
            dims[name] = self.codecs[matrix].cut_dims(len(self.dense[matrix]), dims[matrix])[part]
        heads = {name: self.args.n_kv_heads for name in self.shapes if _OF_KV_HEADS.search(name)}
        return {name: Cut(shape, dims[name], heads.get(name)) for name, shape in self.shapes.items()}


def _decoder_shapes(args: ModelArgs) -> dict[str, Shape]:
    """Shapes by name and in order; the score biases, which some models' routers have, are buffers."""
    d, f, v, e = args.dim, args.hidden_dim, args.vocab_size, args.moe.num_experts
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    shapes: dict[str, Shape] = {EMBEDDING: (v, d)}
    for n in range(args.n_layers):
        layer = f"layers.{n}"
        shapes |= {
            f"{layer}.attention.wq.weight": (q, d),
            f"{layer}.attention.wk.weight": (kv, d),
            f"{layer}.attention.wv.weight": (kv, d),
            f"{layer}.attention.wo.weight": (d, q),
            f"{layer}.feed_forward.gate.weight": (e, d),
            f"{layer}.feed_forward.experts.w1": (e, f, d),
            f"{layer}.feed_forward.experts.w2": (e, d, f),
            f"{layer}.feed_forward.experts.w3": (e, f, d),
            f"{layer}.attention_norm.weight": (d,),
            f"{layer}.ffn_norm.weight": (d,),
        }
        if args.moe.score_bias:
            shapes[f"{layer}.feed_forward.gate.score_bias"] = (e,)
    shapes |= {"norm.weight": (d,)} | ({SCORE: (len(args.labels), d)} if args.labels else {"output.weight": (v, d)})
    if args.visual:
        with torch.device("meta"):
            connector = Connector(args.visual, d)
        shapes |= {CONNECTOR + name: tuple(parameter.shape) for name, parameter in connector.named_parameters()}
    return shapes


_CUT_DIMS = {"tok_embeddings": 1, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "output": 0}
"""The dimension that model-parallel ranks cut. A layout adds the experts'; all other tensors are whole on every rank."""

_OF_KV_HEADS = re.compile(r"\.w[kv]\.")
"""A head that query heads share is never cut."""


def as_matrix(name: str, dimensions: tuple[T, ...]) -> tuple[T, ...]:
    """``dimensions`` in the order [..., out, in]: only the embedding, stored [V, D] while it maps V to D, is turned."""
    return dimensions[::-1] if name == EMBEDDING else dimensions


def is_buffer(name: str) -> bool:
    """Whether a logical tensor is a buffer, which no gradient trains."""
    return name.endswith(".score_bias")


def held_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a logical tensor is held and saved, in a model of ``dtype``: at least fp32 for the router, because
    rounded to bf16 it chooses other experts in 0.2 % of cases; bytes for the parts of a quantised matrix."""
    if is_part(name):
        return torch.uint8
    return at_least(dtype) if ".feed_forward.gate." in name else dtype


def undivided(args: ModelArgs, layout: Layout, model_parallel: int) -> list[str]:
    """The sizes that a model-parallel size does not divide, each with its number. Of n_kv_heads it may be a multiple."""
    sizes = layout.cut_size(args) | {"n_heads": args.n_heads, "vocab_size": args.vocab_size, "dim": args.dim}
    for matrices, name in vars(args.quantise).items() if args.quantise else ():
        group = get_codec(name).group if name else None
        if group and matrices == "attention":
            sizes[f"the blocks of {name} in a row of wo,"] = args.n_heads * args.head_dim // group
        elif group and "hidden_dim" in sizes:
            sizes[f"the blocks of {name} in a row of w2,"] = args.hidden_dim // group
    if model_parallel < 1 or model_parallel % args.n_kv_heads:
        sizes["n_kv_heads"] = args.n_kv_heads
    return [f"{name} {size}" for name, size in sizes.items() if model_parallel < 1 or size % model_parallel]


def allowed_sizes(args: ModelArgs, layout: Layout) -> list[int]:
    """The model-parallel sizes that a model can be cut into."""
    return [size for size in range(1, args.n_heads + 1) if not undivided(args, layout, size)]


def check_divides(args: ModelArgs, layout: Layout, model_parallel: int, where: str = "") -> None:
    """Raise a UserError that lists the allowed sizes if a model cannot be cut into ``model_parallel`` parts."""
    if failing := undivided(args, layout, model_parallel):
        raise UserError(
            f"{where}layout '{layout.name}': model-parallel size {model_parallel} does not divide {', '.join(failing)}: "
            f"use one of {allowed_sizes(args, layout)}"
        )
