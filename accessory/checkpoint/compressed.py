"""Matrices of compressed-tensors in 4 bits ("pack-quantized", as llm-compressor saves them): read, not written.

    KEY.weight_packed      int32 [out, in / 8]          eight codes along the input in a word, the first in the lowest bits
    KEY.weight_scale       [out, in / group]            in the model's precision; held here as fp16
    KEY.weight_zero_point  int32 [out / 8, in / group]  eight zeros along the output in a word; if symmetric, absent: all 8
    KEY.weight_shape       int64 [2]

KEY is that of the matrix, under the Hub's names or transformers', as in GPTQ's files.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.gptq import in_bytes, of_groups, of_matrices
from accessory.checkpoint.storage import Stored
from accessory.errors import UserError
from accessory.model.codecs import unpacked

METHOD, PACKED = "compressed-tensors", "weight_packed"
SUFFIXES = (PACKED, "weight_scale", "weight_zero_point", "weight_shape")


@dataclasses.dataclass(frozen=True)
class Converted(Stored):
    """A tensor that ``convert`` makes from one in a file."""

    raw: Stored
    convert: Callable[[Tensor], Tensor]

    def map(self) -> Tensor:
        return self.convert(self.raw.map())


def held_as(config: Mapping[str, Any], where: str) -> dict[str, str]:
    """The setting ``quantise`` of ModelArgs for a ``quantization_config``.

    Raises:
        UserError: it is of a kind that cannot be read.
    """
    groups = (config.get("config_groups") or {}).values()
    kinds = [group.get("weights") or {} for group in groups]
    group_size = kinds[0].get("group_size") if kinds else None
    asked = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size}
    readable = all(all(kind.get(key) == value for key, value in asked.items()) for kind in kinds)
    whole_inputs = not any(group.get("input_activations") for group in groups)
    if config.get("format") != "pack-quantized" or not kinds or not readable or not whole_inputs:
        raise UserError(
            f"{where}: quantization_config: of {METHOD} 'pack-quantized' is read, integers of 4 bits in groups of one size, "
            "with whole inputs"
        )
    return of_groups(4, group_size, where)


def as_bytes(tensors: Mapping[str, Stored], config: Mapping[str, Any], where: str) -> dict[str, Stored]:
    """A file's tensors, with those of quantised matrices as parts: KEY.codes, KEY.scales, KEY.zeros.

    Raises:
        UserError: the inputs of a block are not neighbours.
    """
    result = {}
    for key, stored, matrix, suffix in of_matrices(tensors, PACKED):
        if suffix == "weight_g_idx":
            raise UserError(f"{where}: {key} orders inputs (actorder: group), so that no slice has whole blocks")
        if suffix not in SUFFIXES:
            result[key] = stored
        elif suffix == PACKED:
            result[f"{matrix}.codes"] = in_bytes(stored)
        elif suffix == "weight_scale":
            out, blocks = stored.shape
            as_half = functools.partial(_as_half, where=f"{where}: {key}")
            result[f"{matrix}.scales"] = _converted(stored, (out, 2 * blocks), as_half)
            if f"{matrix}.weight_zero_point" not in tensors:
                result[f"{matrix}.zeros"] = _converted(stored, (out, blocks), lambda x: torch.full(x.shape, 8).byte())
        elif suffix == "weight_zero_point":
            words, blocks = stored.shape
            result[f"{matrix}.zeros"] = _converted(stored, (8 * words, blocks), _unpacked)
    return result


def _converted(stored: Stored, shape: tuple[int, int], convert: Callable[[Tensor], Tensor]) -> Converted:
    return Converted(stored.parts, stored.offset, torch.uint8, shape, (shape[1], 1), stored, convert)


def _as_half(scales: Tensor, where: str) -> Tensor:
    half = scales.half()
    if not torch.equal(half.to(scales.dtype), scales):
        raise UserError(f"{where} holds scales that fp16, in which they are held here, would round")
    return half.view(torch.uint8)


def _unpacked(words: Tensor) -> Tensor:
    """[out / 8, blocks] words -> [out, blocks] numbers."""
    return unpacked(words.T.contiguous().view(torch.uint8), 4).T
