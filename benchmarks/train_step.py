"""The whole training step (forward, backward, clipping, AdamW), next to transformers' MixtralForCausalLM.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --lora 16      # adapters on attention and experts, next to the PEFT library's

Both have the same shape (vocabulary 32000), the same batch with masked prompts as in finetuning, the same optimiser and
clipping, and the balance loss. Precisions are fp32, and bf16 compute with fp32 masters (transformers: autocast). Each side
runs in a process of its own, in turn, so that its peak memory is its own; tokens/s is that of the median step.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from common import environment, pick_device, start_one_process
from transformers import MixtralConfig, MixtralForCausalLM

from accessory.data.loader import collate
from accessory.data.mix import Sample
from accessory.model.args import ModelArgs, MoEArgs
from accessory.model.build import RandomWeights, build_model
from accessory.model.moe.layouts import EXPERT
from accessory.parallel.fsdp import wrap
from accessory.parallel.mesh import ONE_RANK
from accessory.settings import LoraSection, OptimSection, TuningSection
from accessory.train.balance import RouterLosses
from accessory.train.malloc import keep_freed_memory
from accessory.train.objective import NextToken
from accessory.train.optim import make_optimizer
from accessory.train.step import train_step
from accessory.tuning.spec import resolve

SHAPE = ModelArgs(
    dim=512,
    hidden_dim=1792,
    head_dim=64,
    n_layers=4,
    n_heads=8,
    n_kv_heads=4,
    vocab_size=32000,
    moe=MoEArgs(num_experts=8, num_experts_per_tok=2),
    load_balancing_weight=0.02,
)
SEQUENCES, LENGTH, PROMPT = 8, 512, 256
OPTIM = OptimSection(lr=1e-4, clip_grad=1.0)


def batch() -> torch.Tensor:
    return torch.randint(3, SHAPE.vocab_size, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))


def ours(precision: str, device: torch.device, lora: int) -> Callable[[], float]:
    start_one_process()
    if device.type == "cpu":
        keep_freed_memory()  # as in a run
    compute = torch.bfloat16 if precision == "bf16" else torch.float32
    section = TuningSection(lora=LoraSection(rank=lora) if lora else None)
    tuning = resolve(section, SHAPE)
    model = build_model(
        tuning.logical,
        EXPERT,
        RandomWeights(tuning.logical, seed=0),
        dtype=torch.float32,
        device=device,
        trains=tuning.trains,
        frozen_dtype=compute,
        shard=lambda m: wrap(m, ONE_RANK, "fsdp", compute, device.type),
    )
    optimizer = make_optimizer(model, OPTIM)
    trained = [False] * PROMPT + [True] * (LENGTH - PROMPT)
    micro_batch = collate([Sample(row.tolist(), trained) for row in batch()]).to(device)

    def step() -> float:
        result = train_step(model, optimizer, [micro_batch], NextToken(), RouterLosses("global"), clip_grad=OPTIM.clip_grad)
        return float(result.loss_sum / result.targets)

    return step


def theirs(precision: str, device: torch.device, lora: int) -> Callable[[], float]:
    config = MixtralConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.dim,
        intermediate_size=SHAPE.hidden_dim,
        num_hidden_layers=SHAPE.n_layers,
        num_attention_heads=SHAPE.n_heads,
        num_key_value_heads=SHAPE.n_kv_heads,
        head_dim=SHAPE.head_dim,
        num_local_experts=SHAPE.moe.num_experts,
        output_router_logits=True,
        router_aux_loss_coef=SHAPE.load_balancing_weight,
        use_cache=False,
    )
    model = MixtralForCausalLM(config).to(device)
    if lora:
        model = with_peft(model.to(torch.bfloat16) if precision == "bf16" else model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=OPTIM.lr, betas=OPTIM.betas, weight_decay=0.0, fused=True)
    tokens = batch().to(device)
    labels = tokens.clone()
    labels[:, :PROMPT] = -100

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIM.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def with_peft(model: MixtralForCausalLM, rank: int) -> torch.nn.Module:
    """The same adapters: PEFT's on the fused gate_up_proj has twice the rank of ours on w1 and w3."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={r".*\.gate_up_proj": 2 * rank},
        alpha_pattern={r".*\.gate_up_proj": 2 * rank},
    )
    return get_peft_model(model, config)


def measure(side: str, precision: str, steps: int, lora: int) -> None:
    """In a process of its own: print one JSON line."""
    device = pick_device()
    step = {"accessory": ours, "transformers": theirs}[side](precision, device, lora)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": median(seconds[1:]), "peak": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="0: full finetuning")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure, arguments.steps, arguments.lora)
        return
    print(environment())
    for precision in ("fp32", "bf16"):
        found: dict[str, list[dict[str, float]]] = {"accessory": [], "transformers": []}
        for _ in range(arguments.rounds):
            for side, results in found.items():
                command = [sys.executable, __file__, "--measure", side, precision, "--steps", str(arguments.steps)]
                command += ["--lora", str(arguments.lora)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results.append(json.loads(output.splitlines()[-1]))
        rate = {side: SEQUENCES * LENGTH / median(r["seconds"] for r in results) for side, results in found.items()}
        peak = {side: max(r["peak"] for r in results) / 2**30 for side, results in found.items()}
        print(f"\n{precision}")
        for side in found:
            print(f"  {side:14s} {rate[side]:8.0f} tokens/s   peak {peak[side]:6.2f} GiB")
        print(
            f"  ratio          {rate['accessory'] / rate['transformers']:8.2f} x            "
            f"{peak['accessory'] / peak['transformers']:6.2f} x",
            flush=True,
        )


if __name__ == "__main__":
    main()
