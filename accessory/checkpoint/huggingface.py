"""Hugging Face's ``MixtralForCausalLM`` and ``MixtralForSequenceClassification``: safetensors, with an index if there are
several files, and config.json.

Two namings are read: one matrix per expert (``block_sparse_moe.experts.{e}.w1.weight``, as on the Hub), and fused
(``mlp.experts.gate_up_proj [E, 2F, D]`` and ``down_proj [E, D, F]``, as transformers 5 holds them in memory). The first is
written. The rotary rows of q and k are stored as two halves of each head.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from accessory.checkpoint import compressed, gptq, llava
from accessory.checkpoint.encoders import in_transformers
from accessory.checkpoint.encoding import AS_IS, Encoding
from accessory.checkpoint.storage import Stored, index_file
from accessory.checkpoint.tiles import Directory, Tile
from accessory.config import read_mapping, write_json
from accessory.console import say
from accessory.data.tokenizer_json import write_tokenizer_json
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.logical import CONNECTOR, LogicalModel
from accessory.model.visual import VisualArgs

INDEX = "model.safetensors.index.json"

NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "score.weight": "score.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
# a matrix of the experts -> the fused matrix that holds it, and (which, of how many) parts of that matrix's rows it is
FUSED = {"w1": ("gate_up_proj", (0, 2)), "w3": ("gate_up_proj", (1, 2)), "w2": ("down_proj", (0, 1))}
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
    "router_aux_loss_coef": "load_balancing_weight",
}
_MOE = {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"}
CONFIG_KEYS = {name: key for key, name in _CONFIG.items()} | {f"moe.{name}": key for name, key in _MOE.items()}
"""The keys of config.json for fields of ModelArgs."""
DEFAULT_ROPE_THETA = 1e6
DEFAULT_BALANCE_WEIGHT = 0.001  # transformers'
CLASSIFIER = "MixtralForSequenceClassification"


class HuggingFaceDirectory(Directory):
    """A directory of the files above."""

    format = "hf"

    def __init__(self, directory: Path, tensors: dict[str, Stored]):
        self.directory = directory
        tensors = {
            key: stored for key, stored in tensors.items() if not key.endswith(("rotary_emb.inv_freq", "position_ids"))
        }
        tensors, self.encoders = _set_apart(tensors)
        self.fused = any(".mlp." in key for key in tensors)
        self.packing: dict[str, Any] | None = None  # the quantization_config
        if any(key.endswith((".qweight", f".{compressed.PACKED}")) for key in tensors):
            self.packing = read_mapping(directory / "config.json").get("quantization_config") or {}
            held_as(self.packing, str(directory / "config.json"))  # refuses what cannot be read
            as_bytes = compressed.as_bytes if _is_compressed(self.packing) else gptq.as_bytes
            tensors = as_bytes(tensors, self.packing, str(directory))
        self.stored = {"": tensors}

    @classmethod
    def find(cls, directory: Path) -> "HuggingFaceDirectory | None":
        one, several = (directory / "model.safetensors").is_file(), (directory / INDEX).is_file()
        if one and several:
            raise UserError(f"{directory}: holds model.safetensors, and {INDEX} of several files; keep one set")
        if one:
            return cls(directory, index_file(directory / "model.safetensors").tensors)
        if several:
            return cls(directory, _indexed(directory))
        shards = [re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", path.name) for path in directory.iterdir()]
        counts = {match[1] for match in shards if match}
        if not counts:
            return None
        if len(counts) > 1:
            raise UserError(
                f"{directory}: holds files of more than one checkpoint (model-*-of-{', '.join(counts)}); keep one set"
            )
        (count,) = counts
        tensors: dict[str, Stored] = {}
        for number in range(int(count)):
            path = directory / f"model-{number + 1:05d}-of-{count}.safetensors"
            found = index_file(path).tensors
            if twice := tensors.keys() & found.keys():
                raise UserError(f"{path}: {min(twice)} stands in another file as well")
            tensors |= found
        return cls(directory, tensors)

    def tiles(self, logical: LogicalModel) -> Iterator[Tile]:
        if self.packing is None or not logical.codecs:
            yield from model_tiles(logical, self.fused)
            return
        yield from quantised_tiles(logical, self.packing, self.fused)


def _set_apart(tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], dict[str, Stored]]:
    """Split a LLaVA's tensors: the language model under its own names, with the projector; and the encoder."""
    model, encoders = dict[str, Stored](), dict[str, Stored]()
    for key, stored in tensors.items():
        inner = key.removeprefix("model.")  # as transformers 5 has it in memory
        tower, _, name = inner.partition(".")
        if tower == "vision_tower":
            name = name.removeprefix("vision_model.")
            if not name.startswith("head."):  # SigLIP's pooling head, which is not used
                encoders[name] = stored
        elif tower == "language_model":
            model[name if name.startswith(("model.", "lm_head.")) else f"model.{name}"] = stored
        else:
            model[inner if tower == "multi_modal_projector" else key] = stored
    return model, encoders


def _indexed(directory: Path) -> dict[str, Stored]:
    """The tensors in the index, each from the file that the index gives."""
    weight_map = read_mapping(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) and Path(f).name == f for f in weight_map.values()):
        raise UserError(f"{directory / INDEX}: expected a key 'weight_map' that says which file holds which tensor")
    files = {file: index_file(directory / file).tensors for file in sorted(set(weight_map.values()))}
    for key, file in weight_map.items():
        if key not in files[file]:
            raise UserError(f"{directory / file} lacks {key}, which {INDEX} says it holds")
    return {key: files[file][key] for key, file in weight_map.items()}


def model_tiles(logical: LogicalModel, fused: bool = False) -> Iterator[Tile]:
    """The tiles of a whole model, not yet assigned to files."""
    if logical.args.moe.score_bias:
        raise UserError("Hugging Face's files have no place for the routers' score biases: take moe.score_bias out")
    for name in logical.base:
        region, (layer, rest) = logical.whole(name), split_layer(name)
        if name.startswith(CONNECTOR):
            yield Tile(name, region, "", name.removeprefix(CONNECTOR))
            continue
        _, is_expert, weight = rest.partition("experts.")
        if rest == "feed_forward.gate.weight":
            yield Tile(name, region, "", f"{layer}{'mlp' if fused else 'block_sparse_moe'}.gate.weight")
        elif not is_expert:
            yield Tile(name, region, "", layer + NAMES[rest], row_order(name, logical.args))
        elif fused:
            key, part = FUSED[weight]
            yield Tile(name, region, "", f"{layer}mlp.experts.{key}", Encoding("e f d -> e (s f) d", s=part))
        else:
            for e in range(logical.args.moe.num_experts):
                key = f"{layer}block_sparse_moe.experts.{e}.{weight}.weight"
                yield Tile(name, (slice(e, e + 1), *region[1:]), "", key, Encoding("e f d -> f d"))


def llava_tiles(logical: LogicalModel, visual: VisualArgs) -> Iterator[Tile]:
    """The tiles of a ``LlavaForConditionalGeneration``, with its encoder."""
    for tile in model_tiles(logical):
        before = "" if tile.name.startswith(CONNECTOR) else "language_model."
        yield dataclasses.replace(tile, key=before + tile.key)
    for tile in in_transformers(visual):
        yield dataclasses.replace(tile, key=f"vision_tower.{tile.key}")


def quantised_tiles(logical: LogicalModel, config: Mapping[str, Any], fused: bool = False) -> Iterator[Tile]:
    """The tiles of a model whose experts and attention are quantised, as its ``quantization_config`` says."""
    whole = model_tiles(LogicalModel(dataclasses.replace(logical.args, quantise=None)), fused)
    yield from (tile for tile in whole if tile.name not in logical.codecs)
    keys = {name: matrix_keys(name, logical.args, fused) for name in logical.codecs}
    if not _is_compressed(config):
        yield from gptq.part_tiles(logical, keys, config)
        return
    for name, (matrix, part) in logical.parts.items():
        region = logical.whole(name)
        for number, key in enumerate(keys[matrix]):
            if len(region) == 3:
                place = (slice(number, number + 1), *region[1:])
                yield Tile(name, place, "", f"{key}.{part}", Encoding("e f d -> f d"))
            else:
                yield Tile(name, region, "", f"{key}.{part}", row_order(matrix, logical.args))


def held_as(config: Mapping[str, Any], where: str) -> dict[str, str]:
    """The setting ``quantise`` of ModelArgs for a ``quantization_config``.

    Raises:
        UserError: it is of a kind that cannot be read.
    """
    return (compressed if _is_compressed(config) else gptq).held_as(config, where)


def _is_compressed(config: Mapping[str, Any]) -> bool:
    return config.get("quant_method") == compressed.METHOD


def matrix_keys(name: str, args: ModelArgs, fused: bool) -> list[str]:
    """The key of a quantised matrix, or one for each expert, without the suffix of a part.

    Args:
        fused: use transformers' names, as GPTQModel does, not those of the Hub.
    """
    layer, rest = split_layer(name)
    _, is_expert, weight = rest.partition("experts.")
    if not is_expert:
        return [layer + NAMES[rest].removesuffix(".weight")]
    block, called = ("mlp", gptq.PROJECTIONS[weight]) if fused else ("block_sparse_moe", weight)
    return [f"{layer}{block}.experts.{e}.{called}" for e in range(args.moe.num_experts)]


def split_layer(name: str) -> tuple[str, str]:
    """Hugging Face's name of a logical tensor's layer, "" outside of layers, and the rest of our name."""
    in_layer = re.fullmatch(r"(layers\.\d+\.)(.+)", name)
    return (f"model.{in_layer[1]}", in_layer[2]) if in_layer else ("", name)


def row_order(matrix: str, args: ModelArgs) -> Encoding:
    """How a matrix [rows, columns], or B of its adapter, is stored. In q and k the rotary pairs of each head become two
    halves: rows 0 1 2 3 4 5 are stored as 0 2 4 1 3 5."""
    if matrix.endswith((".wq.weight", ".wk.weight")):
        return Encoding("(head pair two) d -> (head two pair) d", pair=args.head_dim // 2, two=2)
    return AS_IS


def values_from(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of Hugging Face's config.json under the names of ModelArgs.

    Raises:
        UserError: a key is missing that the tensors do not show, or asks for something that this decoder does not implement.
    """
    expected = {"model_type": "mixtral", "hidden_act": "silu", "tie_word_embeddings": False}
    advice = {"tie_word_embeddings": "; save it with a copy of its embeddings as lm_head.weight, and the key false"}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(f"{where}: {key} is {config[key]!r}, this decoder does {value!r}{advice.get(key, '')}")
    for key in ("rms_norm_eps", "max_position_embeddings", "num_attention_heads", "num_experts_per_tok"):
        if config.get(key) is None:
            raise UserError(f"{where}: the key '{key}' is missing")
    values: dict[str, Any] = {name: config[key] for key, name in _CONFIG.items() if key in config}
    values["moe"] = {name: config[key] for name, key in _MOE.items() if key in config}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_parameters is {rope!r}, expected a mapping")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise UserError(f"{where}: rotary embedding of type '{kind}'; this decoder does 'default' and 'linear'")
    if kind == "linear":
        factor = rope.get("factor")
        if not isinstance(factor, int | float) or factor <= 0:
            raise UserError(f"{where}: linear rotary scaling needs a factor above 0, found {factor!r}")
        values["rope_scaling"] = 1.0 / factor
    values["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or DEFAULT_ROPE_THETA
    if values.get("load_balancing_weight") is None:
        values["load_balancing_weight"] = DEFAULT_BALANCE_WEIGHT
    if CLASSIFIER in (config.get("architectures") or ()):
        values["labels"] = _labels(config, where)
    if config.get("quantization_config"):
        values["quantise"] = held_as(config["quantization_config"], where)
    return values | {"head_dim": config.get("head_dim")}


def _labels(config: dict[str, Any], where: str) -> list[Any]:
    """A classifier's labels in order. transformers leaves them out if they are LABEL_0 and LABEL_1."""
    if config.get("problem_type") not in (None, "single_label_classification"):
        raise UserError(f"{where}: problem_type is {config['problem_type']!r}; a document has one label here")
    names = config.get("id2label") or {str(n): f"LABEL_{n}" for n in range(config.get("num_labels") or 2)}
    if not isinstance(names, dict) or set(names) != set(map(str, range(len(names)))):
        raise UserError(f"{where}: id2label is {names!r}, expected a label for each number from 0")
    return [names[str(number)] for number in range(len(names))]


def _label_settings(labels: Sequence[str], hf_config: Mapping[str, Any], special_ids: Mapping[str, int]) -> dict[str, Any]:
    """The keys of config.json for a classifier. transformers classifies by the last token that is not padding, so padding
    must not be the token that ends a text."""
    ends = special_ids.get("eos_token_id", 2)
    padding = hf_config.get("pad_token_id")
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "pad_token_id": padding if padding not in (None, ends) else int(ends == 0),
    }


def write_description(
    directory: Path,
    args: ModelArgs,
    dtype: torch.dtype,
    hf_config: Mapping[str, Any],
    quantisation: Mapping[str, Any],
    special_ids: Mapping[str, int],
    files: Mapping[str, Iterable[str]],
    nbytes: int,
) -> None:
    """Write config.json, the other files that transformers needs, and the index if there are several files.

    Args:
        hf_config: config.json of a Hugging Face source; keys that this decoder does not know are kept.
        quantisation: the ``quantization_config``, if matrices are written quantised.
        special_ids: bos_token_id and eos_token_id, if there is a tokenizer.
        files: file -> its keys.
        nbytes: the size of all tensors.
    """
    ids = {"bos_token_id": 1, "eos_token_id": 2, **special_ids}
    ids |= {key: hf_config[key] for key in ids if key in hf_config}
    kept = {
        k: v
        for k, v in hf_config.items()
        if k not in ("rope_parameters", "dtype", "transformers_version", "quantization_config")
    }
    named = {key: getattr(args, name) for key, name in _CONFIG.items()}
    config: dict[str, Any] = {
        **kept,
        "architectures": [CLASSIFIER if args.labels else "MixtralForCausalLM"],
        "model_type": "mixtral",
        **named,
        "head_dim": args.head_dim,
        "num_local_experts": args.moe.num_experts,
        "num_experts_per_tok": args.moe.num_experts_per_tok,
        "rope_theta": args.rope_theta,
        "rope_scaling": {"type": "linear", "factor": 1 / args.rope_scaling} if args.rope_scaling else None,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **ids,
        **(_label_settings(args.labels, hf_config, ids) if args.labels else {}),
        "torch_dtype": str(dtype).removeprefix("torch."),
        **({"quantization_config": quantisation} if quantisation else {}),
    }
    write_json(directory / "config.json", llava.description(config, args) if args.visual else config)
    if not (directory / "generation_config.json").exists():
        write_json(directory / "generation_config.json", ids)
    if len(files) > 1:
        weight_map = {key: file for file, keys in files.items() for key in keys}
        write_json(directory / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": weight_map})
    model, json_file = directory / "tokenizer.model", directory / "tokenizer.json"
    if model.exists() and not json_file.exists() and not write_tokenizer_json(model, directory):
        say(
            "warning: no tokenizer.json says exactly what this tokenizer.model does, and transformers would misread it: "
            "put the model's own tokenizer.json beside it"
        )
