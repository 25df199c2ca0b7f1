"""No job hangs: real jobs whose ranks die, stop, sleep or fail end in time, with the right words, and leave no process."""

import json
import re
import signal
import socket
import time

import pytest
from jobs import Job

from accessory.data.tokenizer import train_tokenizer

MODEL = {
    "dim": 16,
    "hidden_dim": 16,
    "head_dim": 4,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 4,
    "vocab_size": 300,
    "max_seq_len": 512,
    "moe": {"num_experts": 4, "num_experts_per_tok": 2},
}
STALL = 4
"""Seconds: longer than any honest step here."""
END = STALL + 15
"""Seconds from the fault to the end of the job: the stall, a margin for the last words, and a busy machine."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Records, a tokenizer, a model description and a run that would go on for ever."""
    home = tmp_path_factory.mktemp("home")
    turns = [("What is " + "very " * n + f"{n}?", f"It is {n}. " * (n % 5 + 1)) for n in range(40)]
    talks = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in turns]
    (home / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    (home / "mix.yaml").write_text("META: [{path: talks.jsonl}]")
    train_tokenizer((f"{q} {a}" for q, a in turns), home / "tokenizer.model", 300)
    (home / "model.json").write_text(json.dumps(MODEL))
    (home / "run.yaml").write_text(
        f"""
model: {{layout: mixtral, config: {home}/model.json, tokenizer: {home}/tokenizer.model}}
data: {{mix: {home}/mix.yaml}}
parallel: {{precision: fp32, stall_timeout_s: {STALL}}}
train: {{epochs: 5000, batch_size: 4}}
save: {{every_epochs: 5000}}
log: {{every: 1, tensorboard: false}}
"""
    )
    return home


def run(home, out, *overrides, ranks=2, plant=""):
    plant = f"import warnings\nwarnings.simplefilter('ignore')  # torch's also go to stderr\n{plant}"
    return Job("finetune", home / "run.yaml", f"out={out}/run", *overrides, ranks=ranks, plant=plant)


HOST = re.escape(socket.gethostname())
WAITS = r"step \d+ of epoch \d+, waits in \w+ called by \w+ \(accessory/[\w/]+\.py:\d+\)"


def errors(text):
    return [line for line in text.splitlines() if line.startswith("accessory: error:")]


@pytest.mark.parametrize("size, ranks", [("parallel.model_parallel=2", 2), ("train.batch_size=3", 3)])
def test_a_killed_rank_is_named(home, tmp_path, size, ranks):
    """gloo tells its neighbours at once: long before a rank that is only silent counts as dead."""
    with run(home, tmp_path, size, "parallel.stall_timeout_s=600", ranks=ranks) as job:
        job.reach("step     2/")
        *others, killed = range(ranks)
        job.send(signal.SIGKILL, killed)
        assert job.codes(*others, timeout=END) == [1] * len(others)
        (error,) = errors(job.err())
        assert re.search(rf"no sign of life for \d s from rank {killed} on {HOST}: killed", error), job.err()
        for rank in others:
            assert re.search(rf"^accessory: rank {rank} on {HOST}: {WAITS}", job.err(rank), re.M), job.err()
        assert "Traceback" not in job.err()


SLOW_TO_HEAR = """
import torch.distributed as dist
def multi_get(store, keys, real=dist.PrefixStore.multi_get):
    time.sleep(0.7 * rank)
    return real(store, keys)
dist.PrefixStore.multi_get = multi_get
"""
"""The others ask the store late: rank 0, which holds it, may be gone by then."""


def test_the_rank_with_the_store_is_killed(home, tmp_path):
    with run(home, tmp_path, "parallel.stall_timeout_s=600", ranks=3, plant=SLOW_TO_HEAR) as job:
        job.reach("step     2/")
        job.send(signal.SIGKILL, 0)
        assert job.codes(1, 2, timeout=END) == [1, 1]
        for rank in (1, 2):
            (error,) = errors(job.err(rank))
            assert re.search(rf"rank 0 on {HOST} is gone, and with it the job's key-value store", error), job.err()
            assert re.search(rf"^accessory: rank {rank} on {HOST}: {WAITS}", job.err(rank), re.M), job.err()
        assert "Traceback" not in job.err() and "frame #" not in job.err()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named(home, tmp_path, stopped):
    with run(home, tmp_path) as job:
        job.reach("step     2/")
        job.send(signal.SIGSTOP, stopped)
        other = 1 - stopped
        assert job.codes(other, timeout=END) == [1]
        (error,) = errors(job.err())
        assert f"rank {stopped} on {socket.gethostname()}" in error, job.err()
        assert re.search(rf"^accessory: rank {other} on {HOST}: {WAITS}", job.err(other), re.M), job.err()
        job.send(signal.SIGCONT, stopped)
        assert job.codes(stopped, timeout=END) == [1], "woken up, it finds that the others are gone"
        assert "Traceback" not in job.err()


def test_a_suspended_job_goes_on(home, tmp_path):
    """As schedulers do: all ranks stand still, for longer than a stall, and nobody is to blame."""
    with run(home, tmp_path) as job:
        job.reach("step     2/")
        for number in (signal.SIGSTOP, signal.SIGCONT):
            job.send(number)
            time.sleep(STALL + 2)
        assert job.running() == [0, 1], job.err()
        seen = len(job.out())
        time.sleep(2)
        assert len(job.out()) > seen and job.err() == ""


SLEEPS = """
from accessory.train import loop
def train_step(*_, real=loop.train_step, **options):
    if rank == 1 and loop._calls == 2:
        time.sleep(3600)
    loop._calls += 1
    return real(*_, **options)
loop._calls, loop.train_step = 0, train_step
"""


def test_a_stall_shows_where_each_rank_is(home, tmp_path):
    with run(home, tmp_path, plant=SLEEPS) as job:
        job.reach("step     2/")
        assert job.codes(0, 1, timeout=END) == [1, 1]
        (error,) = errors(job.err())
        assert f"no rank has made progress for {STALL} s" in error and "parallel.stall_timeout_s" in error
        assert re.search(
            rf"^accessory: rank 0 on {HOST}: step 3 of epoch \d, waits in all_reduce called by .* < train_step ",
            job.err(0),
            re.M,
        )
        assert re.search(
            rf"^accessory: rank 1 on {HOST}: step 3 of epoch \d, at _train \(accessory/train/loop.py", job.err(1), re.M
        )
        assert len(job.err().splitlines()) == 3, job.err()


SLOW = """
from accessory.train import loop
from accessory.parallel import watchdog
def train_step(*_, real=loop.train_step, **options):
    time.sleep(3 if rank else 0)
    return real(*_, **options)
loop.train_step = train_step
def save(*_, **__):
    for _ in range(7):
        time.sleep(rank == 0)
        watchdog.progressed()
loop.save_model = save
"""


def test_slow_is_not_dead(home, tmp_path):
    """Every step takes longer than a heartbeat, and the save longer than a stall."""
    with run(home, tmp_path, "train.max_steps=2", plant=SLOW) as job:
        assert job.codes(0, 1, timeout=90) == [0, 0], job.err()
        assert "accessory:" not in job.err()


FAILS = """
from accessory.train import loop
from accessory.errors import UserError
def train_step(*_, real=loop.train_step, **options):
    if rank == {rank} and loop._calls == 2:
        raise {error}("planted")
    loop._calls += 1
    return real(*_, **options)
loop._calls, loop.train_step = 0, train_step
"""


@pytest.mark.parametrize("error, rank", [("UserError", 1), ("KeyError", 0)])
def test_only_the_rank_that_fails_speaks(home, tmp_path, error, rank):
    with run(home, tmp_path, plant=SLOW_TO_HEAR + FAILS.format(rank=rank, error=error)) as job:
        assert job.codes(0, 1, timeout=60) == [1, 1]
        assert job.err(1 - rank) == "" and "planted" in job.err(rank), job.err()
        if error == "UserError":
            assert len(job.err().splitlines()) == 1, job.err()


SPOILT = """
import json
from accessory.train import loop
def train_step(model, optimizer, micro_batches, *more, real=loop.train_step, **options):
    if rank == 1 and loop._calls == 1:
        (weight,) = (p for name, p in model.named_parameters() if name == "layers.0.attention.wq.weight")
        lines = [f"talks.jsonl:{{key % 40 + 1}}" for key in micro_batches[1].sample_keys.tolist()]
        open("{records}", "w").write(json.dumps(lines))
        {fault}
    loop._calls += 1
    return real(model, optimizer, micro_batches, *more, **options)
loop._calls, loop.train_step = 0, train_step
"""
CUT = "parallel.model_parallel=2"
SPOIL = {  # how the run is cut; what is spoilt on rank 1; what is said; which (ranks, micro-batch) are blamed
    "loss": (
        "parallel.model_parallel=1",
        "model.register_forward_hook(lambda _, args, out: "
        "(out[0] * (float('inf') if args[0].tokens is micro_batches[1].tokens else 1.0), out[1]))",
        "the loss of 1 of 4 micro-batches is not finite; no weight was changed. Look at their records ({shown} and 1 more;",
        [([1], 1)],
    ),
    "weight": (
        CUT,
        "weight.data[0, 0] = float('nan')",
        "the loss of all 2 micro-batches is not finite",
        [([0, 1], 0), ([0, 1], 1)],
    ),
    "gradient": (
        CUT,
        "weight.register_hook(lambda g: g * float('inf'))",
        "every loss is finite, but the gradient is not",
        [],
    ),
}


@pytest.mark.parametrize("kind", SPOIL)
def test_what_is_not_finite_stops_all_and_names_its_records(home, tmp_path, kind):
    cut, fault, sentence, blamed = SPOIL[kind]
    words = [cut, "train.batch_size=5", "train.accumulation=2", "train.balance=document", "data.validation=0"]
    with run(home, tmp_path, *words, plant=SPOILT.format(records=tmp_path / "records", fault=fault)) as job:
        assert job.codes(0, 1, timeout=60) == [1, 1]
        records = [f"{home}/{record}" for record in json.loads((tmp_path / "records").read_text())]
        (error,) = errors(job.err())
        assert "step 2 of epoch 0: " + sentence.format(shown=", ".join(records[:4])) in error, job.err()
        assert len(job.err().splitlines()) == 1 and len(error) < 800
        told = json.loads((tmp_path / "run/non_finite.json").read_text())
        assert told["step"] == 2
        parts = told["micro_batches"]
        assert [(part["ranks"], part["micro_batch"]) for part in parts if not part["loss_is_finite"]] == blamed
        (part,) = (part for part in parts if 1 in part["ranks"] and part["micro_batch"] == 1)
        assert part["records"] == records
        everything = [record for part in parts for record in part["records"]]
        assert len(set(everything)) == len(everything) == (20 if kind == "loss" else 10), "every part of the step is there"
