"""What a run saves of its model: a converted directory, or what was trained as an adapter directory.

Every rank of those that have the same writes its own range of each tensor's bytes.
"""

from collections import ChainMap, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from accessory.checkpoint.accessory import file_name, rank_notes
from accessory.checkpoint.adapter import TENSORS, digest, lay_out_adapter, write_manifest
from accessory.checkpoint.convert import Target, planned_files, write_description
from accessory.checkpoint.encoders import FILE as ENCODERS_FILE
from accessory.checkpoint.publish import copy_companions
from accessory.checkpoint.storage import TensorWriter, lay_out
from accessory.checkpoint.tiles import Tile, within
from accessory.data.tokenizer import Tokenizer
from accessory.model.decoder import Decoder
from accessory.model.logical import held_dtype, region_shape, whole_region
from accessory.parallel.fsdp import show_masters
from accessory.parallel.mesh import Axis
from accessory.parallel.watchdog import progressed
from accessory.settings import SavedFormat
from accessory.train.saver import Save, to_host, wait_for_copies, write_now
from accessory.visual.vision import Vision


@dataclass(frozen=True)
class Piece:
    """A rank's range of a stored tensor: its numbers from ``start`` on, of all of them in a row, in host memory."""

    key: str
    start: int
    values: Tensor

    @classmethod
    def own(cls, key: str, stored: Tensor, axis: Axis) -> "Piece":
        """Of a tensor that all ranks of ``axis`` have."""
        flat = stored.reshape(-1)
        first, last = (len(flat) * rank // axis.size for rank in (axis.rank, axis.rank + 1))
        return cls(key, first, to_host(flat[first:last]))


def write_pieces(path: Path, pieces: list[Piece]) -> None:
    with TensorWriter(path) as file:
        for piece in pieces:
            file.write_part(piece.key, piece.start, piece.values)
            progressed()


@torch.no_grad()
def save_model(
    model: Decoder,
    directory: Path,
    companions: dict[str, Path],
    dtype: torch.dtype,
    format: SavedFormat,
    describe: Callable[[Path], None] = lambda _: None,
    write: Callable[[Save], None] = write_now,
    tokenizer: Tokenizer | None = None,
    hf_config: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Save a whole model: a file for each model-parallel rank in the layout it runs in, or Hugging Face's. Every rank must
    call this.

    Parameters are gathered one by one, so a rank never holds more than its share and one whole parameter.

    Args:
        companions: files to be copied into the directory, by the names that they get: the tokenizer.
        describe: writes what else belongs into it.
        write: what to do with it: at once, or in the background.
        tokenizer, hf_config: see ``convert.write_description``.
    """
    mp, logical = model.mesh.mp, model.logical
    target, hf = Target.of_run(format, model.layout, mp.size), format == "hf"
    sight = model.vision if target.holds_encoders and isinstance(model.vision, Vision) else None
    if sight:
        companions = {name: path for name, path in companions.items() if name != ENCODERS_FILE}
    encoders = dict(sight.tensors()) if sight else {}
    dtypes = {name: held_dtype(name, dtype) for name in logical.shapes} | dict.fromkeys(encoders, dtype)
    files = planned_files(logical, target, dtypes)
    # what this rank writes into, and who else does: all ranks, or those that have the same part of the model
    own = files if hf else {file: files[file] for file in [file_name(mp.rank, mp.size, target.suffix)]}
    writers = model.mesh.world if hf else model.mesh.dp
    tiles: dict[str, list[Tile]] = defaultdict(list)
    for tile in (tile for planned in own.values() for tensor in planned.values() for tile in tensor.tiles):
        tiles[tile.name].append(tile)
    pieces: dict[str, list[Piece]] = {file: [] for file in own}
    file_of = {key: file for file, planned in own.items() for key in planned}
    own_parts = gathered_whole(model, dtype=dtype) if hf else gathered(model, dtype=dtype)
    for name, part in chain(own_parts, encoders.items()):
        is_whole = hf or name in encoders
        region = whole_region(part.shape) if is_whole else model.cuts[name].region(mp.rank, mp.size)
        for tile in tiles[name]:
            stored = part.new_empty(tile.stored_shape())
            tile.encoding.write(part[within(tile.region, region)], stored)
            pieces[file_of[tile.key]].append(Piece.own(tile.key, stored, writers))
    wait_for_copies()

    def make_files(folder: Path) -> None:
        if writers.rank == 0:
            for file, planned in own.items():
                announced = {key: (tensor.dtype, tensor.shape) for key, tensor in planned.items()}
                lay_out(folder / file, announced, {} if hf else rank_notes(mp.rank, mp.size))

    def write_own(folder: Path) -> None:
        for file, own_pieces in pieces.items():
            write_pieces(folder / file, own_pieces)

    def finish(folder: Path, _: list[Any]) -> None:
        copy_companions(companions, folder)
        write_description(folder, target, logical, files, tokenizer, hf_config)
        describe(folder)

    write(Save(directory, "the model", write_own, finish, make_files))


@torch.no_grad()
def save_trainable(
    model: Decoder,
    directory: Path,
    companions: dict[str, Path],
    base: dict[str, Any],
    describe: Callable[[Path], None] = lambda _: None,
    write: Callable[[Save], None] = write_now,
) -> None:
    """Save what trains as an adapter directory, every tensor whole and in its masters' precision.

    Args:
        base: the fingerprint of the model that it belongs to, and its path. The others are those of ``save_model``.
    """
    show_masters(model)
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    world, pieces, own_digests = Axis(dist.get_rank(), dist.get_world_size()), list[Piece](), dict[str, str]()
    for number, (name, tensor) in enumerate(gathered_whole(model, trained.keys())):
        if number % world.size == world.rank:
            own_digests[name] = digest(tensor.cpu())
        pieces.append(Piece.own(name, tensor, world))
    wait_for_copies()

    def make_file(folder: Path) -> None:
        if world.rank == 0:
            lay_out_adapter(folder, model.logical, trained)

    def write_own(folder: Path) -> dict[str, str]:
        write_pieces(folder / TENSORS, pieces)
        return own_digests

    def finish(folder: Path, digests: list[dict[str, str]]) -> None:
        of_all = ChainMap(*digests)
        write_manifest(folder, model.logical, {name: of_all[name] for name in trained}, base)
        copy_companions(companions, folder)
        describe(folder)

    what = "what was trained; it belongs to the base model"
    write(Save(directory, what, write_own, finish, make_file))


def gathered_whole(
    model: Decoder, names: Collection[str] | None = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Logical tensors, each gathered over data-parallel and model-parallel ranks (collectives); see ``gathered``."""
    mp = model.mesh.mp
    for name, part in gathered(model, names, dtype):
        dim = model.cuts[name].dim_over(mp.size)
        if dim is not None and mp.size > 1:
            parts = [torch.empty_like(part) for _ in range(mp.size)]
            dist.all_gather(parts, part.contiguous(), group=mp.group)
            part = torch.cat(parts, dim)
        yield name, part


@torch.no_grad()
def gathered(
    model: Decoder, names: Collection[str] | None = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """This model-parallel rank's boxes of logical tensors (or of some) by name, each gathered over the data-parallel ranks
    (a collective); in the dtype that a model in ``dtype`` is saved in, if one is given."""
    show_masters(model)
    mp = model.mesh.mp
    for name, parameter in model.named_tensors():
        if names is None or name in names:
            progressed()
            part = parameter.to(held_dtype(name, dtype)) if dtype else parameter
            whole = part.full_tensor() if isinstance(part, DTensor) else part
            yield name, whole.view(region_shape(model.cuts[name].region(mp.rank, mp.size)))
