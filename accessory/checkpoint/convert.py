"""Writes a checkpoint in any format, one tensor at a time, whatever the model's size."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from accessory.checkpoint import accessory, gptq, huggingface, mistral, peft
from accessory.checkpoint.accessory import check_suffix
from accessory.checkpoint.encoders import FILE as ENCODERS_FILE
from accessory.checkpoint.encoders import as_they_are
from accessory.checkpoint.merge import Merged
from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.publish import copy_companions, prepare_directory, publish_directory
from accessory.checkpoint.quantise import in_words, write_origin
from accessory.checkpoint.storage import TensorWriter, lay_out
from accessory.checkpoint.tiles import Files, PlannedTensor, planned_tensors
from accessory.console import listed, progress, say
from accessory.data.tokenizer import Tokenizer, check_vocabulary
from accessory.dtypes import DTYPES, all_finite, at_least
from accessory.errors import UserError
from accessory.model.adapter import adapter_name
from accessory.model.args import ModelArgs
from accessory.model.logical import EMBEDDING, LogicalModel, Overlaid, Source, check_divides, is_buffer
from accessory.model.moe.layouts import LAYOUTS, Layout
from accessory.model.visual import PRESETS
from accessory.settings import FileFormat, SavedFormat
from accessory.visual.vision import vision_shapes

TargetFormat = Literal["hf", "gptq", "awq", "mistral", "mixtral", "mixtral_sparse", "peft"]
HUGGINGFACE = ("hf", *gptq.WRITTEN)
"""Formats that are written in Hugging Face's files."""


@dataclass(frozen=True)
class Target:
    """The form to write. ``size``: model-parallel parts. ``dtype`` None: each tensor keeps its own."""

    format: TargetFormat
    size: int = 1
    dtype: torch.dtype | None = None
    suffix: FileFormat = "safetensors"
    shard_bytes: float = 5e9  # of a Hugging Face file

    @classmethod
    def of_run(cls, format: SavedFormat, layout: Layout, size: int) -> "Target":
        """The target of a run's saves, with its model in a layout."""
        return cls("hf") if format == "hf" else cls(cast(TargetFormat, layout.name), size, suffix=format)

    def check(self, args: ModelArgs) -> None:
        """Raise UserError if a model of this shape cannot be written in this form."""
        if self.format in LAYOUTS:
            check_divides(args, LAYOUTS[self.format], self.size)
        elif self.size != 1:
            raise UserError(f"--mp {self.size}: the format '{self.format}' is not cut; leave --mp away")
        if self.format in HUGGINGFACE and self.suffix != "safetensors":
            raise UserError(f"the format '{self.format}' is written as safetensors only")
        if self.format not in LAYOUTS and args.moe.score_bias:
            raise UserError(
                f"the format '{self.format}' has no place for the routers' score biases (train.balance: bias): "
                "write mixtral or mixtral_sparse"
            )
        if self.format in ("hf", "mistral") and args.quantise:
            raise UserError(
                f"the format '{self.format}' has no place for quantised matrices: write {' or '.join(gptq.WRITTEN)}, or a "
                "layout"
            )
        if self.format == "mistral" and args.labels:
            raise UserError("the format 'mistral' is of language models, and this is a classifier: write hf, or a layout")
        if args.visual and self.format in gptq.WRITTEN:
            raise UserError(f"the format '{self.format}' is of language models, and this one sees: write hf, or a layout")
        if args.visual and self.format == "hf" and not PRESETS[args.visual.preset].llava:
            raise UserError(
                f"transformers has no architecture that sees as the preset {args.visual.preset}: write mixtral, or "
                "mixtral_sparse"
            )
        check_suffix(args, self.suffix)
        self.quantisation(args)
        if not self.shard_bytes > 0:
            raise UserError("--shard-gb must be above 0")

    @property
    def holds_encoders(self) -> bool:
        """Whether a visual model's encoders are written into the model's files, where other programs read them, rather than
        to a file of their own."""
        return self.format in HUGGINGFACE or (self.format in LAYOUTS and self.suffix == "pth")

    def quantisation(self, args: ModelArgs) -> dict[str, Any]:
        """The ``quantization_config`` for Hugging Face's config.json; empty if matrices are not quantised."""
        return gptq.description(self.format, args) if self.format in gptq.WRITTEN else {}


def convert(checkpoint: Checkpoint, destination: Path, target: Target, parts: Source | None = None) -> None:
    """Write ``checkpoint`` to the directory ``destination``, which appears only when it is complete.

    One stored tensor at a time is in memory (at most three times its size; more while an adapter is merged). ``parts``: the
    source for parts of quantised matrices, read in the order of layers; None: the checkpoint.

    Raises:
        UserError: the destination is not empty, the disk is too small or fills up, the size does not divide the model,
            or the tokenizer does not fit the model.
    """
    as_it_is = target.format in gptq.WRITTEN or (target.format in LAYOUTS and target.dtype is None)
    source = Merged(checkpoint, dense=not as_it_is)
    if checkpoint.args.quantise and not source.logical.args.quantise:
        say(f"writing the numbers that matrices stand for which are {in_words(checkpoint.args.quantise)}")
    logical, biased = source.logical, list(source.logical.adapters)
    target.check(logical.args)
    if biased and target.format in (*HUGGINGFACE, "mistral"):
        raise UserError(f"the format '{target.format}' has no place for biases; these have one: {listed(biased)}")
    destination = _free(destination)
    checkpoint.warn_of_differing_replicas()
    tokenizer = Tokenizer(checkpoint.tokenizer) if checkpoint.tokenizer else None
    if tokenizer:
        check_vocabulary(tokenizer, checkpoint.args.vocab_size)
    dtypes = {name: target.dtype or checkpoint.dtype(name) for name in logical.shapes}
    dtypes |= {name: at_least(dtypes[name]) for name in dtypes if is_buffer(name)}  # their updates are too small for bf16
    dtypes |= dict.fromkeys(logical.parts, torch.uint8)
    if target.dtype is None:  # a bias has the precision of its matrix
        dtypes |= {adapter_name(name, "bias"): checkpoint.dtype(name) for name in biased}
    everything: Source = Overlaid(source, parts, logical.parts) if parts else source
    if logical.args.visual:
        checkpoint.check_encoders()
        assert checkpoint.encoders
        shapes = vision_shapes(logical.args.visual)
        dtypes |= {name: target.dtype or checkpoint.encoders.dtype(name) for name in shapes}
        everything = Overlaid(everything, checkpoint.encoders, shapes)
    files = planned_files(logical, target, dtypes)
    if logical.args.visual and not target.holds_encoders:
        files |= planned_tensors((replace(t, file=ENCODERS_FILE) for t in as_they_are(logical.args.visual)), dtypes)
    layout, origin = LAYOUTS.get(target.format), checkpoint.origin
    notes = {file: accessory.rank_notes(rank, target.size) for rank, file in enumerate(files)} if layout else {}
    companions = {name: path for name, path in checkpoint.companions.items() if name != ENCODERS_FILE}
    with _written_whole(destination, _nbytes(files)) as temporary:
        copy_companions(companions, temporary)
        _write_files(everything, temporary, files, notes)
        if logical.args.quantise and origin:
            write_origin(temporary, origin)
        write_description(temporary, target, logical, files, tokenizer, checkpoint.hf_config())
        checkpoint.training.write(temporary, tokenizer)
    if source.unchanged:
        say(f"warning: nothing changed in {listed(source.unchanged)}: what is added is lost in rounding, or is nothing")


def write_description(
    directory: Path,
    target: Target,
    logical: LogicalModel,
    files: Files,
    tokenizer: Tokenizer | None,
    hf_config: Mapping[str, Any],
) -> None:
    """Write the description that belongs beside ``files``; the tokenizer's own files must already be there.

    Args:
        hf_config: config.json of the Hugging Face directory that the model comes from, if any.
    """
    if target.format in HUGGINGFACE:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id} if tokenizer else {}
        ids = {key: number for key, number in ids.items() if number >= 0}
        dtype = next(planned.dtype for planned in _tensors(files) if planned.tiles[0].name == EMBEDDING)
        quantisation = target.quantisation(logical.args)
        huggingface.write_description(directory, logical.args, dtype, hf_config, quantisation, ids, files, _nbytes(files))
    elif target.format in LAYOUTS:
        accessory.write_description(directory, logical.args, LAYOUTS[target.format], bool(logical.adapters))
    else:
        mistral.write_description(directory, logical.args)


def export_peft(checkpoint: Checkpoint, destination: Path) -> None:
    """Write the adapters of ``checkpoint`` as the PEFT library saves them. Raises UserError for what PEFT cannot hold."""
    logical = checkpoint.logical
    if not logical.adapters:
        raise UserError("there is no adapter to export; name the base, then the adapter's directory")
    if more := [name for name in checkpoint.changed if name not in logical.adapters]:
        raise UserError(f"PEFT's LoRA has no place for trained weights of the base: {listed(more)}")
    Target("peft").check(checkpoint.args)
    files = planned_tensors(peft.planned_tiles(logical), {name: checkpoint.dtype(name) for name in logical.added})
    if apart := peft.untied(logical.adapters):
        rank = logical.adapters[apart[0]].rank
        zeros = sum(2 * logical.sizes[adapter_name(name, "lora_b")] for name in apart)
        say(
            "PEFT has one A for gate and up of the experts, and here each has its own: gate_up_proj is written at rank "
            f"{2 * rank}, not {rank}: the same function, but {zeros / 1e6:,.2f} M numbers of its B are zeros that take "
            "memory and time to serve, and that PEFT would train. What comes from PEFT has one A here, too, and its rank"
        )
    destination = _free(destination)
    with _written_whole(destination, _nbytes(files)) as temporary:
        _write_files(checkpoint, temporary, files, {})
        peft.write_description(temporary, logical.adapters, str(checkpoint.directories[0].directory.resolve()))
        checkpoint.training.write(temporary, None)


def _free(destination: Path) -> Path:
    """The destination's real path. Raises UserError if no directory can be made there."""
    destination = destination.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination}: exists already; name another directory, or remove it")
    if os.path.ismount(destination):
        raise UserError(f"{destination}: is a mount point; name a directory in it")
    return destination


@contextmanager
def _written_whole(destination: Path, nbytes: int) -> Iterator[Path]:
    """A temporary directory that becomes ``destination`` at the end, and is removed if anything fails. ``nbytes``: the space
    needed."""
    temporary = prepare_directory(destination)
    try:
        free = shutil.disk_usage(temporary).free
        if free < nbytes:
            raise UserError(
                f"{destination}: the disk is too small: {nbytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
            )
        yield temporary
        publish_directory(destination)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise UserError(f"{destination}: {what}; nothing was left behind") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def planned_files(logical: LogicalModel, target: Target, dtypes: dict[str, torch.dtype]) -> Files:
    """All tensors to be written for a model. ``dtypes``: of its logical tensors, and of its encoders if ``target`` holds
    them."""
    visual = logical.args.visual
    if target.format in HUGGINGFACE:
        config = target.quantisation(logical.args)
        tiles = huggingface.quantised_tiles(logical, config) if config else huggingface.model_tiles(logical)
        if visual:
            tiles = huggingface.llava_tiles(logical, visual)
        (tensors,) = planned_tensors(tiles, dtypes).values()
        return _shards(gptq.planned_words(tensors, config), target.shard_bytes)
    if target.format == "mistral":
        tiles = mistral.planned_tiles(logical, target.suffix)
    else:
        tiles = accessory.planned_tiles(logical, LAYOUTS[target.format], target.size, target.suffix)
    files = planned_tensors(tiles, dtypes)
    if visual and target.holds_encoders:
        for file, planned in files.items():  # LLaMA2-Accessory reads the encoders whole from every file
            placed = (replace(tile, file=file, key=accessory.PREFIX + tile.key) for tile in as_they_are(visual))
            planned |= planned_tensors(placed, dtypes)[file]
    return files


def _shards(tensors: dict[str, PlannedTensor], shard_bytes: float) -> Files:
    """Assign tensors to files of at most ``shard_bytes`` (but at least one tensor each)."""
    shards: list[dict[str, PlannedTensor]] = []
    room = 0.0
    for key, tensor in tensors.items():
        if tensor.nbytes > room or not shards:
            shards.append({})
            room = shard_bytes
        shards[-1][key] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards)}


def _write_files(source: Source, directory: Path, files: Files, notes: Mapping[str, dict[str, str]]) -> None:
    """Write every file, with its ``notes``. NaN and infinite values cause a warning only.

    Raises:
        UserError: finite values are too large for the dtype that they are written in.
    """
    damaged: dict[str, None] = {}
    with progress(total=_nbytes(files), unit="B", unit_scale=True, desc="writing") as bar:
        for file, tensors in files.items():
            announced = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
            lay_out(directory / file, announced, notes.get(file, {}))
            with TensorWriter(directory / file) as out:
                for key, tensor in tensors.items():
                    stored = tensor.filled(source)
                    if not all_finite(stored):
                        _refuse_overflow(source, tensor)
                        damaged |= {tile.name: None for tile in tensor.tiles}
                    out.write(key, stored)
                    bar.update(stored.nbytes)
                    del stored  # before the next is read
    if damaged:
        say(f"warning: {len(damaged)} tensors hold NaN or infinite values: {listed([*damaged])}")


def _refuse_overflow(source: Source, tensor: PlannedTensor) -> None:
    """Raise UserError if a finite value of ``source`` is infinite in the dtype of ``tensor``."""
    for tile in tensor.tiles:
        read = source.read(tile.name, tile.region)
        if (read.isfinite() & ~read.to(tensor.dtype).isfinite()).any():
            name = next(name for name, dtype in DTYPES.items() if dtype == tensor.dtype)
            most = f"{read.abs().max():.2g}"
            raise UserError(f"{tile.name} holds numbers too large for {name}, {most}: choose another --dtype")


def _nbytes(files: Files) -> int:
    return sum(tensor.nbytes for tensor in _tensors(files))


def _tensors(files: Files) -> Iterator[PlannedTensor]:
    return (tensor for tensors in files.values() for tensor in tensors.values())
