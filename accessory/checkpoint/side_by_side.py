"""Several adapters beside one base, none of them merged; each document uses one adapter or none."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.checkpoint.description import Paths
from accessory.checkpoint.open import Checkpoint
from accessory.dtypes import all_finite
from accessory.errors import UserError
from accessory.model.adapter import Adapter, adapter_name, name_of_a
from accessory.model.args import ModelArgs
from accessory.model.logical import Adapters, LogicalModel, Region, Source

Added = tuple[Adapters, Source]
"""An adapter: what it adds to which matrices, and the source of its tensors."""


class SideBySide:
    """``base`` with ``adapters``, by name, as the source of one model that has them all (see ``Adapter.members``).

    Attributes:
        logical: its tensors.
    """

    def __init__(self, args: ModelArgs, base: Source, adapters: Mapping[str, Added]):
        self.base, self.adapters = base, adapters
        stacks = {
            matrix: Adapter.side_by_side([given.get(matrix, Adapter()) for given, _ in adapters.values()])
            for matrix in LogicalModel(args).matrices
            if any(matrix in given for given, _ in adapters.values())
        }
        self.logical = LogicalModel(args, stacks, tuple(adapters))
        self._matrix_of = {adapter_name(matrix, part): (matrix, part) for matrix in stacks for part in ("lora_a", "lora_b")}

    def read(self, name: str, region: Region) -> Tensor:
        """The values of a tensor in ``region``.

        Raises:
            UserError: an adapter holds NaN or infinite values, which even times zero would spoil other documents' results.
        """
        if name not in self._matrix_of:
            return self.base.read(name, region)
        matrix, part = self._matrix_of[name]
        columns: list[Tensor] = []
        for called, (given, source) in self.adapters.items():
            found = _columns(given.get(matrix, Adapter()), source, matrix, part, region)
            if not all(map(all_finite, found)):
                raise UserError(f"adapter '{called}': {name} holds NaN or infinite values: get it anew, or leave it out")
            columns += found
        axis, rank = (-2 if part == "lora_a" else -1), self.logical.adapters[matrix].rank
        whole = torch.cat(columns, axis)
        missing = rank - whole.shape[axis]
        whole = F.pad(whole, (0, 0, 0, missing) if part == "lora_a" else (0, missing))
        return whole.narrow(axis, region[axis].start, region[axis].stop - region[axis].start)


def _columns(adapter: Adapter, source: Source, matrix: str, part: str, region: Region) -> list[Tensor]:
    """One adapter's part of A or B: its ranks, then its bias as one more rank."""
    found, ranks = [], slice(0, adapter.rank)
    if part == "lora_a":
        *groups, _, inner = region
        if adapter.rank:
            found.append(source.read(name_of_a(matrix, adapter), (*groups, ranks, inner)))
        if adapter.bias:
            found.append(torch.zeros(*(s.stop - s.start for s in groups), 1, inner.stop - inner.start))
    else:
        if adapter.rank:
            found.append(source.read(adapter_name(matrix, "lora_b"), (*region[:-1], ranks)))
        if adapter.bias:
            found.append(source.read(adapter_name(matrix, "bias"), region[:-1]).unsqueeze(-1))
    return found


def open_adapters(
    base: Checkpoint, directories: Mapping[str, str | Path], config: Paths | None = None, strict: bool = True
) -> dict[str, Checkpoint]:
    """The base with each of several adapters, by name; all can be used side by side.

    Args:
        config, strict: as ``base`` was opened with.

    Raises:
        UserError: an adapter cannot be read, belongs to another base, or changes tensors that the others share.
    """
    below = [directory.directory for directory in base.directories]
    if base.logical.adapters:
        raise UserError(
            f"{below[-1]}: holds an adapter, and others cannot stand beside it: merge it first (accessory merge)"
        )
    found = {}
    for name, directory in directories.items():
        one, where = Checkpoint([*below, directory], config, strict, base.args.quantise), f"adapter '{name}' ({directory})"
        if one.args.labels != base.args.labels:
            raise UserError(f"{where}: makes a classifier of the base, which gives no answers: ask it alone (classify)")
        if not one.logical.adapters:
            raise UserError(f"{where}: no adapter in it")
        if replaced := _replaced(base, one):
            raise UserError(
                f"{where}: was trained together with the base's own {replaced}, which everything here shares, so that it "
                "cannot be chosen per request: merge it with a copy of the base (accessory merge), and load that alone"
            )
        found[name] = one
    return found


def _replaced(base: Checkpoint, one: Checkpoint) -> str | None:
    """A tensor of the base that the last directory of ``one`` changes. An equal copy, as PEFT may save, is no change."""
    reader, adds = one.readers[-1], one.directories[-1].adds
    for name in base.logical.dense:
        if reader.tiles[name]:
            theirs, ours = (source.read(name, base.logical.whole(name)) for source in (one, base))
            if adds or not torch.equal(theirs, ours.to(theirs.dtype)):
                return name
    return None
