"""Which model is this? A short name made of samples of its weights, the same in every format, layout, size and in bf16."""

import hashlib
import json
from collections.abc import Iterator

import torch

from accessory.model.args import ModelArgs
from accessory.model.logical import Region, Source, logical_cuts
from accessory.model.moe.layouts import get_layout

_SIDE = 8
"""Rows and columns of a sample: a few pages of a file, whichever way the matrix is stored."""


def fingerprint(source: Source, args: ModelArgs) -> str:
    """32 hexadecimal digits from four samples of every matrix (so of every expert, in order), rounded to bf16.

    Two trainings of a model differ in nearly every weight, so in the samples; a change of a few weights can stay unseen.
    """
    shape = {k: v for k, v in args.to_dict().items() if k not in ("max_batch_size", "max_seq_len", "load_balancing_weight")}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for name, cut in logical_cuts(args, get_layout("mixtral")).items():
        for region in _samples(name, cut.shape):
            values = source.read(name, region).to(torch.bfloat16).contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _samples(name: str, shape: tuple[int, ...]) -> Iterator[Region]:
    *outer, rows, columns = shape if len(shape) > 1 else (1, *shape)
    for group in range(outer[0] if outer else 1):
        for number in range(4):
            draw = hashlib.sha256(f"{name}/{group}/{number}".encode()).digest()
            top = int.from_bytes(draw[:4], "big") % max(1, rows - _SIDE)
            left = int.from_bytes(draw[4:8], "big") % max(1, columns - _SIDE)
            box = slice(top, min(top + _SIDE, rows)), slice(left, min(left + _SIDE, columns))
            yield (slice(group, group + 1), *box) if outer else box if len(shape) > 1 else box[1:]
