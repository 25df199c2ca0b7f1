"""Does loading keep up with training? Tokenising, reading and packing samples, next to the training step and to TRL.

    python benchmarks/data.py                    # TRL is compared if it is installed
    python benchmarks/data.py --memory 10000000  # memory of two ranks over so many short records

Records are those of the standard library's documentation, repeated with a number in each; the tokenizer is trained on
them. Times are of one pass. All files were written just before, so they are read from the page cache.
"""

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
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
from accessory.model.logical import LogicalModel
from accessory.model.moe.layouts import EXPERT
from accessory.settings import OptimSection
from accessory.train.balance import RouterLosses
from accessory.train.objective import NextToken
from accessory.train.optim import make_optimizer
from accessory.train.step import train_step

WIDTH, ROWS = 1024, 8
ARGS = ModelArgs(
    dim=512, hidden_dim=1792, head_dim=64, n_layers=4, n_heads=8, n_kv_heads=4, vocab_size=4096, moe=MoEArgs(8, 2)
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", type=int, default=8, help="of the corpus; default: %(default)s")
    parser.add_argument("--memory", type=int, metavar="N", help="measure memory, over N short records, and nothing else")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)  # mix and tokenizer: one of the processes measured
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(*map(Path, arguments.rank))
        return
    if arguments.memory:
        measure_memory(arguments.memory)
        return
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


def measure_memory(records: int) -> None:
    """Two processes load and read the same records; the first runs alone until they are tokenised."""
    print(environment())
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ACCESSORY_CACHE"] = str(Path(folder, "cache"))
        mix, words = Path(folder, "mix.yaml"), ["the", "list", "of", "tokens", "is", "made", "from", "words", "and", "then"]
        texts = [" ".join(rng.choices(words, k=rng.randint(2, 20))) for _ in range(3000)]
        tokenizer = train_tokenizer((f"{text} {n}" for n, text in enumerate(texts)), Path(folder, "tokenizer.model"), 320)
        with open(Path(folder, "records.jsonl"), "w") as file:
            file.writelines(f'{{"text": "{n} {texts[n % 3000]}"}}\n' for n in range(records))
        mix.write_text("META: [{path: records.jsonl}]")
        size = Path(folder, "records.jsonl").stat().st_size
        command = [sys.executable, __file__, "--rank", str(mix), str(tokenizer)]
        print(f"\n{records:,} records, {size / 1e6:,.0f} MB; MB beyond the imports\n\ntokenising, by all cores", flush=True)
        subprocess.run(command, check=True)
        print("\ntokenised before: two ranks at the same time", flush=True)
        ranks = [subprocess.Popen(command) for _ in range(2)]
        assert not any([rank.wait() for rank in ranks])


def run_rank(mix: Path, tokenizer: Path) -> None:
    """Load and read data as one rank of two; print after each step the process's own memory, and that of mapped files."""
    torch.set_num_threads(1)
    start, before = time.perf_counter(), memory()

    def tell(what: str) -> None:
        own, mapped = (now - then for now, then in zip(memory(), before, strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - sum(before)
        seconds = time.perf_counter() - start
        print(f"{what:<28}{own:8.0f} own {mapped:8.0f} mapped {peak:8.0f} peak {seconds:8.0f} s", flush=True)

    data = load_mix(mix, Tokenizer(tokenizer), WIDTH, 0, validation=0.02)
    tell("mix loaded")
    for packing in (False, True):
        lengths = data.training.lengths
        epochs = [Rows.packed(data.epoch(n), lengths, WIDTH) if packing else Rows.alone(data.epoch(n)) for n in range(3)]
        tell(f"rows of 3 epochs, {'packed' if packing else 'alone'}")
        for _ in itertools.islice(BatchPlan(ROWS, 1, 0, 2).epoch(data.training, epochs[0]), 1000):
            pass
        tell("1000 steps")


def memory() -> tuple[float, float]:
    """MB of this process: its own, and of pages of files, which processes share and the system may drop."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {line[0]: int(line[1]) / 1e3 for line in lines if line[0] in ("RssAnon:", "RssFile:")}
    return found["RssAnon:"], found["RssFile:"]


def make_corpus(folder: Path, copies: int) -> tuple[Path, int]:
    """The corpus once, to train a tokenizer on, and ``copies`` times with a number in each record."""
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
    """TRL's packing of the same samples into rows of the same width, with its fastest strategy, through Arrow."""
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
    logical = LogicalModel(ARGS)
    model = build_model(logical, EXPERT, RandomWeights(logical, 0), dtype=torch.float32, device=torch.device("cpu"))
    optimizer = make_optimizer(model, OptimSection())
    done, start = 0, 0.0
    for number, micro_batches in enumerate(plan.epoch(data.training, rows)):
        if number == 1:  # the first warms up
            start = time.perf_counter()
        if number == 5:
            break
        train_step(model, optimizer, micro_batches, NextToken(), RouterLosses(), clip_grad=1.0)
        done += sum(batch.real_tokens for batch in micro_batches) if number else 0
    return done / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
