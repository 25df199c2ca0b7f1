"""GPTQ's and AWQ's quantised matrices in Hugging Face's files, as parts: the same bytes in another order, read and written.

    KEY.qweight  int32 [in / 8, out]        eight codes along the input in a word, the first in its lowest bits
    KEY.scales   fp16  [in / group, out]
    KEY.qzeros   int32 [in / group, out / 8]    eight zeros along the output in a word; of version 1 each is one too small
    KEY.g_idx    int32 [in]                     which block each input belongs to: only neighbours in one are read

KEY is that of the matrix: ``model.layers.0.block_sparse_moe.experts.3.w1`` as on the Hub, or, as GPTQModel calls it,
``model.layers.0.mlp.experts.3.gate_proj``. Routers, norms, embeddings and output are whole. AWQ's files ("gemm") differ in

    KEY.qweight  int32 [in, out / 8]            eight codes along the output in a word, in an order of its own
    KEY.qzeros   in that order, as they are     and there is no g_idx
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.encoding import Encoding
from accessory.checkpoint.quantise import in_words
from accessory.checkpoint.storage import Stored
from accessory.checkpoint.tiles import PlannedTensor, Tile
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.codecs import get_codec
from accessory.model.logical import LogicalModel, Region, Shape, Source

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUFFIXES = {"codes": "qweight", "scales": "scales", "zeros": "qzeros"}
PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""GPTQModel's names of the experts' matrices, as transformers has them."""
WRITTEN: dict[str, dict[str, Any]] = {
    # of version 2: what is one less than a zero of 0 has no place in version 1
    "gptq": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "desc_act": False, "sym": False},
    "awq": {"quant_method": "awq", "version": "gemm", "zero_point": True},
}
"""The ``quantization_config`` of each format that is written, but for the sizes."""


def held_as(config: Mapping[str, Any], where: str) -> dict[str, str]:
    """How matrices are held, as ``quantise`` says it, by a ``quantization_config``.

    Raises:
        UserError: it is of another kind than can be read.
    """
    method, bits, group = (config.get(key) for key in ("quant_method", "bits", "group_size"))
    gemm = str(config.get("version", "gemm")).lower() == "gemm" and config.get("zero_point", True)
    if bits != 4 or not (method == "gptq" or (method == "awq" and gemm)):
        raise UserError(
            f"{where}: quantization_config: {method!r} in {bits!r} bits; GPTQ, AWQ (gemm) and compressed-tensors in 4 "
            "are read"
        )
    if config.get("desc_act"):
        raise UserError(
            f"{where}: desc_act orders the inputs by their activations, so that no slice has whole blocks: take files "
            "of desc_act false, or quantise the original (accessory quantise)"
        )
    if not isinstance(group, int) or group < 2 or group % 2:
        raise UserError(f"{where}: group_size is {group!r}; blocks of an even number of values are read")
    return dict.fromkeys(("experts", "attention"), f"int4-{group}")


def as_bytes(tensors: Mapping[str, Stored], config: Mapping[str, Any], where: str) -> dict[str, Stored]:
    """A file's tensors, those of quantised matrices as bytes.

    Raises:
        UserError: inputs of a block are not neighbours.
    """
    result = {}
    for key, stored in tensors.items():
        matrix, _, suffix = key.rpartition(".")
        if f"{matrix}.qweight" not in tensors or suffix == "bias":
            result[key] = stored
        elif suffix == "g_idx":
            blocks = stored.map()
            if not torch.equal(blocks, torch.arange(len(blocks), dtype=blocks.dtype) // config["group_size"]):
                raise UserError(f"{where}: {key} orders inputs as desc_act does: no rank's slice would have whole blocks")
        else:
            *rows, columns = stored.shape
            width = columns * stored.dtype.itemsize
            result[key] = dataclasses.replace(stored, dtype=torch.uint8, shape=(*rows, width), stride=(width, 1))
    return result


class NibblesEncoding(Encoding):
    """Numbers of four bits, [..., out, blocks], of which words hold eight along the output.

    Args:
        order: which of its eight each place of a word holds, from the lowest bits on. added: to each, as it is read.
        in_bytes: they are codes, of which a byte of ours holds two along the input.
    """

    def __init__(self, pattern: str, order: Sequence[int], added: int, in_bytes: bool, **sizes: int):
        super().__init__(pattern, **sizes)
        self.order, self.added, self.in_bytes = order, added, in_bytes

    def stored_shape(self, box: Shape) -> Shape:
        blocks, out = super().stored_shape(box)
        return blocks * (2 if self.in_bytes else 1), out // 2

    def read(self, stored: Tensor, box: Shape, inside: Region) -> Tensor:
        halves = torch.stack([stored & 15, stored >> 4], -1).view(len(stored), -1, 8)
        numbers = torch.empty_like(halves)
        numbers[..., list(self.order)] = halves + self.added
        numbers = numbers.flatten(1)
        if self.in_bytes:
            numbers = numbers[::2] | numbers[1::2] << 4
        return super().read(numbers, box, inside)

    def write(self, box: Tensor, stored: Tensor) -> None:
        """Put codes into ``stored``, or zeros, of which none is added to as it is read: as they are."""
        numbers = stored.new_empty(super().stored_shape(tuple(box.shape)))
        super().write(box, numbers)
        if self.in_bytes:
            numbers = torch.stack([numbers & 15, numbers >> 4], 1).flatten(0, 1)
        halves = numbers.view(len(numbers), -1, 8)[..., list(self.order)]
        stored.copy_((halves[..., ::2] | halves[..., 1::2] << 4).flatten(1))


def part_tiles(logical: LogicalModel, keys: Mapping[str, list[str]], config: Mapping[str, Any]) -> Iterator[Tile]:
    """The tiles of quantised matrices.

    Args:
        keys: of each matrix, or of each expert's, by logical name. config: the ``quantization_config``.
    """
    is_awq = config["quant_method"] == "awq"
    added = 0 if is_awq or config.get("checkpoint_format") == "gptq_v2" else 1
    for name, (matrix, part) in logical.parts.items():
        region, each = logical.whole(name), {"codes": 1 if is_awq else 4, "scales": 2, "zeros": 1}[part]
        rows, stored_rows, sizes = "n", "n", {"few": each}
        if matrix.endswith((".wq.weight", ".wk.weight")):  # whose rows Hugging Face has in another order
            rows, stored_rows = "(head pair two)", "head two pair"
            sizes |= {"pair": logical.args.head_dim // 2, "two": 2}
        pattern = f"{'e ' * (len(region) == 3)}{rows} (k few) -> k ({stored_rows} few)"
        encoding = Encoding(pattern, **sizes)
        if part == "zeros" or (is_awq and part == "codes"):
            order = AWQ_ORDER if is_awq else range(8)
            encoding = NibblesEncoding(pattern, order, added if part == "zeros" else 0, part == "codes", **sizes)
        for number, key in enumerate(keys[matrix]):
            place = region if len(region) == 2 else (slice(number, number + 1), *region[1:])
            yield Tile(name, place, "", f"{key}.{SUFFIXES[part]}", encoding)


def description(format: str, args: ModelArgs) -> dict[str, Any]:
    """The ``quantization_config`` of a model that is written in one of the formats above.

    Raises:
        UserError: it is held otherwise than the format can say, or its matrices do not fill words.
    """
    quantise = args.quantise
    codec = get_codec(quantise.experts) if quantise and quantise.experts else None
    if quantise is None or codec is None or codec.kind != "int4" or quantise.attention != quantise.experts:
        raise UserError(
            f"the format '{format}' holds experts and attention in int4, in blocks of one size; these are "
            f"{in_words(quantise)}: run accessory quantise --experts int4 --attention int4 --to {format} on the original"
        )
    for name in (logical := LogicalModel(args)).codecs:
        *_, rows, columns = logical.dense[name]
        if rows % 8 or columns % 8:
            raise UserError(f"the format '{format}' has eight numbers in a word; {name} is of {rows} x {columns}")
    return {**WRITTEN[format], "bits": 4, "group_size": codec.group}


class PlannedWords(PlannedTensor):
    """A part of a quantised matrix that is to be written, its bytes as numbers of ``dtype``."""

    def filled(self, source: Source) -> Tensor:
        (tile,) = self.tiles
        stored = torch.empty(tile.stored_shape(), dtype=torch.uint8)
        tile.encoding.write(source.read(tile.name, tile.region), stored)
        return stored.view(self.dtype)


@dataclasses.dataclass
class PlannedBlocks(PlannedTensor):
    """The ``g_idx`` of a matrix that is to be written: ``group`` neighbours in a block."""

    group: int

    def filled(self, source: Source) -> Tensor:
        return torch.arange(*self.shape, dtype=self.dtype) // self.group


def planned_words(tensors: Mapping[str, PlannedTensor], config: Mapping[str, Any]) -> dict[str, PlannedTensor]:
    """What is to be written in the place of tensors of bytes, and g_idx beside."""
    result: dict[str, PlannedTensor] = {}
    for key, tensor in tensors.items():
        matrix, _, suffix = key.rpartition(".")
        result[key] = tensor
        if suffix in SUFFIXES.values():
            dtype = torch.float16 if suffix == "scales" else torch.int32
            rows, width = tensor.shape
            result[key] = PlannedWords((rows, width // dtype.itemsize), dtype, tensor.tiles)
            if suffix == "qweight" and config["quant_method"] == "gptq":
                result[f"{matrix}.g_idx"] = PlannedBlocks((8 * rows,), torch.int32, [], config["group_size"])
    return result
