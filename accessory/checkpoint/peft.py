"""Adapters of Hugging Face's PEFT library (0.21): adapter_config.json and adapter_model.safetensors.

PEFT's axes: for a linear layer A is [R, in] and B [out, R]. For stacked experts A is [E * R, in], row ``e * R + r``, and B
[out, R * E], column ``r * E + e``. ``gate_up_proj`` holds w1 above w3, so one adapter serves both: w1 and w3 share its A
and take the halves of its B. If w1 and w3 have an A each, the two are written one above the other, [2R, D], and their Bs as
two blocks on the diagonal. Rows of q and k are in the order of Hugging Face's rotary halves.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accessory.checkpoint.encoding import AS_IS, Encoding
from accessory.checkpoint.huggingface import FUSED, NAMES, row_order, split_layer
from accessory.checkpoint.storage import index_file
from accessory.checkpoint.tiles import Directory, Tile
from accessory.config import read_mapping, write_json
from accessory.console import listed
from accessory.errors import UserError
from accessory.model.adapter import Adapter, adapter_name
from accessory.model.args import ModelArgs
from accessory.model.logical import EMBEDDING, Adapters, LogicalModel, Shape, as_matrix

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
HEAD = "base_model.model."
# key of the config -> values that can be read: plain LoRA beside an unchanged base
_READ: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "fan_in_fan_out", "use_bdlora"), (False, None)),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "layer_replication"), (None, [])),
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "velora_config", "kasa_config"), (None, [], {})),
}


class PeftDirectory(Directory):
    """A directory of the files above."""

    format, may_lack = "peft", False

    def __init__(self, directory: Path):
        self.directory = directory
        self.config = read_mapping(directory / CONFIG)
        for key, allowed in _READ.items():
            if self.config.get(key, allowed[0]) not in allowed:
                raise UserError(
                    f"{directory / CONFIG}: {key} is {self.config[key]!r}; what is read here has {allowed[0]!r}. Merge the "
                    "adapter into its base with PEFT (merge_and_unload) and take what that saves as the whole model"
                )
        if (directory / "adapter_model.bin").is_file() and not (directory / TENSORS).is_file():
            raise UserError(f"{directory}: holds a pickle, adapter_model.bin; save it with PEFT as {TENSORS}")
        self.stored = {TENSORS: index_file(directory / TENSORS).tensors}

    @classmethod
    def find(cls, directory: Path) -> "PeftDirectory | None":
        return cls(directory) if (directory / CONFIG).is_file() else None

    def adapters(self, base: LogicalModel) -> Adapters:
        keys = {matrix: self._keys(matrix, base.args) for matrix in base.matrices}
        return {matrix: self._adapter(matrix, base.matrices[matrix], *found) for matrix, found in keys.items() if found}

    def tiles(self, logical: LogicalModel) -> Iterator[Tile]:
        keys = {matrix: self._keys(matrix, logical.args) for matrix in logical.adapters}
        yield from adapter_tiles(logical, {matrix: found for matrix, found in keys.items() if found})
        for matrix in (EMBEDDING, "output.weight"):  # PEFT may save these whole beside their adapter
            module, _ = peft_name(matrix)
            for key in (f"{HEAD}{module}.weight", f"{HEAD}{module}.base_layer.weight"):
                if key in self.stored[TENSORS]:
                    yield Tile(matrix, logical.whole(matrix), TENSORS, key)

    def _keys(self, matrix: str, args: ModelArgs) -> tuple[str, str] | None:
        """The keys of A and B of ``matrix``; None if it has no adapter."""
        stored = self.stored[TENSORS]
        module, parameter = peft_name(matrix)
        nested = f"{HEAD}{module}.base_layer.lora_A.weight" in stored
        a, b = peft_keys(matrix, nested)
        if a not in stored or b not in stored:
            return None
        if matrix.rpartition(".")[2] in FUSED and not nested:  # only one parameter is wrapped: the shape tells which
            is_down = (stored[a].shape[-1], stored[b].shape[0]) == (args.hidden_dim, args.dim)
            if is_down != (parameter == "down_proj"):
                return None
        return a, b

    def _adapter(self, matrix: str, shape: Shape, a: str, b: str) -> Adapter:
        shape_a, shape_b = (self.stored[TENSORS][key].shape for key in (a, b))
        if len(shape_a) != 2 or len(shape_b) != 2:
            raise UserError(f"{self.directory / TENSORS}: {a} and its B must be matrices")
        *experts, _, inner = as_matrix(matrix, shape)
        rank = shape_a[0] // math.prod(experts)
        if rank == 0:
            raise UserError(f"{self.directory / TENSORS}: {a} is empty")
        if shape_a[1] != inner:
            raise UserError(
                f"{self.directory / TENSORS}: {a} has shape {list(shape_a)}, but the layer takes "
                f"{inner} inputs: it is another model's, or its axes are in an older PEFT's order (save it anew with 0.21)"
            )
        module, parameter = peft_name(matrix)
        scaling = self._scaling(f"{module}.{parameter}" if parameter else module, rank)
        return Adapter(rank=rank, scaling=scaling, tied=matrix.endswith("experts.w3"))

    def _scaling(self, name: str, rank: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        try:
            found = (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name))
            alpha = float(next(found, self.config.get("lora_alpha", 8)))
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise UserError(f"{self.directory / CONFIG}: lora_alpha or alpha_pattern makes no sense: {error}") from error
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def peft_name(matrix: str) -> tuple[str, str | None]:
    """PEFT's name of a matrix: the module, and its parameter if PEFT wraps a parameter."""
    layer, rest = split_layer(matrix)
    if rest.startswith("feed_forward.experts."):
        return f"{layer}mlp.experts", FUSED[rest.rpartition(".")[2]][0]
    if rest == "feed_forward.gate.weight":
        return f"{layer}mlp.gate", "weight"
    return layer + NAMES[rest].removesuffix(".weight"), None


def peft_keys(matrix: str, nested: bool) -> tuple[str, str]:
    """The keys of A and B of a matrix.

    ``nested``: both parameters of its experts are wrapped, one wrapper inside the other: gate_up_proj is innermost.
    """
    module, parameter = peft_name(matrix)
    if matrix == EMBEDDING:
        return f"{HEAD}{module}.lora_embedding_A", f"{HEAD}{module}.lora_embedding_B"
    inner = ".base_layer" if nested and parameter == "gate_up_proj" else ""
    return f"{HEAD}{module}{inner}.lora_A.weight", f"{HEAD}{module}{inner}.lora_B.weight"


def untied(adapters: Adapters) -> list[str]:
    """The w1 whose w3 has an A of its own. In PEFT's one B the rest beside their two blocks is zero."""
    return [name for name in adapters if name.endswith(".w1") and not adapters[f"{name[:-2]}w3"].tied]


def adapter_tiles(logical: LogicalModel, keys: Mapping[str, tuple[str, str]]) -> Iterator[Tile]:
    """The tiles of all adapters. ``keys``: the keys of A and B by matrix."""
    apart = untied(logical.adapters)
    for matrix, pair in keys.items():
        encodings = AS_IS, row_order(matrix, logical.args)
        if (weight := matrix.rpartition(".")[2]) in FUSED:
            _, rows = FUSED[weight]
            ranks = rows if f"{matrix[:-2]}w1" in apart else (0, 1)
            encodings = Encoding("e r d -> (e t r) d", t=ranks), Encoding("e f r -> (s f) (t r e)", s=rows, t=ranks)
        for part, key, encoding in zip(("lora_a", "lora_b"), pair, encodings, strict=True):
            if (name := adapter_name(matrix, part)) in logical.shapes:
                yield Tile(name, logical.whole(name), TENSORS, key, encoding)


def planned_tiles(logical: LogicalModel) -> Iterator[Tile]:
    """The tiles for writing the adapters.

    Raises:
        UserError: PEFT's LoRA cannot hold them: they have biases, or several ranks or scalings, or adapt only one of w1
            and w3.
    """
    adapters = logical.adapters
    if biased := [name for name, adapter in adapters.items() if adapter.bias]:
        raise UserError(f"PEFT's LoRA has no place for biases; these matrices have one: {listed(biased)}")
    kinds = {(adapter.rank, adapter.scaling) for adapter in adapters.values()}
    if len(kinds) > 1:
        raise UserError(f"PEFT's config names one rank and one scaling; this adapter has {sorted(kinds)}")
    for one, other in (("w1", "w3"), ("w3", "w1")):
        if alone := [n for n in adapters if n.endswith(f".{one}") and n[:-2] + other not in adapters]:
            raise UserError(f"PEFT adapts w1 and w3 together, but only one of them has an adapter: {alone[0]}")
    nested = any(name.endswith(".w2") for name in adapters)
    keys = {matrix: peft_keys(matrix, nested) for matrix in logical.matrices if matrix in adapters}
    return adapter_tiles(logical, keys)


def write_description(directory: Path, adapters: Adapters, base: str) -> None:
    """Write adapter_config.json for adapters of one rank and scaling. ``base``: the model that they belong to."""
    adapter = next(iter(adapters.values()))
    rank, alpha = adapter.rank, adapter.rank * adapter.scaling
    names = [peft_name(matrix) for matrix in adapters]
    parameters = {re.sub(r"^model\.layers\.\d+\.", "", f"{module}.{parameter}") for module, parameter in names if parameter}
    fused = [r".*\.gate_up_proj"] if untied(adapters) else []  # its rank is that of both together
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": dict.fromkeys(fused, 2 * rank),
        "alpha_pattern": dict.fromkeys(fused, 2 * alpha),
        "target_modules": sorted({module for module, parameter in names if not parameter}),
        "target_parameters": sorted(parameters, reverse=True),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    write_json(directory / CONFIG, config)
