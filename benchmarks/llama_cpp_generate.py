"""llama.cpp's side of benchmarks/generate.py, run by a Python that has llama-cpp-python, gguf and safetensors.

    PYTHON benchmarks/llama_cpp_generate.py FOLDER float32|bfloat16 THREADS PROMPT NEW

Writes the Mixtral in FOLDER (Hugging Face's form) as GGUF beside it. For each line "BATCH" of its input it prints the
seconds of prefill and of decoding for that many requests.
"""

import ctypes
import json
import random
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k: from transformers' two halves to pairs, which llama.cpp rotates."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(folder: Path, dtype: str) -> Path:
    config = json.loads((folder / "config.json").read_text())
    w = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    heads, kv_heads, layers = (config[f"num_{name}"] for name in ("attention_heads", "key_value_heads", "hidden_layers"))
    path = folder / f"{dtype}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: np.ndarray) -> None:
        tensor = np.ascontiguousarray(tensor, dtype=np.float32)
        if tensor.ndim == 1 or "gate_inp" in name or dtype == "float32":
            writer.add_tensor(name, tensor)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)

    add("token_embd.weight", w["model.embed_tokens.weight"])
    add("output_norm.weight", w["model.norm.weight"])
    add("output.weight", w["lm_head.weight"])
    for n in range(layers):
        ours, theirs = f"blk.{n}.", f"model.layers.{n}."
        add(f"{ours}attn_q.weight", interleaved(w[f"{theirs}self_attn.q_proj.weight"], heads))
        add(f"{ours}attn_k.weight", interleaved(w[f"{theirs}self_attn.k_proj.weight"], kv_heads))
        add(f"{ours}attn_v.weight", w[f"{theirs}self_attn.v_proj.weight"])
        add(f"{ours}attn_output.weight", w[f"{theirs}self_attn.o_proj.weight"])
        add(f"{ours}attn_norm.weight", w[f"{theirs}input_layernorm.weight"])
        add(f"{ours}ffn_norm.weight", w[f"{theirs}post_attention_layernorm.weight"])
        add(f"{ours}ffn_gate_inp.weight", w[f"{theirs}block_sparse_moe.gate.weight"])
        for name, matrix in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            experts = [
                w[f"{theirs}block_sparse_moe.experts.{e}.{matrix}.weight"] for e in range(config["num_local_experts"])
            ]
            add(f"{ours}ffn_{name}_exps.weight", np.stack(experts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Runner:
    """A model with room for ``batch`` sequences at a time."""

    def __init__(self, path: Path, batch: int, threads: int, longest: int):
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = batch * longest, batch * longest, 512, batch
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.batch = llama_cpp.llama_batch_init(batch * longest, 0, batch)

    def step(self, tokens: list[list[int]], past: int, vocabulary: int) -> list[list[int]]:
        """Run each sequence's next tokens; returns the likeliest token after each."""
        batch, at, ends = self.batch, 0, []
        for sequence, some in enumerate(tokens):
            for place, token in enumerate(some):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, past + place, 1
                batch.seq_id[at][0], batch.logits[at] = sequence, place == len(some) - 1
                at += 1
            ends.append(at - 1)
        batch.n_tokens = at
        assert llama_cpp.llama_decode(self.context, batch) == 0
        rows = (llama_cpp.llama_get_logits_ith(self.context, end) for end in ends)
        return [[int(np.ctypeslib.as_array(row, (vocabulary,)).argmax())] for row in rows]

    def generate(self, prompts: list[list[int]], new: int, vocabulary: int) -> tuple[float, float]:
        """Seconds of prefill and of decoding."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        start = time.perf_counter()
        tokens = self.step(prompts, 0, vocabulary)
        read = time.perf_counter()
        for place in range(new - 1):
            tokens = self.step(tokens, len(prompts[0]) + place, vocabulary)
        return read - start, time.perf_counter() - read


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


def main() -> None:
    folder, dtype = Path(sys.argv[1]), sys.argv[2]
    threads, prompt, new = map(int, sys.argv[3:])
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    path = write_gguf(folder, dtype)
    runners: dict[int, Runner] = {}
    for line in sys.stdin:
        batch = int(line)
        if batch not in runners:
            runners[batch] = Runner(path, batch, threads, prompt + new)
        prompts = [[random.randrange(3, vocabulary) for _ in range(prompt)] for _ in range(batch)]
        print(json.dumps(runners[batch].generate(prompts, new, vocabulary)), flush=True)


if __name__ == "__main__":
    main()
