"""``--dry-run`` finds what a run would stumble over, in seconds, and writes nothing; what it plans is what happens."""

import json
import os
import re
import resource
import shlex
import time

import pytest
import torch
from jobs import command, run_each
from slips import make_home
from test_endings import NO_RIGHTS

from accessory.model.adapter import ONE_ADAPTER
from accessory.model.args import ModelArgs, MoEArgs
from accessory.model.build import RandomWeights, build_model
from accessory.model.documents import Documents
from accessory.model.logical import LogicalModel
from accessory.model.memory import saved_bytes
from accessory.model.moe.layouts import EXPERT
from accessory.model.recompute import run_block
from accessory.model.rope import rotations
from accessory.train.trace import Trace

SMALL_DISK = "import shutil\nshutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**9, 10**9, 400_000)\n"
CHECKPOINT = "model.checkpoint={home}/ckpt model.config=null model.tokenizer=null"
FAULTS = {  # what of a good run is changed, and what else is planted: the sentence
    ("parallel.model_parallel=3 --world 8", ""): "parallel.model_parallel 3 does not divide the 8 processes",
    ("parallel.model_parallel=8 --world 8", ""): "model-parallel size 8 does not divide",
    ("parallel.shard_size=3 --world 8", ""): "parallel.shard_size 3 does not divide the 8 data-parallel ranks",
    ("--world 2 --memory 0.001", ""): "a rank has 0.00 GiB of memory and would need about",
    ("train.epochs=2 save.state_every=1 train.max_steps=null", SMALL_DISK): "the disk is too small: saves: 2 x the model",
    (CHECKPOINT.replace("ckpt", "torn"), ""): "model.safetensors: damaged or not a checkpoint file",
    (CHECKPOINT.replace("ckpt", "lacks"), ""): "model.safetensors lacks llma.norm.weight",
    ("model.config={home}/small.json", ""): "300 pieces but the model's vocab_size is 64",
    ("tuning.lora.targets=[expertz] " + CHECKPOINT, ""): "tuning.lora.targets: 'expertz' matches none",
    ("data.mix={home}/bad.yaml", ""): "bad.jsonl:1",
    ("data.max_seq_len=4 train.max_steps=null", ""): "no record with anything to train on within 4 tokens",
    ("resume={home}/run/states/step1 train.seed=1", ""): "was saved with other samples",
    ("out={home}/run", ""): "an earlier run left its training state here",
    ("out={home}/locked/run", NO_RIGHTS): "cannot be written (Permission denied)",
    ("resume=auto out={home}/run", ""): "this run is over: raise train.epochs or train.max_steps to go on",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    from safetensors.torch import load_file, save_file

    home = make_home(tmp_path_factory.mktemp("home"))
    codes, _, err = command("finetune", home / "run.yaml")
    assert codes == [0], err
    (home / "locked").mkdir(mode=0o555)
    (home / "small.json").write_text(json.dumps(json.loads((home / "model.json").read_text()) | {"vocab_size": 64}))
    (home / "bad.yaml").write_text("META: [{path: bad.jsonl}]")
    (home / "bad.jsonl").write_text('{"conversations": 3}')
    file = "consolidated.00-of-01.model.safetensors"
    for name in ("torn", "lacks"):
        os.system(f"cp -r {home}/ckpt {home}/{name}")
    os.truncate(home / "torn" / file, (home / "torn" / file).stat().st_size // 2)
    tensors = load_file(home / "lacks" / file)
    del tensors["llma.norm.weight"]
    save_file(tensors, home / "lacks" / file)
    return home


def test_each_fault_is_one_sentence_within_ten_seconds(home, tmp_path):
    before = sorted(path for path in home.rglob("*"))
    changes = [words.format(home=home) for words, _ in FAULTS]
    lines = [f"finetune {home}/run.yaml --dry-run out={tmp_path}/out{n} {words}" for n, words in enumerate(changes)]
    began = time.monotonic()
    ends = run_each([(shlex.split(line), plant) for line, (_, plant) in zip(lines, FAULTS, strict=True)], tmp_path)
    took = (time.monotonic() - began) / len(FAULTS)
    for line, sentence, (code, out, err) in zip(lines, FAULTS.values(), ends, strict=True):
        assert code == 1 and re.fullmatch(rf"accessory: error: .*{re.escape(sentence)}.*\n", err), (line, out, err)
    assert took < 10 and not list(tmp_path.glob("out*"))
    assert sorted(path for path in home.rglob("*")) == before


def test_what_is_planned_is_what_happens(home, tmp_path):
    words = ["train.max_steps=null", "train.epochs=2", "save.state_every=2", "save.keep_every=6", f"out={tmp_path}/run"]
    codes, out, err = command("finetune", home / "run.yaml", "--dry-run", *words)
    assert codes == [0] and not (tmp_path / "run").exists(), err
    assert "steps: 12 to do of 12, 4 rows and at most 768 tokens each; 2 epoch(s) of 22 rows" in out
    models, model, states, state, kept = re.search(
        r"saves: (\d+) x the model, (\S+); (\d+) x a state to resume from, (\S+), of which (\d+) are there", out
    ).groups()
    tokens, learnt = re.search(r"micro-batch: 4 samples, (\d+) tokens, (\d+) \[\[learnt\]\]", out).groups()
    assert out.count("== ") == 4 and out.count("[[") == 5
    codes, out, err = command("finetune", home / "run.yaml", *words, "log.every=1")
    assert codes == [0], err
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])
    assert (first["tokens"], first["targets"]) == (int(tokens), int(learnt))
    saved = [line for line in out.splitlines() if line.startswith("saved")]
    assert [sum("epoch" in line for line in saved), sum("states" in line for line in saved)] == [int(models), int(states)]
    assert len(list((tmp_path / "run/states").iterdir())) == int(kept) - 2, (
        "step 6, and 10 and 12, of which 12 is kept twice"
    )
    for path, size in ((tmp_path / "run/epoch1", model), (tmp_path / "run/states/step12", state)):
        found = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        assert found == pytest.approx(float(size.removesuffix("kB")) * 1e3, rel=0.1)


def test_a_plan_for_other_machines_needs_none_of_them(home, tmp_path):
    """Mixtral 8x7B over 32 GPUs, with what this process may have for all of it and Python."""
    big = json.loads((home / "model.json").read_text()) | {"dim": 4096, "hidden_dim": 14336, "n_layers": 32, "head_dim": 128}
    big |= {"n_heads": 32, "n_kv_heads": 8, "moe": {"num_experts": 8, "num_experts_per_tok": 2}}
    (home / "big.json").write_text(json.dumps(big))
    free = "import shutil\nshutil.disk_usage = lambda _: shutil._ntuple_diskusage(10**13, 0, 10**13)\n"
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_DATA, {(4 * 2**30, resource.RLIM_INFINITY)})\n"
    words = f"finetune {home}/run.yaml --dry-run --world 32 --memory 80 model.config={home}/big.json parallel.precision=bf16"
    ((code, out, err),) = run_each([(shlex.split(f"{words} out={tmp_path}/run"), free + limit)], tmp_path, workers=1)
    assert code == 0, err
    assert "weights 5.41, gradients 5.41, moments 10.81" in out  # 46.4 G parameters, 4, 4 and 8 bytes each, over 32
    assert "1 x a state to resume from, 557GB" in out and "1 x the model, 92.9GB" in out


@pytest.mark.parametrize("shape", [{}, {"hidden_dim": 640}, {"dim": 256, "head_dim": 64}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", ["none", "norms_and_experts"])
def test_what_a_block_keeps_for_backward(shape, dtype, recompute):
    """Counted as autograd keeps it, of the kernel that GPUs take."""
    small = {"dim": 64, "hidden_dim": 160, "head_dim": 16, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64}
    args = ModelArgs(**(small | shape), moe=MoEArgs(4, num_experts_per_tok=2))
    logical = LogicalModel(args)
    model = build_model(
        logical, EXPERT, RandomWeights(logical, 0), dtype=dtype, device=torch.device("cpu"), kernel="grouped"
    )
    tokens = 256
    documents = Documents.of([tokens])
    rotation = rotations(documents.positions, args.head_dim, args.rope_theta, args.rope_scaling, dtype)
    x = torch.randn(tokens, args.dim).to(dtype).requires_grad_()
    with Trace() as trace:
        given, _ = run_block(model.layers[0], (x, rotation, documents, None, ONE_ADAPTER), recompute)
    found = (trace.live - given.nbytes + x.nbytes) / tokens
    assert saved_bytes(args, 1, dtype, recompute) == pytest.approx(found, rel=0.16)  # attention on a CPU copies its output
