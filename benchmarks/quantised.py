"""Memory and speed of generation from quantised weights, next to bf16 and to transformers with bitsandbytes.

    python benchmarks/quantised.py
    pip install --target EXTRA --no-deps bitsandbytes accelerate psutil; PYTHONPATH=EXTRA python benchmarks/quantised.py

Every side is a process of its own, from files to the last token. Ours reads a directory made by `accessory quantise`;
bitsandbytes can only start from the bf16 files. Peak memory is the largest resident set, including mapped pages of files,
and "held" is the process's own memory after an answer, both minus those after the imports. There is one request of 128
tokens with 24 new ones, decoded greedily, and answered once before it is timed. Each speed is the median of rounds that the
sides take in turn, while the others wait. Without bitsandbytes its side is left out, and a line says so.
"""

import argparse
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from common import environment, start_one_process
from generate import NEW, PROMPT, SHAPE, Times, ours, theirs

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
    """A figure of this process's memory, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) / 1e3


def load_ours(folder: Path, way: str | None) -> Callable[[], Times]:
    source = Checkpoint(folder / (way or "hf"))
    options = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "trains": frozenset()}
    model = build_model(source.logical, EXPERT, source, **options)
    model.pack()
    engine = Engine(model, Numbers(SHAPE.vocab_size), max_seq_len=512)
    return lambda: ours(engine, 1)


def load_theirs(folder: Path, way: str | None) -> Callable[[], Times]:
    from transformers import BitsAndBytesConfig, MixtralForCausalLM

    quantisation = {}
    if way:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=way, bnb_4bit_compute_dtype=torch.bfloat16)
        quantisation = {"quantization_config": config}
    model = MixtralForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16, **quantisation)
    return lambda: theirs(model, 1)


def serve_side(name: str, folder: Path) -> None:
    """In a process of its own: answer once and print the memory; then for each input line answer and print the speed."""
    start_one_process()
    before = {line: own(line) for line in ("VmRSS", "RssAnon")}
    answer = load_ours(folder, OURS[name]) if name in OURS else load_theirs(folder, THEIRS[name])
    answer()
    memory = {"peak": own("VmHWM") - before["VmRSS"], "held": own("RssAnon") - before["RssAnon"]}
    print(json.dumps(memory), flush=True)
    for _ in sys.stdin:
        read, write = answer()
        print(json.dumps({"read": PROMPT / read, "written": (NEW - 1) / write}), flush=True)


class Side:
    """One side's process."""

    def __init__(self, name: str, folder: Path):
        words = [sys.executable, __file__, "--side", name, "--folder", str(folder)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.memory, self.speeds = self._told(), list[Figures]()

    def _told(self) -> Figures:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.process.args} ended: {self.process.wait()}")

    def answer(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("again\n")
        self.speeds.append(self._told())

    def figures(self) -> Figures:
        """The figures in the order of the table."""
        return self.memory | {f: statistics.median(speed[f] for speed in self.speeds) for f in self.speeds[0]}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def make(folder: Path, layers: int) -> None:
    """Write the model in bf16 in Hugging Face's format, and quantised."""
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
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve_side(arguments.side, arguments.folder)
        return
    print(environment())
    names = [*OURS, *THEIRS]
    missing = [name for name in ("bitsandbytes", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        print(f"without {' and '.join(missing)} there is no side of bitsandbytes")
        names.pop()
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), arguments.layers)
        size = sum(path.stat().st_size for path in Path(place, "hf").glob("*.safetensors")) / 1e6
        try:
            for name in names:
                sides[name] = Side(name, Path(place))
            for _, side in itertools.product(range(arguments.rounds), sides.values()):
                side.answer()
        finally:
            for side in sides.values():
                side.stop()
    print(
        f"a Mixtral of {arguments.layers} layers, {size:,.0f} MB in bf16; MB and tokens/s, and their ratio to ours in bf16"
    )
    print(f"{'':34s}" + "".join(f"{figure:>18s}" for figure in ("peak", "held", "read", "written")))
    base = sides[names[0]].figures()
    for name, side in sides.items():
        print(f"{name:34s}" + "".join(f"{value:11,.1f}{value / base[f]:7.2f}" for f, value in side.figures().items()))


if __name__ == "__main__":
    main()
