"""The benchmarks run: small, and never for their times."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = BENCHMARKS.parent / "configs/model/tiny.json"


@pytest.mark.parametrize(
    ("name", "words", "printed"),
    [
        ("moe_layer.py", ["--tokens", "2", "--rounds", "1"], "bfloat16: dense time"),
        ("train_step.py", ["--help"], "--lora"),
        ("checkpoint_memory.py", ["--help"], "--layers"),
        ("save.py", ["--layers", "1", "--rounds", "1"], "DCP async_save"),
        ("offload.py", [], "4  frequency, guessed ahead     65.7%     12.9%        69.1%           48.6%"),
        ("data.py", ["--memory", "2000"], "1000 steps"),
        ("full_size.py", ["--help"], "--layers"),
        ("decode.py", ["--model", str(TINY), "--context", "40", "--new", "4"], "context, kernel by kernel: "),
        ("quantise_accuracy.py", ["--help"], "--draws"),
        ("quantised.py", ["--help"], "--rounds"),
        ("health.py", ["--rounds", "1", "--rows", "1", "--layers", "1"], "parts alone, of the step"),
    ],
)
def test_a_benchmark_runs(name, words, printed):
    done = subprocess.run([sys.executable, BENCHMARKS / name, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
