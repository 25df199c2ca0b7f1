"""Does loading keep up with training? Tokenising, reading and packing samples, next to the training step and to TRL.

    python benchmarks/data.py             # TRL is compared if it is installed

Records are those of the standard library's documentation, written out several times with other words in them; the
tokenizer is trained on them. Times are of one pass; everything that is read was written just before, so it comes from the
page cache.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import environment, start_one_process

from accessory.data.loader import BatchPlan
from accessory.data.mix import load_mix, mix_texts
from accessory.data.packing import Rows
from accessory.data.stdlib import write_corpus
from accessory.data.tokenizer import Tokenizer, train_tokenizer
from accessory.model.args import ModelArgs, MoEArgs
from accessory.model.build import RandomWeights, build_model
from accessory.model.logical import logical_cuts
from accessory.model.moe.layouts import get_layout
from accessory.train.config import OptimSection
from accessory.train.optim import make_optimizer
from accessory.train.step import train_step

WIDTH, ROWS = 1024, 8
ARGS = ModelArgs(
    dim=512, hidden_dim=1792, head_dim=64, n_layers=4, n_heads=8, n_kv_heads=4, vocab_size=4096, moe=MoEArgs(8, 2)
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=8, help="of the corpus; default: %(default)s")
    arguments = parser.parse_args()
    start_one_process()
    print(environment())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ACCESSORY_CACHE"] = str(Path(folder, "cache"))
        mix, size = make_corpus(Path(folder), arguments.copies)
        tokenizer = Tokenizer(train_tokenizer(mix_texts(Path(folder, "mix.yaml")), Path(folder, "tokenizer.model"), 4096))
        seconds, data = timed(lambda: load_mix(mix, tokenizer, WIDTH, 0))
        tokens = int(data.training.lengths.sum())
        print(f"\n{size / 1e6:.0f} MB, {len(data.training):,} samples, {tokens:,} tokens")
        print(f"tokenise, all cores      {size / 1e6 / seconds:8.1f} MB/s {tokens / seconds:14,.0f} tokens/s")
        seconds, _ = timed(lambda: load_mix(mix, tokenizer, WIDTH, 0))
        print(f"find it in the cache     {seconds:8.2f} s")
        seconds, rows = timed(lambda: Rows.packed(data.epoch(0), data.training.lengths, WIDTH))
        print(f"order and pack           {seconds:8.2f} s    {tokens / seconds:14,.0f} tokens/s", end="")
        print(f"   {tokens / len(rows) / WIDTH:.1%} full")
        plan = BatchPlan(ROWS, 1, 0, 1)
        seconds, _ = timed(lambda: [None for _ in plan.epoch(data.training, rows)])
        loading = tokens / seconds
        print(f"read and collate         {seconds:8.2f} s    {loading:14,.0f} tokens/s")
        compare_trl(data, tokens)
        step = step_rate(data, rows, plan)
        active = ARGS.active_parameters() / 1e6
        print(f"training step            {'':8}      {step:14,.0f} tokens/s ({active:.0f} M parameters active, fp32)")
        print(f"\nloading is {loading / step:,.0f} times as fast: {step / loading:.2%} of the step's time")


def make_corpus(folder: Path, copies: int) -> tuple[Path, int]:
    """The corpus once (to train a tokenizer on), and many times with a number in each record."""
    write_corpus(folder)
    lines = (folder / "dialog.jsonl").read_text().splitlines()
    with open(folder / "many.jsonl", "w") as file:
        for copy in range(copies):
            for line in lines:
                record = json.loads(line)
                record["conversations"][0]["value"] += f" ({copy})"
                file.write(json.dumps(record) + "\n")
    (folder / "many.yaml").write_text("META: [{path: many.jsonl}]")
    return folder / "many.yaml", (folder / "many.jsonl").stat().st_size


def timed(body):
    start = time.perf_counter()
    result = body()
    return time.perf_counter() - start, result


def compare_trl(data, tokens: int) -> None:
    """TRL's packing of the same samples into rows of the same width (its fastest strategy, through Arrow)."""
    try:
        from datasets import Dataset
        from trl import pack_dataset
    except ImportError:
        print("TRL                      not installed")
        return
    ids = Dataset.from_dict({"input_ids": [sample.tokens for sample in data.training]})
    seconds, packed = timed(lambda: pack_dataset(ids, WIDTH, "bfd"))
    print(f"TRL, pack                {seconds:8.2f} s    {tokens / seconds:14,.0f} tokens/s", end="")
    print(f"   {tokens / len(packed) / WIDTH:.1%} full")
    seconds, _ = timed(lambda: [torch.tensor(np.concatenate(b["input_ids"])) for b in packed.iter(ROWS)])
    print(f"TRL, read packed rows    {seconds:8.2f} s    {tokens / seconds:14,.0f} tokens/s")


def step_rate(data, rows: Rows, plan: BatchPlan) -> float:
    """Tokens/s of the training step on the same batches."""
    cuts = logical_cuts(ARGS, get_layout("mixtral"))
    model = build_model(ARGS, "mixtral", RandomWeights(cuts, 0), dtype=torch.float32, device=torch.device("cpu"))
    optimizer = make_optimizer(model, OptimSection())
    done, start = 0, 0.0
    for number, micro_batches in enumerate(plan.epoch(data.training, rows)):
        if number == 1:  # the first warms up
            start = time.perf_counter()
        if number == 5:
            break
        train_step(model, optimizer, micro_batches, clip_grad=1.0, balance="global", data_parallel="fsdp", cut=set())
        done += sum(batch.real_tokens for batch in micro_batches) if number else 0
    return done / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
