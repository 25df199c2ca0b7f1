"""Opens any checkpoint; the format is recognised from the directory's files."""

import dataclasses
import functools
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.accessory import AccessoryDirectory
from accessory.checkpoint.adapter import AdapterDirectory
from accessory.checkpoint.description import Description, Paths, described, own_config
from accessory.checkpoint.encoders import EncodersDirectory, encoder_reader
from accessory.checkpoint.fingerprint import fingerprint
from accessory.checkpoint.huggingface import HuggingFaceDirectory
from accessory.checkpoint.mistral import MistralDirectory
from accessory.checkpoint.peft import PeftDirectory
from accessory.checkpoint.publish import companion_files
from accessory.checkpoint.quantise import Dequantised, Quantising, as_quantised, in_words, read_origin
from accessory.checkpoint.tiles import Directory, TileReader, has_connector
from accessory.checkpoint.training import Training
from accessory.config import read_mapping
from accessory.console import listed, say
from accessory.data.chat_template import has_chat_template
from accessory.data.tokenizer import TOKENIZERS, Tokenizer
from accessory.errors import UserError
from accessory.files import check_directory
from accessory.model.adapter import Adapter
from accessory.model.build import RandomWeights
from accessory.model.logical import EMBEDDING, LogicalModel, Region, Source
from accessory.parallel.mesh import Axis
from accessory.settings import QuantiseSection
from accessory.visual.vision import Vision, make_vision

_DESCRIPTIONS = ("config.json", "params.json", "adapter.json", "adapter_config.json")


def recognise(path: str | Path) -> Directory:
    """Open a directory in the format of its files. Raises UserError if there is none, or files are damaged or missing."""
    directory = check_directory(path, "a checkpoint")
    formats = AdapterDirectory, PeftDirectory, AccessoryDirectory, HuggingFaceDirectory, MistralDirectory, EncodersDirectory
    for format in formats:
        if found := format.find(directory):
            return found
    if (directory / "state.json").is_file():
        raise UserError(f"{directory}: a training state, which resume={directory} goes on from, is no checkpoint")
    if inside := {file.parent.name for name in _DESCRIPTIONS for file in directory.glob(f"*/{name}")}:  # e.g. a run's
        raise UserError(f"{directory}: no checkpoint in it, but below it: {listed(sorted(inside))}; name one of these")
    raise UserError(
        f"{directory}: no checkpoint in it; expected consolidated.RR-of-MM.model.pth or .safetensors, "
        "consolidated.00.pth, consolidated.safetensors, or model.safetensors (one file or several)"
    )


@dataclasses.dataclass(frozen=True)
class _Layers:
    """The tensors that the first ``count`` directories of a checkpoint give together, as stored."""

    checkpoint: "Checkpoint"
    count: int

    def read(self, name: str, region: Region) -> Tensor:
        return self.checkpoint._read(name, region, self.count)


class Checkpoint:
    """One or several directories, in any format, as a source of logical tensors.

    The first is a whole model. Each further one replaces its tensors, extends it, or is added to its values
    (``model-diff``).

    Args:
        paths: a directory, or several in order.
        config: a config.json to use instead of the first directory's own, or several.
        strict: False: missing tensors and those of a wrong shape get random values, unexpected ones are ignored; each
            is reported.
        quantise: matrices to quantise on reading; the checkpoint then behaves like one that is stored quantised.

    Attributes:
        args: the model's shape.
        logical: its tensors, including all adapters. base_model: those of the base, as they are held.
        layout: the layout to run it in, if the user names none.
        visual: the image settings; ``args`` have them if the connector is there. encoders: reads the encoders, or None.
        tokenizer: path of a tokenizer.model, else of a tokenizer.json, or None.
        companions: files to copy along, by name. origin: the fingerprint before quantisation, if known.
        training: how it was trained, from the last directory that says.
        sound: whether everything fitted.

    Raises:
        UserError: something is missing, damaged, unexpected or of the wrong shape.
    """

    def __init__(
        self, paths: Paths, config: Paths | None = None, strict: bool = True, quantise: QuantiseSection | None = None
    ):
        paths = [paths] if isinstance(paths, str | Path) else list(paths)
        if not paths:
            raise UserError("expected a checkpoint directory, found an empty list")
        self.directories = [recognise(path) for path in paths]
        base = self.directories[0]
        if base.adds or base.format in ("adapter", "peft", "visual"):
            raise UserError(f"{paths[0]}: holds what changes another checkpoint; name that one before it")
        below = described(base, Description.read(config or own_config(base.directory)), strict)
        self.visual = next((d.visual for d in reversed(self.directories[1:]) if d.visual), below.visual or base.visual)
        below = dataclasses.replace(below, visual=self.visual if has_connector(base) else None)
        own = [below]  # each directory's
        for directory in self.directories[1:]:
            sees = self.visual if has_connector(directory) else own[-1].visual
            own.append(dataclasses.replace(below, labels=directory.labels or own[-1].labels, visual=sees))
        self.args = as_quantised(own[-1], quantise, str(paths[0]))
        self._as_stored = LogicalModel(below)
        self.base_model = LogicalModel(dataclasses.replace(below, quantise=self.args.quantise))
        self.layout = base.layout
        self.companions: dict[str, Path] = {}
        for directory in reversed(self.directories):
            self.companions |= companion_files(directory.directory)
        tokenizers = (d.directory / name for name in TOKENIZERS for d in self.directories)
        self.tokenizer = next((path for path in tokenizers if path.is_file()), None)
        self.training = Training.read(directory.directory for directory in self.directories)
        self._added = [d.adapters(LogicalModel(args)) for d, args in zip(self.directories, own, strict=True)]
        adapters: dict[str, Adapter] = {}
        for number, (directory, added) in enumerate(zip(self.directories, self._added, strict=True)):
            both = adapters.keys() & added.keys()
            # adapters that the base directory itself holds may have been trained further
            again = number == 1 and all(adapters[name] == added[name] for name in both)
            if both and not again:
                raise UserError(f"{directory.directory}: {min(both)} has an adapter already; merge the first adapter before")
            adapters |= added
        self.logical = LogicalModel(self.args, adapters)
        self.readers = [
            TileReader(str(directory.directory), directory.tiles(LogicalModel(args, added)), directory.stored)
            for directory, args, added in zip(self.directories, own, self._added, strict=True)
        ]
        readers = (encoder_reader(directory, self.visual) for directory in reversed(self.directories) if self.visual)
        self.encoders = next(filter(None, readers), None)
        self.sound = True
        self._strict = strict
        for reader in self.readers[1:]:
            if hidden := [name for name in self._as_stored.codecs if reader.tiles[name]]:
                raise UserError(
                    f"{reader.where}: cannot change {hidden[0]} of {paths[0]}, which is quantised: name its original"
                )
        self._check(strict)

    def _check(self, strict: bool) -> None:
        for number, reader in enumerate(self.readers):
            partial = number > 0 and self.directories[number].may_lack
            problems = list(reader.problems(partial, most=2 if strict else None))
            if strict and problems:
                told = listed(problems, 2, separator="; ")
                raise UserError(f"{told}: does config.json describe this checkpoint? accessory inspect lists all")
            for problem in problems:
                say(f"warning: {problem}")
            self.sound &= not problems
        for directory in self.directories:
            path, theirs = directory.directory, directory.fingerprint
            if theirs is not None and theirs != self.fingerprint:
                if was := self._held_in_training(directory):
                    say(f"warning: {path}: was trained beside this base {was}; here it is {in_words(self.args.quantise)}")
                    continue
                message = f"{path}: belongs to another base (fingerprint {theirs}, this is {self.fingerprint})"
                if strict:
                    raise UserError(f"{message}; name the base that it was trained on, or force it (--force, strict=False)")
                say(f"warning: {message}")
                self.sound = False
        for name in self.logical.added:
            if not any(name in reader.complete for reader in self.readers):
                raise UserError(f"{self.directories[-1].directory}: {name} is missing, or not whole")

    def vision(self, mp: Axis, dtype: torch.dtype, device: torch.device) -> Vision | None:
        """The model's encoders; None: it reads text only. Raises UserError if they are missing."""
        if self.visual is None:
            return None
        self.check_encoders()
        assert self.encoders
        return make_vision(self.visual, self.encoders, mp, dtype, device)

    def check_encoders(self) -> None:
        """Raise UserError if the model takes images and its encoders are missing."""
        if self.visual and not self.encoders:
            raise UserError(
                f"{self.directories[0].directory}: the model sees, and the encoders that it sees with are not in it: name a "
                "directory that holds them behind it"
            )

    def template(self) -> str | None:
        """The name of the default template for prompts; None: neither training.json nor the tokenizer names one."""
        own = self.tokenizer is not None and has_chat_template(Tokenizer(self.tokenizer))
        return self.training.template or ("chat_template" if own else None)

    def read(self, name: str, region: Region) -> Tensor:
        """The values of logical tensor ``name`` in ``region``: parts of a quantised matrix, or the matrix dequantised."""
        return self._all.read(name, region)

    @functools.cached_property
    def _all(self) -> Source:
        return self._held(len(self.readers), self.base_model)

    @functools.cached_property
    def _base(self) -> Source:
        return self._held(self.base_layers, self.base_model)

    def _held(self, layers: int, logical: LogicalModel) -> Source:
        """The tensors of the first ``layers`` directories, quantised as in ``logical``."""
        source: Source = _Layers(self, layers)
        if logical.args.quantise != self._as_stored.args.quantise:
            source = Quantising(source, logical)
        return Dequantised(source, logical)

    def _read(self, name: str, region: Region, layers: int) -> Tensor:
        """The values of a stored tensor after the first ``layers`` directories."""
        for number in reversed(range(layers)):
            reader, adds = self.readers[number], self.directories[number].adds
            if name in reader.complete and not adds:
                return reader.read(name, region)
            if reader.tiles[name] and (number or self._strict):
                value = self._read(name, region, number)
                value = value.to(torch.promote_types(value.dtype, reader.dtype(name)), copy=True)
                reader.lay_over(value, name, region, adds)
                return value
        assert not self._strict
        if name in self._as_stored.parts:
            raise UserError(f"{self.directories[0].directory}: {name} is missing, and cannot be made up")
        return RandomWeights(self.logical if name in self.logical.shapes else self._as_stored, seed=0).read(name, region)

    @functools.cached_property
    def base_layers(self) -> int:
        """The number of directories that make the base: those before the first that was trained on it."""
        trained = (n for n, d in enumerate(self.directories) if n and (self._added[n] or d.fingerprint is not None))
        return next(trained, len(self.directories))

    @functools.cached_property
    def changed(self) -> list[str]:
        """The base's own tensors that the directories after the base replace or change."""
        return sorted({n for reader in self.readers[self.base_layers :] for n in self.logical.dense if reader.tiles[n]})

    def read_base(self, name: str, region: Region) -> Tensor:
        """The base's values of a tensor."""
        return self._base.read(name, region)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the base, quantised as it is held."""
        return fingerprint(self.read_base, self.base_model)

    def _fingerprint_if(self, quantise: QuantiseSection | None) -> str:
        """The fingerprint that the base would have if it were quantised in this way."""
        logical = LogicalModel(dataclasses.replace(self._as_stored.args, quantise=quantise))
        return fingerprint(self._held(self.base_layers, logical).read, logical)

    @functools.cached_property
    def origin(self) -> str | None:
        if self._as_stored.args.quantise:
            return read_origin(self.directories[0].directory)
        return self._fingerprint_if(None) if self.args.quantise else None

    def _held_in_training(self, directory: Directory) -> str | None:
        """How the base was quantised when a directory was trained on it; None if its base was another model."""
        if directory.fingerprint == self.origin:
            return in_words(None)
        if directory.quantise is None or self._as_stored.args.quantise:
            return None
        with suppress(UserError):  # another shape
            if directory.fingerprint == self._fingerprint_if(directory.quantise):
                return in_words(directory.quantise)
        return None

    def hf_config(self) -> dict[str, Any]:
        """The first directory's config.json if it is Hugging Face's; for a LLaVA, the part for the language model."""
        base = self.directories[0]
        config = read_mapping(base.directory / "config.json") if base.format == "hf" else {}
        return dict(config.get("text_config", config))

    def dtype(self, name: str) -> torch.dtype:
        """A dtype that holds every value that the directories have for logical tensor ``name``. For a quantised matrix,
        dequantised, it is that of the embedding."""
        if name in self.logical.parts:
            return torch.uint8
        if name in self.logical.codecs:
            name = EMBEDDING
        holding = [n for n, reader in enumerate(self.readers) if reader.tiles[name]]
        if name in self.logical.dense:  # an adapter directory has its precision of training: the base's own decides
            holding = [n for n in holding if self.directories[n].format != "adapter" or n == holding[0]]
        dtypes = [self.readers[n].dtype(name) for n in holding]
        return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32

    def warn_of_differing_replicas(self) -> None:
        """Warn if ranks' files disagree about tensors that each of them holds whole; the first file's values are used."""
        for reader in self.readers:
            if names := reader.differing_replicas():
                say(f"warning: {reader.where}: the files do not agree about {listed(names)}; do they belong together?")
