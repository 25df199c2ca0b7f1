"""The expected content of checkpoint files, from the formats' descriptions alone; no code is shared with the readers."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.model.args import ModelArgs

Files = dict[str, dict[str, Tensor]]
"""File name -> key -> tensor."""


def tensors(w: dict[str, Tensor], args: ModelArgs, format: str, size: int = 1) -> Files:
    """The files of logical tensors ``w``: "hf", or "mixtral" and "mixtral_sparse" in ``size`` model-parallel parts."""
    if format == "hf":
        return {"model.safetensors": huggingface_tensors(w, args)}
    parts = {f"consolidated.{rank:02d}-of-{size:02d}.model.safetensors": rank for rank in range(size)}
    return {name: rank_tensors(w, args, format, rank, size) for name, rank in parts.items()}


def rank_tensors(w: dict[str, Tensor], args: ModelArgs, layout: str, rank: int, size: int) -> dict[str, Tensor]:
    """What LLaMA2-Accessory's converters write for model-parallel rank ``rank`` of ``size``.

    If there are more ranks than key heads, which those converters do not support, all ranks have the heads whole.
    """
    out = {"tok_embeddings.weight": w["tok_embeddings.weight"].chunk(size, 1)[rank]}
    out |= {"score.weight": w["score.weight"]} if args.labels else {"output.weight": w["output.weight"].chunk(size, 0)[rank]}
    out["norm.weight"] = w["norm.weight"]
    out |= {name.removeprefix("connector."): tensor for name, tensor in w.items() if name.startswith("connector.")}
    for n in range(args.n_layers):
        layer = f"layers.{n}"
        for name, heads in (("wq", args.n_heads), ("wk", args.n_kv_heads), ("wv", args.n_kv_heads)):
            weight = w[f"{layer}.attention.{name}.weight"]
            out[f"{layer}.attention.{name}.weight"] = weight if size > heads else weight.chunk(size, 0)[rank]
        out[f"{layer}.attention.wo.weight"] = w[f"{layer}.attention.wo.weight"].chunk(size, 1)[rank]
        for name in ("attention_norm", "ffn_norm", "feed_forward.gate"):
            out[f"{layer}.{name}.weight"] = w[f"{layer}.{name}.weight"]
        w1, w2, w3 = (w[f"{layer}.feed_forward.experts.{name}"] for name in ("w1", "w2", "w3"))
        experts = range(args.moe.num_experts)
        if layout == "mixtral":
            each = len(experts) // size
            for e in experts[rank * each : (rank + 1) * each]:
                for name, matrix in (("w1", w1[e]), ("w2", w2[e]), ("w3", w3[e])):
                    out[f"{layer}.feed_forward.experts.{e}.{name}.weight"] = matrix
        else:
            for name, parts in (("w1", w1), ("w2", w2.mT), ("w3", w3)):
                out[f"{layer}.feed_forward.{name}"] = torch.cat([parts[e].chunk(size, 0)[rank] for e in experts])
    return {f"llma.{name}": tensor.contiguous().clone() for name, tensor in out.items()}


def huggingface_tensors(w: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Mixtral's tensors as on the Hub: one matrix per expert, rotary rows of q and k as two halves of each head."""

    def halves(weight: Tensor) -> Tensor:
        return torch.cat([torch.cat([head[0::2], head[1::2]]) for head in weight.split(args.head_dim)])

    out = {"model.embed_tokens.weight": w["tok_embeddings.weight"]}
    out |= {"score.weight": w["score.weight"]} if args.labels else {"lm_head.weight": w["output.weight"]}
    out["model.norm.weight"] = w["norm.weight"]
    for n in range(args.n_layers):
        ours, theirs = f"layers.{n}", f"model.layers.{n}"
        out[f"{theirs}.self_attn.q_proj.weight"] = halves(w[f"{ours}.attention.wq.weight"])
        out[f"{theirs}.self_attn.k_proj.weight"] = halves(w[f"{ours}.attention.wk.weight"])
        out[f"{theirs}.self_attn.v_proj.weight"] = w[f"{ours}.attention.wv.weight"]
        out[f"{theirs}.self_attn.o_proj.weight"] = w[f"{ours}.attention.wo.weight"]
        out[f"{theirs}.input_layernorm.weight"] = w[f"{ours}.attention_norm.weight"]
        out[f"{theirs}.post_attention_layernorm.weight"] = w[f"{ours}.ffn_norm.weight"]
        out[f"{theirs}.block_sparse_moe.gate.weight"] = w[f"{ours}.feed_forward.gate.weight"]
        for name in ("w1", "w2", "w3"):
            for e, matrix in enumerate(w[f"{ours}.feed_forward.experts.{name}"]):
                out[f"{theirs}.block_sparse_moe.experts.{e}.{name}.weight"] = matrix
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}


def write(directory: Path, w: dict[str, Tensor], args: ModelArgs, format: str, size: int = 1) -> None:
    """Write a directory of these files with their descriptions."""
    directory.mkdir()
    for name, content in tensors(w, args, format, size).items():
        save_file(content, directory / name, {"format": "pt"})
    for name, values in settings(args, format).items():
        (directory / name).write_text(json.dumps(values))


def settings(args: ModelArgs, format: str) -> dict[str, dict[str, Any]]:
    """The values that the JSON files must have, key by key."""
    if format == "hf":
        config: dict[str, Any] = {
            "architectures": [f"MixtralFor{'SequenceClassification' if args.labels else 'CausalLM'}"],
            "model_type": "mixtral",
            "hidden_size": args.dim,
            "intermediate_size": args.hidden_dim,
            "num_hidden_layers": args.n_layers,
            "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.n_kv_heads,
            "head_dim": args.head_dim,
            "vocab_size": args.vocab_size,
            "rms_norm_eps": args.norm_eps,
            "max_position_embeddings": args.max_seq_len,
            "sliding_window": args.sliding_window,
            "num_local_experts": args.moe.num_experts,
            "num_experts_per_tok": args.moe.num_experts_per_tok,
            "rope_theta": args.rope_theta,
            "rope_scaling": {"type": "linear", "factor": 1 / args.rope_scaling} if args.rope_scaling else None,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "router_aux_loss_coef": args.load_balancing_weight,
        }
        if args.labels:
            config["id2label"] = {str(number): label for number, label in enumerate(args.labels)}
        return {"config.json": config}
    config = {
        "dim": args.dim,
        "hidden_dim": args.hidden_dim,
        "head_dim": args.head_dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "rope_scaling": args.rope_scaling,
        "sliding_window": args.sliding_window,
        "max_batch_size": args.max_batch_size,
        "max_seq_len": args.max_seq_len,
        "moe": {"num_experts": args.moe.num_experts, "num_experts_per_tok": args.moe.num_experts_per_tok},
        "load_balancing_weight": args.load_balancing_weight,
    }
    if args.labels:
        config["labels"] = list(args.labels)
    if args.visual:
        config["visual"] = args.visual.to_dict()
    return {"config.json": config, "meta.json": {"llama_type": format}}


def wrong_setting(directory: Path, args: ModelArgs, format: str) -> str | None:
    """The first setting of a directory's JSON files that is wrong; further keys are allowed."""
    for name, expected in settings(args, format).items():
        found = json.loads((directory / name).read_text())
        for key, value in expected.items():
            if key not in found or found[key] != value:
                return f"{directory.name}/{name}: {key} is {found.get(key)!r}, expected {value!r}"
    return None


def difference(directory: Path, expected: Files) -> float:
    """The largest difference of a value in a directory's safetensors files; infinite if the files or keys differ."""
    found = {path.name: load_file(path) for path in directory.glob("*.safetensors")}
    shapes = [{file: {k: t.shape for k, t in some.items()} for file, some in files.items()} for files in (found, expected)]
    if shapes[0] != shapes[1]:
        return math.inf
    pairs = [(found[file][key], tensor) for file, some in expected.items() for key, tensor in some.items()]
    return largest((a.double() - b.double()).abs().max().item() for a, b in pairs)


def largest(errors: Iterable[float]) -> float:
    """The largest error; infinite if one is NaN, which Python's max ignores unless it comes first."""
    return max(math.inf if math.isnan(error) else error for error in errors)
