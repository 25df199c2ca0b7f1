"""A model's description: its config.json or params.json, and the sizes that these leave to the tensors.

LLaMA2-Accessory takes the size of the vocabulary from the tokenizer and head_dim from dim / n_heads, so its users' files
lack these, or have -1 instead. A missing size is read off the tensors' shapes; no default is assumed.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accessory.checkpoint import llava
from accessory.checkpoint.huggingface import CONFIG_KEYS, values_from
from accessory.checkpoint.tiles import Directory
from accessory.config import from_mapping, read_mapping
from accessory.errors import UserError
from accessory.model.args import ModelArgs, MoEArgs
from accessory.model.logical import LogicalModel

Paths = str | Path | Sequence[str | Path]
EXPERTS = "moe.num_experts"
SIZES = ("dim", "hidden_dim", "head_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", EXPERTS)
# keys of the reference's config.json for what it adds to a model; its tensors show that as well
_PEFT_KEYS = ("lora_rank", "bias_tuning", "norm_tuning")


@dataclass(frozen=True)
class Description:
    """The content of a config.json, or of several; later ones override earlier ones.

    Attributes:
        values: by the names of ModelArgs; those of a group as ``moe.num_experts``.
        names: the file's own names, where they differ.
        where: the files.
    """

    values: Mapping[str, Any]
    names: Mapping[str, str]
    where: str

    @classmethod
    def read(cls, paths: Paths) -> "Description":
        """Raises UserError if a file is not valid, or asks for something that this decoder does not implement."""
        paths = [paths] if isinstance(paths, str | Path) else list(paths)
        config = {key: value for path in paths for key, value in read_mapping(path).items() if key not in _PEFT_KEYS}
        where, names = ", ".join(map(str, paths)), {}
        if "hidden_size" in config or "text_config" in config:
            visual = {"visual": llava.visual_values(config, where)} if "text_config" in config else {}
            config, names = values_from(config.get("text_config", config), where) | visual, CONFIG_KEYS
        elif Path(paths[0]).name == "params.json":  # an unknown key is allowed if it is off
            known = {field.name for field in dataclasses.fields(ModelArgs)}
            config = {key: value for key, value in config.items() if key in known or value not in (None, False)}
        if isinstance(moe := config.get("moe"), dict):
            config = {key: value for key, value in config.items() if key != "moe"}
            config |= {f"moe.{key}": value for key, value in moe.items()}
        return cls(config, names, where)

    def said(self, size: str) -> int | None:
        """A size, if the file gives it; -1 counts as missing."""
        value = self.values.get(size)
        return value if type(value) is int and value > 0 else None

    def args(self, found: Mapping[str, int]) -> ModelArgs:
        """The model's shape; sizes that the file lacks are taken from ``found``."""
        values, found = dict(self.values), dict(found)
        if (dim := self.said("dim")) and (heads := self.said("n_heads")):
            found.setdefault("head_dim", dim // heads)
        values |= {size: number for size, number in found.items() if values.get(size) in (None, -1)}
        group = {name.removeprefix("moe."): values.pop(name) for name in [*values] if name.startswith("moe.")}
        return from_mapping(ModelArgs, ({"moe": group} if group else {}) | values, self.where)


def load_args(paths: Paths) -> ModelArgs:
    """Read the model's shape from a config.json of any format, or a params.json; later files override earlier ones."""
    return Description.read(paths).args({})


def own_config(directory: Path) -> Path:
    """The path of the description of the model in ``directory``. Raises UserError if there is none."""
    for name in ("config.json", "params.json"):
        if (directory / name).is_file():
            return directory / name
    raise UserError(f"{directory}: neither config.json nor params.json in it; name a config.json")


def described(directory: Directory, description: Description, strict: bool) -> ModelArgs:
    """The shape of the model in ``directory``: from the description, else from the tensors.

    Raises:
        UserError: neither gives a size; if ``strict``, also if they contradict each other.
    """
    found = told(directory, description)
    for size, (number, tensor) in found.items():
        if strict and (said := description.said(size)) not in (None, number):
            raise UserError(
                f"{description.where}: {description.names.get(size, size)} is {said}, but by {tensor} it is {number}: take "
                "the key out, for the tensors tell it, or name the config.json that belongs to them"
            )
    return description.args({size: number for size, (number, _) in found.items()})


class Told(NamedTuple):
    """A size, and the tensor that it was read from."""

    size: int
    tensor: str


def told(directory: Directory, description: Description) -> dict[str, Told]:
    """The sizes that can be read off the tensors.

    In every format, the number of values under a key is proportional to each size that it depends on. If one such size is
    unknown, the format's table is made for some value of it, and the ratio of counts gives the true value.
    """

    def shown(file: str, key: str) -> str:
        return f"{directory.directory / file}: {key} {list(directory.stored[file][key].shape)}"

    found: dict[str, Told] = {}
    places = [(file, key) for file, tensors in directory.stored.items() for key in tensors]
    layers = {int(match[1]): place for place in places if (match := re.search(r"\blayers\.(\d+)\.", place[1]))}
    if n_layers := next(n for n in range(len(layers) + 1) if n not in layers):
        found["n_layers"] = Told(n_layers, shown(*layers[n_layers - 1]))
    sizes = dict.fromkeys(SIZES, directory.size) | {"n_layers": 1, "head_dim": 2}
    if (kv_heads := description.said("n_kv_heads")) and kv_heads < directory.size:
        sizes["n_kv_heads"] = 1  # fewer than there are files: each file has all of them
    tensors = {"dim": "norm.weight", "vocab_size": "tok_embeddings.weight", EXPERTS: "layers.0.feed_forward.gate.weight"}
    tensors["hidden_dim"] = "layers.0.feed_forward.experts.w1"
    unknown, known = ("head_dim", "n_heads") if description.said("n_heads") else ("n_heads", "head_dim")
    if (value := description.said(known)) and value % sizes[known] == 0:
        sizes[known] = value
        tensors |= {unknown: "layers.0.attention.wq.weight", "n_kv_heads": "layers.0.attention.wk.weight"}
    for size, name in tensors.items():
        plain: dict[str, Any] = {key: number for key, number in sizes.items() if key != EXPERTS}
        args = ModelArgs(**plain, moe=MoEArgs(sizes[EXPERTS], num_experts_per_tok=1))
        tile = next(tile for tile in directory.tiles(LogicalModel(args)) if tile.name == name)
        stored = directory.stored[tile.file].get(tile.key)
        number, rest = divmod(sizes[size] * math.prod(stored.shape), math.prod(tile.stored_shape())) if stored else (0, 0)
        if rest or not number:
            break  # the following sizes depend on this one
        sizes[size], found[size] = number, Told(number, shown(tile.file, tile.key))
    return found
