"""Quantised matrices of GPTQ and AWQ in Hugging Face's files, read and written. Their values become the parts of a matrix
here (codes, scales, zeros) by reordering.

    KEY.qweight  int32 [in / 8, out]            eight codes along the input in a word, the first in the lowest bits
    KEY.scales   fp16  [in / group, out]
    KEY.qzeros   int32 [in / group, out / 8]    eight zeros along the output in a word; in version 1 each is one too small
    KEY.g_idx    int32 [in]                     the block of each input: only blocks of neighbours can be read

KEY is that of the matrix: ``model.layers.0.block_sparse_moe.experts.3.w1`` as on the Hub, or
``model.layers.0.mlp.experts.3.gate_proj`` as in GPTQModel. Routers, norms, embeddings and output are not quantised. This is
the layout for 4 bits. With 3 bits, three words hold 32 numbers; with 2 bits, a word holds 16. AWQ's files ("gemm") have 4
bits and differ in

    KEY.qweight  int32 [in, out / 8]            eight codes along the output in a word, in an order of its own
    KEY.qzeros   in that order too, and not one too small; there is no g_idx
"""

import dataclasses
import math
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
from accessory.model.codecs import get_codec, packed, unpacked
from accessory.model.logical import LogicalModel, Region, Shape, Source

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUFFIXES = {"codes": "qweight", "scales": "scales", "zeros": "qzeros"}
PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""GPTQModel's names of the experts' matrices, as transformers has them."""
WRITTEN: dict[str, dict[str, Any]] = {
    # version 2: version 1 stores each zero minus one, so it has no place for a zero of 0
    "gptq": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "desc_act": False, "sym": False},
    "awq": {"quant_method": "awq", "version": "gemm", "zero_point": True},
}
"""The ``quantization_config`` of each format that is written, without the sizes."""


def held_as(config: Mapping[str, Any], where: str) -> dict[str, str]:
    """The setting ``quantise`` of ModelArgs for a ``quantization_config``.

    Raises:
        UserError: it is of a kind that cannot be read.
    """
    method, bits, group = (config.get(key) for key in ("quant_method", "bits", "group_size"))
    gemm = str(config.get("version", "gemm")).lower() == "gemm" and config.get("zero_point", True)
    if not (method == "gptq" and bits in (2, 3, 4)) and not (method == "awq" and gemm and bits == 4):
        raise UserError(
            f"{where}: quantization_config: {method!r} in {bits!r} bits; GPTQ in 2, 3 and 4, AWQ (gemm) and "
            "compressed-tensors in 4 are read"
        )
    if config.get("desc_act"):
        raise UserError(
            f"{where}: desc_act orders the inputs by their activations, so that no slice has whole blocks: take files "
            "of desc_act false, or quantise the original (accessory quantise)"
        )
    return of_groups(bits, group, where)


def of_groups(bits: int, group: Any, where: str) -> dict[str, str]:
    """The setting ``quantise`` for integers in blocks of ``group``. Raises UserError if there is no such codec."""
    if not isinstance(group, int) or group < 1:
        raise UserError(f"{where}: group_size is {group!r}; blocks are read, of so many neighbours")
    try:
        return dict.fromkeys(("experts", "attention"), get_codec(f"int{bits}-{group}").name)
    except UserError as error:
        raise UserError(f"{where}: group_size: {error}") from error


def as_bytes(tensors: Mapping[str, Stored], config: Mapping[str, Any], where: str) -> dict[str, Stored]:
    """A file's tensors, with those of quantised matrices as bytes.

    Raises:
        UserError: the inputs of a block are not neighbours.
    """
    result = {}
    for key, stored, _, suffix in of_matrices(tensors, "qweight"):
        if suffix in ("", "bias"):
            result[key] = stored
        elif suffix == "g_idx":
            blocks = stored.map()
            if not torch.equal(blocks, torch.arange(len(blocks), dtype=blocks.dtype) // config["group_size"]):
                raise UserError(f"{where}: {key} orders inputs as desc_act does: no rank's slice would have whole blocks")
        else:
            result[key] = in_bytes(stored)
    return result


def of_matrices(tensors: Mapping[str, Stored], codes: str) -> Iterator[tuple[str, Stored, str, str]]:
    """Each tensor's key and place, its matrix, and its suffix if the matrix is quantised (has MATRIX.``codes``), else ""."""
    for key, stored in tensors.items():
        matrix, _, suffix = key.rpartition(".")
        yield key, stored, matrix, suffix if f"{matrix}.{codes}" in tensors else ""


def in_bytes(stored: Stored) -> Stored:
    """A stored matrix as a matrix of bytes."""
    rows, columns = stored.shape
    width = columns * stored.dtype.itemsize
    return dataclasses.replace(stored, dtype=torch.uint8, shape=(rows, width), stride=(width, 1))


class BitsEncoding(Encoding):
    """Numbers of a few ``bits``, [..., out, blocks], packed into words along the output, the first in the lowest bits.

    Args:
        order: of each eight numbers, which one each of eight places holds. added: what reading adds to each number.
        in_bytes: the numbers are codes, several of which a byte holds along the input in this program's form.
    """

    def __init__(self, pattern: str, bits: int, order: Sequence[int], added: int, in_bytes: bool, **sizes: int):
        super().__init__(pattern, **sizes)
        self.bits, self.order, self.added, self.in_bytes = bits, order, added, in_bytes

    def stored_shape(self, box: Shape) -> Shape:
        blocks, out = super().stored_shape(box)
        return blocks * (8 // self.bits if self.in_bytes else 1), out * self.bits // 8

    def read(self, stored: Tensor, box: Shape, inside: Region) -> Tensor:
        places = unpacked(stored, self.bits).unflatten(1, (-1, 8))
        numbers = torch.empty_like(places)
        numbers[..., list(self.order)] = places + self.added
        numbers = numbers.flatten(1)
        if self.in_bytes:
            numbers = packed(numbers.T, self.bits).T
        return super().read(numbers, box, inside)

    def write(self, box: Tensor, stored: Tensor) -> None:
        """Put codes or zeros into ``stored``. Nothing is subtracted: the formats written have ``added`` 0."""
        numbers = stored.new_empty(super().stored_shape(tuple(box.shape)))
        super().write(box, numbers)
        if self.in_bytes:
            numbers = unpacked(numbers.T, self.bits).T
        places = numbers.unflatten(1, (-1, 8))[..., list(self.order)]
        stored.copy_(packed(places.flatten(1), self.bits))


def part_tiles(logical: LogicalModel, keys: Mapping[str, list[str]], config: Mapping[str, Any]) -> Iterator[Tile]:
    """The tiles of quantised matrices.

    Args:
        keys: by logical name, the key of the matrix, or one for each expert. config: the ``quantization_config``.
    """
    is_awq = config["quant_method"] == "awq"
    added = 0 if is_awq or config.get("checkpoint_format") == "gptq_v2" else 1
    for name, (matrix, part) in logical.parts.items():
        region, each = logical.whole(name), {"codes": 1 if is_awq else 4, "scales": 2, "zeros": 1}[part]
        rows, stored_rows, sizes = "n", "n", {"few": each}
        if matrix.endswith((".wq.weight", ".wk.weight")):  # Hugging Face has their rows in another order
            rows, stored_rows = "(head pair two)", "head two pair"
            sizes |= {"pair": logical.args.head_dim // 2, "two": 2}
        pattern = f"{'e ' * (len(region) == 3)}{rows} (k few) -> k ({stored_rows} few)"
        encoding = Encoding(pattern, **sizes)
        if part == "zeros" or (is_awq and part == "codes"):
            order = AWQ_ORDER if is_awq else range(8)
            more = added if part == "zeros" else 0
            encoding = BitsEncoding(pattern, logical.codecs[matrix].bits, order, more, part == "codes", **sizes)
        for number, key in enumerate(keys[matrix]):
            place = region if len(region) == 2 else (slice(number, number + 1), *region[1:])
            yield Tile(name, place, "", f"{key}.{SUFFIXES[part]}", encoding)


def description(format: str, args: ModelArgs) -> dict[str, Any]:
    """The ``quantization_config`` of a model that is written in one of the formats above.

    Raises:
        UserError: the format cannot describe how the model is quantised, or its matrices do not fill whole words.
    """
    quantise = args.quantise
    codec = get_codec(quantise.experts) if quantise and quantise.experts else None
    kinds = ("int4",) if format == "awq" else ("int4", "int3", "int2")
    if quantise is None or codec is None or codec.kind not in kinds or quantise.attention != quantise.experts:
        raise UserError(
            f"the format '{format}' holds experts and attention in {' or '.join(kinds)}, in blocks of one size; these are "
            f"{in_words(quantise)}: run accessory quantise --experts int4 --attention int4 --to {format} on the original"
        )
    whole = 32 // math.gcd(32, codec.bits)
    for name in (logical := LogicalModel(args)).codecs:
        *_, rows, columns = logical.dense[name]
        if rows % whole or columns % whole:
            raise UserError(f"the format '{format}' has {whole} numbers in whole words; {name} is of {rows} x {columns}")
    return {**WRITTEN[format], "bits": codec.bits, "group_size": codec.group}


class PlannedWords(PlannedTensor):
    """A part of a quantised matrix to be written, its bytes viewed as ``dtype``."""

    def filled(self, source: Source) -> Tensor:
        (tile,) = self.tiles
        stored = torch.empty(tile.stored_shape(), dtype=torch.uint8)
        tile.encoding.write(source.read(tile.name, tile.region), stored)
        return stored.view(self.dtype)


@dataclasses.dataclass
class PlannedBlocks(PlannedTensor):
    """The ``g_idx`` of a matrix to be written: ``group`` neighbours in a block."""

    group: int

    def filled(self, source: Source) -> Tensor:
        return torch.arange(*self.shape, dtype=self.dtype) // self.group


def planned_words(tensors: Mapping[str, PlannedTensor], config: Mapping[str, Any]) -> dict[str, PlannedTensor]:
    """The tensors to be written instead of tensors of bytes, with g_idx added."""
    result: dict[str, PlannedTensor] = {}
    for key, tensor in tensors.items():
        matrix, _, suffix = key.rpartition(".")
        result[key] = tensor
        if suffix in SUFFIXES.values():
            dtype = torch.float16 if suffix == "scales" else torch.int32
            rows, width = tensor.shape
            result[key] = PlannedWords((rows, width // dtype.itemsize), dtype, tensor.tiles)
            if suffix == "qweight" and config["quant_method"] == "gptq":
                inputs = rows * 32 // config["bits"]
                result[f"{matrix}.g_idx"] = PlannedBlocks((inputs,), torch.int32, [], config["group_size"])
    return result
