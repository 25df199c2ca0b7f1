"""The commands on GPUs that are not there: nothing stays behind on the CPU, and the numbers are the CPU's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pretend_gpu
import pytest
import torch
from jobs import command
from seeing import MODEL, saved_in, seeing, write_run

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="GPUs that are not there need a C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for GPUs that are there"),
]

FP64 = "parallel.precision=fp64"
LORA = "tuning={lora: {rank: 4, dropout: 0.1, targets: [attention, experts, router, embeddings, output]}, bias: true}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """With a model that was trained on the CPU."""
    home = write_run(tmp_path_factory.mktemp("pretend"), seeing("clip", MODEL))
    codes, _, err = command("finetune", home / "run.yaml", FP64, f"out={home}/cpu")
    assert codes == [0], err
    return home


def commands(home):
    """(ranks, words) of each by name, in order: later ones use what earlier ones leave."""
    run, base = home / "run.yaml", saved_in(home / "cpu")
    on_two = ["parallel.model_parallel=2", "model.layout=mixtral_sparse", "parallel.recompute=block"]
    held = ["model.quantise={experts: nf4-8, attention: int8}", "model.offload.experts=2"]
    two = [f"out={home}/two", "save.state_every=2"]
    bf16, start = "parallel.precision=bf16", f"model.checkpoint={base}"
    return {
        "train": (1, ["finetune", run, FP64, f"out={home}/train"]),
        "train on two": (2, ["finetune", run, *on_two, bf16, start, *two]),
        "go on": (1, ["finetune", run, bf16, start, *two, "train.max_steps=4", "resume=auto"]),
        "adapter": (1, ["finetune", run, LORA, bf16, start, f"out={home}/adapter", "parallel.recompute=norms_and_experts"]),
        "adapter over what is held elsewhere": (1, ["finetune", run, LORA, *held, bf16, start, f"out={home}/held"]),
        "answers": (1, answers(home, base)),
        "answers of replayed steps": (1, [*answers(home, base)[:-2], "--precision", "bf16"]),
        "answers of two": (2, ["generate", base, "the list of", "of tokens", "--max-gen-len", "8", "--mp", "2"]),
        "answers, offloaded": (1, [*answers(home, base)[:-2], "--quantise", "nf4-8", "--offload", "experts=2"]),
        "scores": (1, ["evaluate", base, "--data", home / "mix.yaml", "--precision", "fp64"]),
        "quantise": (1, ["quantise", base, home / "int4", "--experts", "int4-8", "--calibrate", home / "mix.yaml"]),
    }


def answers(home, base):
    return ["generate", base, "what is made", "--image", home / "1.png", "--max-gen-len", "8", "--precision", "fp64"]


@pytest.fixture(scope="module")
def ran(home):
    """(exit codes, output) of each command, by name."""
    jobs = []
    for number, (ranks, words) in enumerate(commands(home).values()):
        files = [str(home / f"{number}.{rank}.out") for rank in range(ranks)]
        job = {"words": [*map(str, words)], "ranks": ranks, "files": files}
        jobs.append(job | {"codes": str(home / f"{number}.codes")})
    (home / "jobs.json").write_text(json.dumps(jobs))
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "pretend_gpu", str(pretend_gpu.build(home)), str(home / "jobs.json")]
    subprocess.run(words, env=environment, cwd=home, timeout=400, check=True)
    outcomes = [
        (json.loads(Path(job["codes"]).read_text()), "".join(Path(file).read_text() for file in job["files"]))
        for job in jobs
    ]
    return dict(zip(commands(home), outcomes, strict=True))


def test_every_command_runs(ran):
    failed = {name: out for name, (codes, out) in ran.items() if any(codes)}
    said = {name: [line for line in out.splitlines() if " registered at " not in line][-40:] for name, out in failed.items()}
    assert not said, "\n".join(f"{name}: " + "\n".join(lines) for name, lines in said.items())


def test_a_step_of_single_tokens_is_a_graph_where_it_can_be(ran):
    recorded = [name for name, (_, out) in ran.items() if "recorded a graph of 1 rows" in out]
    assert recorded == ["answers of replayed steps"]


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [value for line in lines for name, value in sorted(line.items()) if name in ("loss", "val_loss", "grad_norm")]


def test_the_numbers_are_the_cpus(home, ran):
    assert losses(home / "train") == pytest.approx(losses(home / "cpu"), rel=1e-9)
    base = saved_in(home / "cpu")
    for name, words in {"answers": answers(home, base), "scores": commands(home)["scores"][1]}.items():
        codes, out, err = command(*words)
        assert codes == [0], err
        assert out.strip() and {*out.splitlines()} <= {*ran[name][1].splitlines()}, f"{name}: {out} {ran[name][1]}"
