"""Hugging Face's ``MixtralForCausalLM``: safetensors, an index where there are several, and config.json.

Two namings are read: a matrix per expert (``block_sparse_moe.experts.{e}.w1.weight``, what the Hub holds), and fused
(``mlp.experts.gate_up_proj [E, 2F, D]`` and ``down_proj [E, D, F]``, what transformers 5 holds in memory). The first is
written. Rotary rows of q and k are stored there as two halves of each head.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from accessory.checkpoint.storage import Stored, TensorFile, index_file
from accessory.checkpoint.tiles import Tile
from accessory.config import read_mapping, write_json
from accessory.console import say
from accessory.data.tokenizer_json import write_tokenizer_json
from accessory.errors import UserError
from accessory.model.args import ModelArgs, MoEArgs
from accessory.model.logical import logical_cuts
from accessory.model.moe.layouts import get_layout

INDEX = "model.safetensors.index.json"

_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_FUSED = {"w1": ("gate_up_proj", (0, 2)), "w3": ("gate_up_proj", (1, 2)), "w2": ("down_proj", (0, 1))}
# config.json key -> ModelArgs field, where the value is the same
_CONFIG = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
    "sliding_window": "sliding_window",
}
DEFAULT_ROPE_THETA = 1e6


class HuggingFaceDirectory:
    """A directory of the files above."""

    format, layout, size, adds = "hf", "mixtral", 1, False

    def __init__(self, directory: Path, files: list[str]):
        self.directory = directory
        indexed: dict[str, TensorFile] = {file: index_file(directory / file) for file in files}
        tensors: dict[str, Stored] = {}
        for content in indexed.values():
            tensors |= content.tensors
        self.stored = {"": tensors}
        self.fused = any(key.endswith(".mlp.experts.gate_up_proj") for key in tensors)

    @classmethod
    def find(cls, directory: Path) -> "HuggingFaceDirectory | None":
        if (directory / INDEX).is_file():
            weight_map = read_mapping(directory / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{directory / INDEX}: expected a key 'weight_map' that says which file holds which tensor")
            return cls(directory, sorted(set(weight_map.values())))
        files = sorted(path.name for path in directory.glob("model*.safetensors"))
        if not files:
            return None
        if match := re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", files[0]):
            files = [f"model-{n + 1:05d}-of-{match[1]}.safetensors" for n in range(int(match[1]))]
        return cls(directory, files)

    def tiles(self, args: ModelArgs) -> Iterator[Tile]:
        return model_tiles(args, self.fused)


def model_tiles(args: ModelArgs, fused: bool = False) -> Iterator[Tile]:
    """The tiles of a whole model, not yet dealt out to files (an index says which file holds what)."""
    for name, cut in logical_cuts(args, get_layout("mixtral")).items():
        region = cut.region(0, 1)
        in_layer = re.fullmatch(r"(layers\.\d+\.)(.+)", name)
        layer, rest = (f"model.{in_layer[1]}", in_layer[2]) if in_layer else ("", name)
        _, is_expert, weight = rest.partition("experts.")
        if rest == "feed_forward.gate.weight":
            yield Tile(name, region, "", f"{layer}{'mlp' if fused else 'block_sparse_moe'}.gate.weight")
        elif not is_expert:
            pairs = args.head_dim if rest in ("attention.wq.weight", "attention.wk.weight") else None
            yield Tile(name, region, "", layer + _NAMES[rest], head_dim=pairs)
        elif fused:
            key, slot = _FUSED[weight]
            yield Tile(name, region, "", f"{layer}mlp.experts.{key}", slot=slot)
        else:
            for e in range(args.moe.num_experts):
                key = f"{layer}block_sparse_moe.experts.{e}.{weight}.weight"
                yield Tile(name, (slice(e, e + 1), *region[1:]), "", key)


def args_from(config: dict[str, Any], where: str) -> ModelArgs:
    """ModelArgs from Hugging Face's config.json.

    Raises:
        UserError: a key is missing, or asks for what this decoder does not do.
    """
    expected = {"model_type": "mixtral", "hidden_act": "silu", "tie_word_embeddings": False, "quantization_config": None}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(f"{where}: {key} is {config[key]!r}, this decoder does {value!r}")
    values: dict[str, Any] = {}
    for key, name in _CONFIG.items():
        if key in config:
            values[name] = config[key]
        elif key != "sliding_window":
            raise UserError(f"{where}: the key '{key}' is missing")
    for key in ("num_local_experts", "num_experts_per_tok"):
        if key not in config:
            raise UserError(f"{where}: the key '{key}' is missing")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise UserError(f"{where}: rotary embedding of type '{kind}'; this decoder does 'default' and 'linear'")
    return ModelArgs(
        **values,
        head_dim=config.get("head_dim") or values["dim"] // values["n_heads"],
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", DEFAULT_ROPE_THETA))),
        rope_scaling=1.0 / rope["factor"] if kind == "linear" else None,
        moe=MoEArgs(config["num_local_experts"], config["num_experts_per_tok"]),
    )


def write_description(
    directory: Path,
    args: ModelArgs,
    dtype: torch.dtype,
    special_ids: tuple[int, int],
    files: Mapping[str, Iterable[str]],
    nbytes: int,
) -> None:
    """config.json, what transformers needs beside it, and the index where there are several files.

    Args:
        special_ids: of the tokenizer's beginning and end of a text. files: file -> its keys. nbytes: of all tensors.
    """
    bos, eos = special_ids
    named = {key: getattr(args, name) for key, name in _CONFIG.items()}
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **named,
        "head_dim": args.head_dim,
        "num_local_experts": args.moe.num_experts,
        "num_experts_per_tok": args.moe.num_experts_per_tok,
        "rope_theta": args.rope_theta,
        "rope_scaling": {"type": "linear", "factor": 1 / args.rope_scaling} if args.rope_scaling else None,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_json(directory / "config.json", config)
    if not (directory / "generation_config.json").exists():
        write_json(directory / "generation_config.json", {"bos_token_id": bos, "eos_token_id": eos})
    if len(files) > 1:
        weight_map = {key: file for file, keys in files.items() for key in keys}
        write_json(directory / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": weight_map})
    model, json_file = directory / "tokenizer.model", directory / "tokenizer.json"
    if model.exists() and not json_file.exists() and not write_tokenizer_json(model, directory):
        say("warning: this tokenizer.model cannot be written as tokenizer.json; use it with sentencepiece")
