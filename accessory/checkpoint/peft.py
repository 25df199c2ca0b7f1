"""Adapters of Hugging Face's PEFT library (0.21): adapter_config.json and adapter_model.safetensors.

PEFT's axes: of a linear layer A is [R, in] and B [out, R]. Of stacked experts, A is [E * R, in], row ``e * R + r``, and B
[out, R * E], column ``r * E + e``. ``gate_up_proj`` holds w1 above w3, so one adapter serves both: read, w1 and w3 share its
A and halve its B; written, its A is theirs one above the other, [2R, D], and its B has theirs as two blocks on the diagonal.
Rows of q and k are in the order of Hugging Face's rotary halves.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.huggingface import NAMES
from accessory.checkpoint.storage import TensorWriter, index_file
from accessory.checkpoint.tiles import Tile
from accessory.config import read_mapping, write_json
from accessory.console import progress
from accessory.errors import UserError
from accessory.model.adapter import Adapter, adapter_name
from accessory.model.args import ModelArgs
from accessory.model.logical import Adapters, Cut, Source, adapter_cuts, logical_cuts
from accessory.model.moe.layouts import get_layout

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
HEAD = "base_model.model."
# key of the config -> values that do what is done here: plain LoRA beside an unchanged base
_READ: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "fan_in_fan_out", "use_bdlora"), (False, None)),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "layer_replication"), (None, [])),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "velora_config", "kasa_config"), (None, [], {})),
}
# a parameter of the experts -> the matrices in it
EXPERTS = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


class PeftDirectory:
    """A directory of the files above; its tensors under our names.

    Attributes:
        adapters: by their matrix; known once ``tiles`` has been asked for a model's.
    """

    format, layout, size, adds, may_lack, fingerprint = "peft", "mixtral", 1, False, False, None

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = read_mapping(directory / CONFIG)
        for key, allowed in _READ.items():
            if self.config.get(key, allowed[0]) not in allowed:
                raise UserError(f"{directory / CONFIG}: {key} is {self.config[key]!r}; what is read here has {allowed[0]!r}")
        if (directory / "adapter_model.bin").is_file() and not (directory / TENSORS).is_file():
            raise UserError(f"{directory}: holds a pickle, adapter_model.bin; save it with PEFT as {TENSORS}")
        self.stored = {TENSORS: index_file(directory / TENSORS).tensors}
        self.adapters: dict[str, Adapter] = {}

    @classmethod
    def find(cls, directory: Path) -> "PeftDirectory | None":
        return cls(directory) if (directory / CONFIG).is_file() else None

    def tiles(self, args: ModelArgs) -> Iterator[Tile]:
        for matrix, cut in logical_cuts(args, get_layout("mixtral")).items():
            if matrix in ("tok_embeddings.weight", "output.weight"):  # PEFT may save these whole beside their adapter
                stem = HEAD + NAMES[matrix].removesuffix("weight")
                for key in (f"{stem}weight", f"{stem}base_layer.weight"):
                    if key in self.stored[TENSORS]:
                        yield Tile(matrix, cut.region(0, 1), TENSORS, key)
            if len(cut.shape) > 1 and (place := self._place(matrix, args)):
                yield from self._adapter_tiles(matrix, cut, *place, args)

    def _place(self, matrix: str, args: ModelArgs) -> tuple[str, str, str] | None:
        """Under which keys A and B of ``matrix`` are, and what PEFT calls it; None if they are not."""
        keys = self.stored[TENSORS]
        target, parameter = peft_name(matrix)
        places = f"{target}.lora_A.weight", f"{target}.lora_B.weight"
        if matrix == "tok_embeddings.weight":
            places = f"{target}.lora_embedding_A", f"{target}.lora_embedding_B"
        elif parameter:  # two wrapped parameters lie inside one another: gate_up_proj innermost
            inner = f"{target}.base_layer.lora_A.weight", f"{target}.base_layer.lora_B.weight"
            both = HEAD + inner[0] in keys
            if both and parameter == "gate_up_proj":
                places = inner
            elif not both and {HEAD + key for key in places} <= keys.keys():  # one alone: its shape tells which
                shape_a, shape_b = (keys[HEAD + key].shape for key in places)
                is_down = (shape_a[-1], shape_b[0]) == (args.hidden_dim, args.dim)
                if is_down != (parameter == "down_proj"):
                    return None
        a, b = (HEAD + key for key in places)
        return (a, b, f"{target}.{parameter}" if parameter else target) if a in keys and b in keys else None

    def _adapter_tiles(self, matrix: str, cut: Cut, a: str, b: str, name: str, args: ModelArgs) -> Iterator[Tile]:
        weight = matrix.rpartition(".")[2]
        experts = weight in ("w1", "w2", "w3")
        if len(self.stored[TENSORS][a].shape) != 2 or len(self.stored[TENSORS][b].shape) != 2:
            raise UserError(f"{self.directory / TENSORS}: {a} and its B must be matrices")
        rank = self.stored[TENSORS][a].shape[0] // (cut.shape[0] if experts else 1)
        if rank == 0:
            raise UserError(f"{self.directory / TENSORS}: {a} is empty")
        inner = cut.shape[0] if matrix == "tok_embeddings.weight" else cut.shape[-1]
        if self.stored[TENSORS][a].shape[-1] != inner:
            raise UserError(
                f"{self.directory / TENSORS}: {a} has shape {list(self.stored[TENSORS][a].shape)}, but the layer takes "
                f"{inner} inputs: it is another model's, or its axes are in an older PEFT's order (save it anew with 0.21)"
            )
        name += ".weight" * matrix.endswith("gate.weight")  # to PEFT a parameter, as the experts' are
        self.adapters[matrix] = adapter = Adapter(rank=rank, scaling=self._scaling(name, rank))
        cuts = adapter_cuts(matrix, cut, adapter)
        name_a, name_b = adapter_name(matrix, "lora_a"), adapter_name(matrix, "lora_b")
        yield Tile(name_a, cuts[name_a].region(0, 1), TENSORS, a)
        rotary = args.head_dim if weight == "weight" and matrix.split(".")[-2] in ("wq", "wk") else None
        slot = ({"w1": 0, "w3": 1, "w2": 0}[weight], 1 if weight == "w2" else 2) if experts else None
        yield Tile(name_b, cuts[name_b].region(0, 1), TENSORS, b, head_dim=rotary, slot=slot, groups_last=experts)

    def _scaling(self, name: str, rank: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        try:
            found = (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name))
            alpha = float(next(found, self.config.get("lora_alpha", 8)))
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise UserError(f"{self.directory / CONFIG}: lora_alpha or alpha_pattern makes no sense: {error}") from error
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def peft_name(matrix: str) -> tuple[str, str | None]:
    """PEFT's name of a matrix: the module, and the parameter of it where a module has several."""
    in_layer = re.fullmatch(r"(layers\.\d+\.)(.+)", matrix)
    layer, rest = (f"model.{in_layer[1]}", in_layer[2]) if in_layer else ("", matrix)
    if rest.startswith("feed_forward.experts."):
        weight = rest.rpartition(".")[2]
        return f"{layer}mlp.experts", next(p for p, weights in EXPERTS.items() if weight in weights)
    if rest == "feed_forward.gate.weight":
        return f"{layer}mlp.gate", None
    return layer + NAMES[rest].removesuffix(".weight"), None


def write_peft(directory: Path, source: Source, adapters: Adapters, args: ModelArgs, base: str) -> None:
    """Write ``adapters``, read from ``source``, as PEFT saves them.

    Raises:
        UserError: they hold what PEFT's LoRA has no place for: biases, or several ranks or scalings.
    """
    if biased := [name for name, adapter in adapters.items() if adapter.bias]:
        raise UserError(f"PEFT's LoRA has no place for biases; these matrices have one: {', '.join(biased[:4])}")
    kinds = {(adapter.rank, adapter.scaling) for adapter in adapters.values()}
    if len(kinds) > 1:
        raise UserError(f"PEFT's config names one rank and one scaling; this adapter has {sorted(kinds)}")
    ((rank, scaling),) = kinds
    for one, other in (("w1", "w3"), ("w3", "w1")):
        if alone := [n for n in adapters if n.endswith(f".{one}") and n[:-2] + other not in adapters]:
            raise UserError(f"PEFT adapts w1 and w3 together, but only one of them has an adapter: {alone[0]}")
    tensors: dict[str, Tensor] = {}
    modules, parameters = set(), set()
    nested = any(name.endswith(".w1") for name in adapters)
    for matrix in progress([n for n in adapters if not n.endswith(".w3")], desc="converting", unit="matrix"):
        target, parameter = peft_name(matrix)
        a, b = (_whole(source, args, adapters, adapter_name(matrix, part)) for part in ("lora_a", "lora_b"))
        keys = f"{HEAD}{target}.lora_A.weight", f"{HEAD}{target}.lora_B.weight"
        if parameter == "gate_up_proj":
            third = matrix[:-1] + "3"
            a3, b3 = (_whole(source, args, adapters, adapter_name(third, part)) for part in ("lora_a", "lora_b"))
            a, b = torch.cat([a, a3], 1), torch.stack([torch.block_diag(*pair) for pair in zip(b, b3, strict=True)])
        if parameter:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
            parameters.add(f"mlp.experts.{parameter}")
            if parameter == "gate_up_proj" and _has_down(adapters):
                keys = f"{HEAD}{target}.base_layer.lora_A.weight", f"{HEAD}{target}.base_layer.lora_B.weight"
        elif matrix == "tok_embeddings.weight":
            keys = f"{HEAD}{target}.lora_embedding_A", f"{HEAD}{target}.lora_embedding_B"
            modules.add(target)
        elif matrix.endswith("gate.weight"):
            parameters.add("mlp.gate.weight")
        else:
            modules.add(target)
            if matrix.endswith(("wq.weight", "wk.weight")):
                b = b.unflatten(0, (-1, args.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        tensors |= dict(zip(keys, (a.contiguous(), b.contiguous()), strict=True))
    with TensorWriter(directory / TENSORS, {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}, {}) as file:
        for key, tensor in tensors.items():
            file.write(key, tensor)
    double = {r".*\.gate_up_proj": 2} if nested else {}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank * scaling,
        "rank_pattern": {key: factor * rank for key, factor in double.items()},
        "alpha_pattern": {key: factor * rank * scaling for key, factor in double.items()},
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters, reverse=True),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    write_json(directory / CONFIG, config)


def _has_down(adapters: Adapters) -> bool:
    return any(name.endswith(".w2") for name in adapters)


def _whole(source: Source, args: ModelArgs, adapters: Adapters, name: str) -> Tensor:
    return source.read(name, logical_cuts(args, get_layout("mixtral"), adapters)[name].region(0, 1))
