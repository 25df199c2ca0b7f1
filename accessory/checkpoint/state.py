"""A run's training state: trained weights and AdamW's moments, as logical slices, and the run's position.

DIR/part-RRR.safetensors   the slices of rank RRR, each box of a logical tensor under "KIND/NAME/number"
DIR/part-RRR.json          the box and the CRC-32 of each
DIR/config.json            the model's shape
DIR/state.json             the number of parts, and what the run needs to resume
DIR/SHA256SUMS             the digests of all these .json files, as sha256sum -c reads them; written last, to mark the state
                           as complete

KIND is weight, exp_avg or exp_avg_sq. Every value is stored once, by the first rank that holds it. Any layout and parallel
size can read what another has written. A file that does not match its checksums is refused.
"""

import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from accessory.checkpoint.encoding import AS_IS, Encoding
from accessory.checkpoint.publish import remove_directory
from accessory.checkpoint.storage import Stored, TensorWriter, index_file, lay_out
from accessory.checkpoint.tiles import Tile, TileReader
from accessory.config import from_mapping, read_mapping, write_json
from accessory.errors import UserError
from accessory.files import check_directory
from accessory.model.args import ModelArgs
from accessory.model.logical import Region, region_shape
from accessory.parallel.watchdog import progressed

MANIFEST, CONFIG, SUMS = "state.json", "config.json", "SHA256SUMS"
Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StateNotes:
    """A training state's notes on its run.

    Attributes:
        steps: optimiser steps done. rows: rows of data used, over all epochs. of_steps: the run's planned number of steps.
        global_batch: rows of a step.
        data_digest: of the samples and their order. base: the fingerprint of the base, if the state holds only a part of
            the model.
        settings: settings that the run's numbers depend on, by name (plain data); None: not recorded.
    """

    parts: int
    steps: int
    rows: int
    of_steps: int
    global_batch: int
    data_digest: str
    base: str | None = None
    settings: dict | None = None


class TrainingState:
    """A directory of the files above, as a source of logical tensors.

    Attributes:
        args: the model's shape. names: the trained tensors, with their shapes. stored: file -> key -> tensor.

    Raises:
        UserError: it is incomplete or damaged, as far as can be seen without reading the tensors.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        sums = _read_sums(check_directory(directory, "a training state"))
        self.notes = from_mapping(StateNotes, read_mapping(_sound(directory / MANIFEST, sums)), str(directory / MANIFEST))
        self.args = ModelArgs.load(_sound(directory / CONFIG, sums))
        self.stored: dict[str, dict[str, Stored]] = {}
        self._checksums: dict[str, dict[str, int]] = {}
        tiles: list[Tile] = []
        for rank in range(self.notes.parts):
            file = f"part-{rank:03d}.safetensors"
            self.stored[file] = index_file(directory / file).tensors
            table = read_mapping(_sound((directory / file).with_suffix(".json"), sums))
            self._checksums[file] = {key: entry["crc32"] for key, entry in table.items()}
            for key, entry in table.items():
                kind_and_name, _, _ = key.rpartition("/")
                box = tuple(slice(*ends) for ends in entry["box"])
                tiles.append(Tile(kind_and_name, box, file, key, _encoding(box)))
        self._reader = TileReader(str(directory), tiles, self.stored)
        if problems := list(self._reader.problems(partial=False, most=2)):
            raise UserError(f"{'; '.join(problems)}: this training state is damaged; resume from another one")
        self.names = {
            name.removeprefix("weight/"): tuple(
                max(t.region[axis].stop for t in found) for axis in range(len(found[0].region))
            )
            for name, found in self._reader.tiles.items()
            if name.startswith("weight/")
        }

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(prod(t.shape) * t.dtype.itemsize for tensors in self.stored.values() for t in tensors.values())

    def damaged(self, part: int) -> Iterator[str]:
        """The file and key of each tensor of one part that does not match its checksum."""
        file = f"part-{part:03d}.safetensors"
        for key, expected in self._checksums[file].items():
            progressed()
            if checksum(self.stored[file][key].map()) != expected:
                yield f"{self.directory / file}: {key}"

    def read(self, name: str, region: Region) -> Tensor:
        """The weights of logical tensor ``name`` in ``region``."""
        return self.read_kind("weight", name, region)

    def read_kind(self, kind: Kind, name: str, region: Region) -> Tensor:
        return self._reader.read(f"{kind}/{name}", region)


def _read_sums(directory: Path) -> dict[str, str]:
    """Digests by file name. A line that cannot be read is skipped, so that its file is refused."""
    path = directory / SUMS
    if not (directory / MANIFEST).is_file():
        raise UserError(f"{directory / MANIFEST}: no such file; this is no training state, or not a whole one")
    if not path.is_file():
        raise UserError(
            f"{path}: no such file: it is lost, or an earlier version saved this training state, and nothing tells whether "
            f"its files are whole. If you trust them: (cd {directory} && sha256sum *.json > {SUMS}), and resume again"
        )
    lines = (line.split() for line in path.read_text(errors="replace").splitlines())
    return {words[1].removeprefix("*"): words[0] for words in lines if len(words) == 2}


def _sound(path: Path, sums: Mapping[str, str]) -> Path:
    """The path, after checking the file against its digest."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the training state is incomplete: resume from another one")
    if _digest(path) != sums.get(path.name):
        raise UserError(f"{path} is not what was saved, or {SUMS} beside it is not; resume from another training state")
    return path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def states_in(directory: Path) -> list[Path]:
    """The training states in ``directory``, in order of their steps, without any whose writing was interrupted."""
    found = {int(match[1]): path for path in directory.glob("step*") if (match := re.fullmatch(r"step(\d+)", path.name))}
    return [found[steps] for steps in sorted(found)]


def drop_states(directory: Path, keep: int, keep_every: int | None) -> None:
    """Remove the training states in ``directory``, except the newest ``keep`` and those at multiples of ``keep_every``."""
    for old in states_in(directory)[:-keep]:
        if not keep_every or int(old.name.removeprefix("step")) % keep_every:
            remove_directory(old)


def is_state(directory: Path) -> bool:
    """Whether a directory looks like a training state, complete or not."""
    return any(os.path.isfile(directory / name) for name in (MANIFEST, "part-000.json", "part-000.safetensors"))


def _encoding(box: Region) -> Encoding:
    """How a box is stored: experts one above the other, as a model holds them."""
    return Encoding("e f d -> (e f) d") if len(box) == 3 else AS_IS


def checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def write_part(directory: Path, rank: int, pieces: Mapping[str, tuple[Region, Tensor]]) -> dict[str, str]:
    """Write one rank's part: by key, boxes of logical tensors, each with its values on the CPU.

    Returns:
        The digests that ``write_notes`` needs, by file name.
    """
    path = directory / f"part-{rank:03d}.safetensors"
    shapes = {key: _encoding(box).stored_shape(region_shape(box)) for key, (box, _) in pieces.items()}
    table: dict[str, Any] = {}
    lay_out(path, {key: (tensor.dtype, shapes[key]) for key, (_, tensor) in pieces.items()}, {})
    with TensorWriter(path) as file:
        for key, (box, tensor) in pieces.items():
            stored = tensor.reshape(shapes[key])
            file.write(key, stored)
            progressed()
            table[key] = {"box": [(s.start, s.stop) for s in box], "crc32": checksum(stored)}
    write_json(path.with_suffix(".json"), table)
    return {path.with_suffix(".json").name: _digest(path.with_suffix(".json"))}


def write_notes(directory: Path, args: ModelArgs, notes: StateNotes, sums: Mapping[str, str]) -> None:
    """Complete a state whose parts are written. ``sums``: the results of ``write_part`` on all ranks, merged."""
    write_json(directory / CONFIG, args.to_dict())
    write_json(directory / MANIFEST, asdict(notes))
    sums = {**sums, **{name: _digest(directory / name) for name in (CONFIG, MANIFEST)}}
    with open(directory / SUMS, "w") as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sums.items())
        file.flush()
        os.fsync(file.fileno())
