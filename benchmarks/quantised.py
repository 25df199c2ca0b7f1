"""Memory and speed of answers from quantised weights, next to bf16 and to transformers with bitsandbytes.

    python benchmarks/quantised.py
    pip install --target EXTRA --no-deps bitsandbytes accelerate psutil; PYTHONPATH=EXTRA python benchmarks/quantised.py

Every side is a process of its own, from files to the last token: ours from a directory that `accessory quantise` makes,
bitsandbytes' from the bf16 files, which is what it can do. Peak memory is the largest resident set (mapped pages of files
included) less that after the imports; "held" are the pages of the process's own once it has answered. One request of 128
tokens, 24 new ones, chosen greedily, answered once before it is timed; each figure is the median of rounds that the sides
take in turn. Without bitsandbytes its side is left out, and that is said.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import environment, start_one_process
from generate import NEW, PROMPT, SHAPE, ours, theirs

from accessory.certify.serving import Numbers
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.open import Checkpoint
from accessory.infer.engine import Engine
from accessory.model.build import RandomWeights, build_model
from accessory.model.logical import LogicalModel
from accessory.model.moe.layouts import EXPERT
from accessory.settings import QuantiseSection
from accessory.train.save import save_model

OURS = {
    "accessory, bf16": None,
    "accessory, int8": "int8",
    "accessory, nf4": "nf4",
    "accessory, int4": "int4",
    "accessory, int3": "int3",
}
THEIRS = {"transformers, bf16": None, "transformers + bitsandbytes, nf4": "nf4"}
Figures = dict[str, float]


def own(what: str) -> float:
    """A line of this process's memory, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) / 1e3


def answer_of_ours(folder: Path, way: str | None) -> tuple[float, float]:
    source = Checkpoint(folder / (way or "hf"))
    options = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "trains": frozenset()}
    model = build_model(source.logical, EXPERT, source, **options)
    model.pack()
    engine = Engine(model, Numbers(SHAPE.vocab_size), max_seq_len=512)
    ours(engine, 1)
    return ours(engine, 1)


def answer_of_theirs(folder: Path, way: str | None) -> tuple[float, float]:
    from transformers import BitsAndBytesConfig, MixtralForCausalLM

    quantisation = {}
    if way:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=way, bnb_4bit_compute_dtype=torch.bfloat16)
        quantisation = {"quantization_config": config}
    model = MixtralForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16, **quantisation)
    theirs(model, 1)
    return theirs(model, 1)


def one_side(name: str, folder: Path) -> Figures:
    """In a process of its own."""
    start_one_process()
    before = own("VmRSS")
    read, write = answer_of_ours(folder, OURS[name]) if name in OURS else answer_of_theirs(folder, THEIRS[name])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before
    return {"peak": peak, "held": own("RssAnon"), "read": PROMPT / read, "write": (NEW - 1) / write}


def make(folder: Path, layers: int) -> None:
    """The model in bf16 as Hugging Face has it, and quantised."""
    start_one_process()
    logical = LogicalModel(replace(SHAPE, n_layers=layers))
    options = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "trains": frozenset()}
    model = build_model(logical, EXPERT, RandomWeights(logical, 0), **options)
    save_model(model, folder / "own", {}, torch.bfloat16, "safetensors")
    convert(Checkpoint(folder / "own"), folder / "hf", Target("hf"))
    for way in filter(None, OURS.values()):
        convert(Checkpoint(folder / "hf", quantise=QuantiseSection(way, way)), folder / way, Target("mixtral"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(one_side(arguments.side, arguments.folder)))
        return
    print(environment())
    sides = [*OURS, *THEIRS]
    missing = [name for name in ("bitsandbytes", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        print(f"without {' and '.join(missing)} there is no side of bitsandbytes")
        sides.pop()
    found: dict[str, list[Figures]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), arguments.layers)
        size = sum(path.stat().st_size for path in Path(place, "hf").glob("*.safetensors")) / 1e6
        for _ in range(arguments.rounds):
            for name in sides:
                words = [sys.executable, __file__, "--side", name, "--folder", place]
                done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"a Mixtral of {size:,.0f} MB in bf16; MB, and tokens/s; beside each figure its ratio to ours in bf16")
    print(f"{'':34s}" + "".join(f"{figure:>18s}" for figure in ("peak", "held", "read", "written")))
    middle = {name: {f: statistics.median(r[f] for r in rounds) for f in rounds[0]} for name, rounds in found.items()}
    base = middle[sides[0]]
    for name, figures in middle.items():
        print(f"{name:34s}" + "".join(f"{value:11,.1f}{value / base[f]:7.2f}" for f, value in figures.items()))


if __name__ == "__main__":
    main()
