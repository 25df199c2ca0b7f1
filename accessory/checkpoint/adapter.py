"""The tensors that a run trained on a base model: adapters, and those of the base's own tensors that it changed.

DIR/adapter.safetensors   every tensor whole, under its logical name, in the precision it was trained in
DIR/adapter.json          the base's fingerprint, a description of each adapter, and the labels of a classifier

A is [rank, in], B is [out, rank], a bias is [out]; for experts there is one more axis in front: [E, ...]. A tied w3 has no
A of its own but uses that of w1.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.storage import Stored, index_file, lay_out
from accessory.checkpoint.tiles import Directory, Tile
from accessory.config import from_mapping, read_mapping, write_json
from accessory.errors import UserError
from accessory.model.adapter import Adapter
from accessory.model.logical import Adapters, LogicalModel
from accessory.model.visual import VisualArgs
from accessory.settings import QuantiseSection

MANIFEST = "adapter.json"
TENSORS = "adapter.safetensors"
AXES = {"lora_a": "[expert,] rank, in", "lora_b": "[expert,] out, rank", "bias": "[expert,] out"}


class AdapterDirectory(Directory):
    """A directory of the files above."""

    format, may_lack = "adapter", False

    def __init__(self, directory: Path):
        self.directory = directory
        manifest = read_mapping(directory / MANIFEST)
        try:
            axes, self.fingerprint = manifest["axes"], manifest["base"]["fingerprint"]
            self.quantise = QuantiseSection.read(manifest["base"].get("quantise"))
            self._adapters: Adapters = {
                name: Adapter(
                    rank=entry["rank"], scaling=entry["scaling"], bias=entry["bias"], tied=entry.get("tied", False)
                )
                for name, entry in manifest["adapters"].items()
            }
            self._digests: dict[str, str] = dict(manifest["tensors"])
            self.labels = tuple(manifest.get("labels", ()))
            if "visual" in manifest:
                self.visual = from_mapping(VisualArgs, manifest["visual"], str(directory / MANIFEST), "visual.")
            known = isinstance(self.fingerprint, str) and all(isinstance(label, str) for label in self.labels)
            if not known or not all(map(_is_sound, self._adapters.values())):
                raise TypeError("a value of another kind than expected")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{directory / MANIFEST}: not the description of an adapter ({error})") from error
        if axes != AXES:
            raise UserError(f"{directory / MANIFEST}: the tensors' axes are {axes}, expected {AXES}")
        self.stored = {TENSORS: index_file(directory / TENSORS).tensors}
        for name, stored in self.stored[TENSORS].items():
            self._check(name, stored)

    @classmethod
    def find(cls, directory: Path) -> "AdapterDirectory | None":
        return cls(directory) if (directory / MANIFEST).is_file() else None

    def adapters(self, base: LogicalModel) -> Adapters:
        if odd := [name for name in self._adapters if name not in base.matrices]:
            raise UserError(f"{self.directory / MANIFEST}: '{odd[0]}' is no matrix of this model; is it of another base?")
        return self._adapters

    def tiles(self, logical: LogicalModel) -> Iterator[Tile]:
        if missing := logical.added - self._digests.keys():
            raise UserError(f"{self.directory / MANIFEST}: lacks {min(missing)}")
        for name in self._digests:
            if name not in logical.shapes:
                raise UserError(f"{self.directory / MANIFEST}: '{name}' is no tensor of this model; is it of another base?")
            yield Tile(name, logical.whole(name), TENSORS, name)

    def _check(self, name: str, stored: Stored) -> None:
        """Check a tensor's digest: permuted experts would have the right shape, but the wrong order."""
        if name in self._digests and self._digests[name] != digest(stored.map()):
            raise UserError(
                f"{self.directory / TENSORS}: {name} is not what was saved: damaged, or its experts or axes were put in "
                "another order"
            )


def _is_sound(adapter: Adapter) -> bool:
    rank, scaling = adapter.rank, adapter.scaling
    numbers = type(rank) is int and rank >= 0 and type(scaling) in (int, float) and 0 < scaling < math.inf
    return numbers and isinstance(adapter.bias, bool) and isinstance(adapter.tied, bool) and (rank > 0 or adapter.bias)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()[:32]


def lay_out_adapter(directory: Path, logical: LogicalModel, dtypes: Mapping[str, torch.dtype]) -> None:
    """Make the file for the tensors, which are written later."""
    lay_out(directory / TENSORS, {name: (dtype, logical.shapes[name]) for name, dtype in dtypes.items()}, {})


def write_manifest(directory: Path, logical: LogicalModel, digests: Mapping[str, str], base: Mapping[str, Any]) -> None:
    """Write adapter.json for tensors with these ``digests``."""
    described = {
        name: {"rank": a.rank, "scaling": a.scaling, "bias": a.bias, "tied": a.tied} for name, a in logical.adapters.items()
    }
    manifest: dict[str, Any] = {"base": dict(base), "axes": AXES, "adapters": described, "tensors": dict(digests)}
    if logical.args.labels:
        manifest["labels"] = logical.args.labels
    if logical.args.visual:
        manifest["visual"] = logical.args.visual.to_dict()
    write_json(directory / MANIFEST, manifest)
