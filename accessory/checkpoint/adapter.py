"""What a run trained beside a base model: adapters, and those of the base's own tensors that it changed.

DIR/adapter.safetensors   every tensor whole, under its logical name, in the precision it was trained in
DIR/adapter.json          which base it belongs to, and what each adapter is

A is [rank, in], B is [out, rank], a bias is [out]; of experts, all of them in order in front: [E, ...].
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.storage import Stored, TensorWriter, index_file
from accessory.checkpoint.tiles import Tile
from accessory.config import read_mapping, write_json
from accessory.errors import UserError
from accessory.model.adapter import Adapter
from accessory.model.args import ModelArgs
from accessory.model.logical import Adapters, logical_cuts
from accessory.model.moe.layouts import get_layout

MANIFEST = "adapter.json"
TENSORS = "adapter.safetensors"
AXES = {"lora_a": "[expert,] rank, in", "lora_b": "[expert,] out, rank", "bias": "[expert,] out"}


class AdapterDirectory:
    """A directory of the files above.

    Attributes:
        adapters: by their matrix. fingerprint: of the base.
    """

    format, layout, size, adds, may_lack = "adapter", "mixtral", 1, False, False

    def __init__(self, directory: Path):
        self.directory = directory
        manifest = read_mapping(directory / MANIFEST)
        try:
            axes, self.fingerprint = manifest["axes"], manifest["base"]["fingerprint"]
            self.adapters: Adapters = {
                name: Adapter(rank=entry["rank"], scaling=entry["scaling"], bias=entry["bias"])
                for name, entry in manifest["adapters"].items()
            }
            self._digests: dict[str, str] = dict(manifest["tensors"])
            if not isinstance(self.fingerprint, str) or not all(map(_is_sound, self.adapters.values())):
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

    def tiles(self, args: ModelArgs) -> Iterator[Tile]:
        base = logical_cuts(args, get_layout("mixtral"))
        if odd := [name for name in self.adapters if name not in base or len(base[name].shape) < 2]:
            raise UserError(f"{self.directory / MANIFEST}: '{odd[0]}' is no matrix of this model; is it of another base?")
        cuts = logical_cuts(args, get_layout("mixtral"), self.adapters)
        if missing := cuts.keys() - base.keys() - self._digests.keys():
            raise UserError(f"{self.directory / MANIFEST}: lacks {min(missing)}")
        for name in self._digests:
            if name not in cuts:
                raise UserError(f"{self.directory / MANIFEST}: '{name}' is no tensor of this model; is it of another base?")
            yield Tile(name, cuts[name].region(0, 1), TENSORS, name, slot=(0, 1) if len(cuts[name].shape) == 3 else None)

    def _check(self, name: str, stored: Stored) -> None:
        """The manifest knows every tensor's digest: permuted experts have the right shape, but not the right order."""
        if name in self._digests and self._digests[name] != digest(stored.map()):
            raise UserError(
                f"{self.directory / TENSORS}: {name} is not what was saved: damaged, or its experts or axes were put in "
                "another order"
            )


def _is_sound(adapter: Adapter) -> bool:
    rank, scaling = adapter.rank, adapter.scaling
    numbers = type(rank) is int and rank >= 0 and type(scaling) in (int, float) and 0 < scaling < math.inf
    return numbers and isinstance(adapter.bias, bool) and (rank > 0 or adapter.bias)


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()[:32]


class AdapterWriter:
    """Write an adapter directory, tensor by tensor.

    Args:
        shapes: of every tensor, by logical name.
        base: the fingerprint of the model that it belongs to, and whatever a person wants to know of it.
    """

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        adapters: Adapters,
        base: Mapping[str, Any],
    ):
        self.directory, self.adapters, self.base = directory, adapters, base
        self.digests: dict[str, str] = {}
        self._file = TensorWriter(directory / TENSORS, {name: (dtype, shape) for name, shape in shapes.items()}, {})

    def write(self, name: str, tensor: Tensor) -> None:
        self._file.write(name, tensor)
        self.digests[name] = digest(tensor)

    def __enter__(self) -> "AdapterWriter":
        self._file.__enter__()
        return self

    def __exit__(self, failed: Any, *rest: Any) -> None:
        self._file.__exit__(failed, *rest)
        if not failed:
            described = {name: {"rank": a.rank, "scaling": a.scaling, "bias": a.bias} for name, a in self.adapters.items()}
            manifest = {"base": dict(self.base), "axes": AXES, "adapters": described, "tensors": self.digests}
            write_json(self.directory / MANIFEST, manifest)
