"""Quantising matrices on reading, and dequantising quantised ones."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from accessory.config import read_mapping, write_json
from accessory.errors import UserError
from accessory.model.adapter import adapter_name
from accessory.model.args import ModelArgs
from accessory.model.codecs import Parts, get_codec
from accessory.model.logical import LogicalModel, Region, Source
from accessory.settings import QuantiseSection

NOTES = "quantised.json"


class Quantising:
    """Quantises on reading: ``source`` has a model's values, and this the parts of the matrices quantised in ``logical``.

    Parts are always made from whole blocks of values, so that the result does not depend on how much is read at once.
    """

    def __init__(self, source: Source, logical: LogicalModel):
        self.source, self.logical = source, logical
        self._made: dict[tuple[tuple[int, int], ...], Parts]
        self._matrix, self._made = "", {}  # parts of the matrix read last that were not read yet

    def read(self, name: str, region: Region) -> Tensor:
        """The values of a tensor, or of a part, in ``region``. Raises UserError if a matrix cannot be quantised."""
        if name not in self.logical.parts:
            return self.source.read(name, region)
        matrix, part = self.logical.parts[name]
        codec, width = self.logical.codecs[matrix], self.logical.dense[matrix][-1]
        *rows, columns = region
        group, each = codec.group or width, codec.bytes_of_block(part, width)
        blocks = slice(columns.start // each, -(-columns.stop // each))
        cover = (*rows, slice(blocks.start * group, blocks.stop * group))
        if matrix != self._matrix:
            self._matrix, self._made = matrix, {}
        box = tuple((s.start, s.stop) for s in cover)
        if part not in self._made.get(box, ()):
            try:
                self._made[box] = codec.encode(self.source.read(matrix, cover))
            except ValueError as error:
                raise UserError(
                    f"{matrix} holds {error}, and cannot be quantised (accessory inspect names files)"
                ) from error
        first = blocks.start * each
        return self._made[box].pop(part)[..., columns.start - first : columns.stop - first]


class Dequantised:
    """Dequantises on reading: ``source`` has the parts of quantised matrices, and this also the matrices, in fp32."""

    def __init__(self, source: Source, logical: LogicalModel):
        self.source, self.logical = source, logical

    def read(self, name: str, region: Region) -> Tensor:
        codec = self.logical.codecs.get(name)
        if codec is None:
            return self.source.read(name, region)
        *rows, columns = region
        width = self.logical.dense[name][-1]
        group = codec.group or width
        blocks, parts = slice(columns.start // group, -(-columns.stop // group)), {}
        for part in codec.shapes((width,)):
            each = codec.bytes_of_block(part, width)
            cover = (*rows, slice(blocks.start * each, blocks.stop * each))
            parts[part] = self.source.read(adapter_name(name, part), cover)
        first = blocks.start * group
        return codec.decode(parts, torch.float32)[..., columns.start - first : columns.stop - first]


def as_quantised(args: ModelArgs, quantise: QuantiseSection | None, where: str) -> ModelArgs:
    """A model's description with matrices quantised as in ``quantise``; None: unchanged.

    Raises:
        UserError: it is already quantised in another way.
    """
    names = {matrices: get_codec(name).name for matrices, name in vars(quantise).items() if name} if quantise else {}
    if not names:
        return args
    wanted = QuantiseSection(**names)
    if args.quantise not in (None, wanted):
        raise UserError(
            f"{where}: is {in_words(args.quantise)} already, and what that lost does not come back: quantise its original, "
            "or take quantise out"
        )
    return dataclasses.replace(args, quantise=wanted)


def in_words(quantise: QuantiseSection | None) -> str:
    """How a model is quantised, in words for messages."""
    names = [f"{matrices} {name}" for matrices, name in vars(quantise).items() if name] if quantise else []
    return f"quantised ({', '.join(names)})" if names else "whole"


def read_origin(directory: Path) -> str | None:
    """The fingerprint of the model before quantisation, if it is noted in a directory."""
    notes = directory / NOTES
    return str(read_mapping(notes)["of"]) if notes.is_file() else None


def write_origin(directory: Path, fingerprint: str) -> None:
    write_json(directory / NOTES, {"of": fingerprint})
