"""A model's fingerprint, made of samples of its weights: the same in every format, layout and parallel size, and in bf16."""

import hashlib
import json
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from accessory.model.logical import LogicalModel, Region, Shape

_SIDE = 8
"""Rows and columns of a sample. It takes a few pages of a file, however the matrix is stored."""


def fingerprint(read: Callable[[str, Region], Tensor], logical: LogicalModel) -> str:
    """32 hexadecimal digits from four samples of every matrix (for experts of each one, in order), rounded to bf16.

    Two trainings of a model differ in nearly every weight, so also in the samples. A change of a few weights may be missed.
    """
    settings = logical.args.to_dict()
    shape = {k: v for k, v in settings.items() if k not in ("max_batch_size", "max_seq_len", "load_balancing_weight")}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for name, tensor_shape in logical.base.items():
        for region in _samples(name, tensor_shape):
            values = read(name, region).to(torch.bfloat16).contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _samples(name: str, shape: Shape) -> Iterator[Region]:
    *outer, rows, columns = shape if len(shape) > 1 else (1, *shape)
    for group in range(outer[0] if outer else 1):
        for number in range(4):
            draw = hashlib.sha256(f"{name}/{group}/{number}".encode()).digest()
            top = int.from_bytes(draw[:4], "big") % max(1, rows - _SIDE)
            left = int.from_bytes(draw[4:8], "big") % max(1, columns - _SIDE)
            box = slice(top, min(top + _SIDE, rows)), slice(left, min(left + _SIDE, columns))
            yield (slice(group, group + 1), *box) if outer else box if len(shape) > 1 else box[1:]
