"""Compares two checkpoints in any formats: are they the same logical model?"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from accessory.checkpoint.merge import Merged
from accessory.checkpoint.open import Checkpoint
from accessory.console import progress
from accessory.dtypes import at_least_fp32
from accessory.model.logical import Region, region_shape, whole_region
from accessory.visual.vision import vision_shapes

# settings without influence on the function that the model computes
_NOT_COMPARED = ("max_batch_size", "max_seq_len", "load_balancing_weight")


@dataclass
class Comparison:
    """The comparison of a logical tensor in two checkpoints.

    ``exact``: bit for bit the same. ``rounded``: the same after rounding the wider dtype to the narrower, without overflow.
    ``error``: the largest difference, relative to the largest value (NaN if either tensor holds one).
    """

    name: str
    dtypes: tuple[torch.dtype, torch.dtype]
    exact: bool = True
    rounded: bool = True
    difference: float = 0.0
    largest: float = 0.0

    @property
    def error(self) -> float:
        return self.difference / self.largest if self.difference else 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
        self.exact &= a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
        self.rounded &= torch.equal(_bits(a.to(narrow)), _bits(b.to(narrow))) and torch.equal(a.isfinite(), b.isfinite())
        if not self.exact:
            wide_a, wide_b = at_least_fp32(a), at_least_fp32(b)
            self.difference = _largest(self.difference, (wide_a - wide_b).abs().max().item())
            self.largest = _largest(self.largest, max(wide_a.abs().max().item(), wide_b.abs().max().item()))


def different_settings(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[object, object]]:
    """Settings of shape or maths in which the two models differ: name -> (of a, of b)."""
    first, second = a.args.to_dict(), b.args.to_dict()
    names = [name for name in first | second if name not in _NOT_COMPARED]
    return {k: (first.get(k), second.get(k)) for k in names if first.get(k) != second.get(k)}


def different_training(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[object, object]]:
    """Differences in how two models train, or in the template of their prompts: name -> (of a, of b)."""
    said: list[dict[str, object]] = []
    for checkpoint in (a, b):
        training = checkpoint.training
        losses = {"train.balance": training.balance, "train.z_loss_weight": training.z_loss_weight}
        weight = {"load_balancing_weight": checkpoint.args.load_balancing_weight}
        said.append({**weight, **losses, "template": checkpoint.template()})
    return {name: (value, said[1][name]) for name, value in said[0].items() if value != said[1][name]}


def compare(a: Checkpoint, b: Checkpoint) -> list[Comparison]:
    """Compare two checkpoints of the same shape tensor by tensor, with adapters merged; one matrix at a time is in memory.

    The encoders of visual models are compared, too, if both checkpoints have them.
    """
    merged = Merged(a), Merged(b)
    shapes = merged[0].logical.shapes | merged[1].logical.shapes
    result = []
    for name, shape in progress(shapes.items(), desc="comparing", unit="tensor"):
        comparison = Comparison(name, (a.dtype(name), b.dtype(name)))
        for region in _matrices(whole_region(shape)):
            here, there = (
                source.read(name, region).contiguous()
                if name in source.logical.shapes
                else torch.zeros(region_shape(region))
                for source in merged
            )
            comparison.add(here, there)
        result.append(comparison)
    if a.args.visual and a.encoders and b.encoders:
        for name, shape in vision_shapes(a.args.visual).items():
            comparison = Comparison(name, (a.encoders.dtype(name), b.encoders.dtype(name)))
            comparison.add(*(one.read(name, whole_region(shape)).contiguous() for one in (a.encoders, b.encoders)))
            result.append(comparison)
    return result


def _matrices(region: Region) -> Iterator[Region]:
    """The matrices of a region of three dimensions one by one; any other region as it is."""
    if len(region) < 3:
        yield region
        return
    for e in range(region[0].start, region[0].stop):
        yield (slice(e, e + 1), *region[1:])


def _bits(x: Tensor) -> Tensor:
    """The same bytes viewed as integers, so that NaN equals NaN, and 0 differs from -0."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def _largest(a: float, b: float) -> float:
    return b if b != b or b > a else a
