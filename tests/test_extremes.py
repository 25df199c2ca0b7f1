"""Extreme routing and nearly empty batches: no hang, no NaN, and still the numbers of one plain process."""

import functools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from models import (
    OPTIM,
    TINY,
    WORDS,
    Tensors,
    assemble,
    build,
    check_close,
    make_tokenizer,
    mesh_for,
    samples,
    train,
    train_in_one_process,
    weights,
)
from ranks import run_ranks

from accessory.certify import harness, reference
from accessory.data.loader import collate
from accessory.data.mix import Sample
from accessory.model.head import LossSum
from accessory.parallel.launch import Launch
from accessory.settings import Recompute, RunConfig
from accessory.train.loop import finetune

LAYOUTS = ("mixtral", "mixtral_sparse")
PARTITIONS = {1: [(1, "fsdp")], 2: [(2, "fsdp"), (1, "fsdp"), (1, "ddp")]}  # world: (model parallel, data parallel)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny operations on several threads spin for a hundred times as long when another process wants the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def plain():
    return weights()


def routed_to(first, second):
    """Weights that send every token to the same two experts: one dimension of the residual stream stays as it is."""
    w = {name: tensor.clone() for name, tensor in plain().items()}
    w["tok_embeddings.weight"][:, 0] = 2.0
    for n in range(TINY.n_layers):
        gate = w[f"layers.{n}.feed_forward.gate.weight"]
        gate *= 0.01
        gate[:, 0] = -8.0
        gate[first, 0], gate[second, 0] = 8.0, 6.0
        w[f"layers.{n}.attention.wo.weight"][0] = 0.0
        w[f"layers.{n}.feed_forward.experts.w2"][:, 0] = 0.0
    return w


def saturated():
    """As above, with probabilities that are exactly one and zero."""
    w = routed_to(6, 7)
    for n in range(TINY.n_layers):
        w[f"layers.{n}.feed_forward.gate.weight"][:, 0] *= 1000
    return w


def untrained(samples):
    return [Sample(s.tokens, [False] * len(s.tokens)) for s in samples]


def longer(samples):
    """Sequences longer than any other here, so that they come last in a global batch."""
    return [Sample(s.tokens + [1] * 14, s.trained + [True] * 14) for s in samples]


@functools.cache
def cases():
    """{name: (weights, global batches, accumulation)}"""
    return {
        "all to experts 0 and 1": (routed_to(0, 1), [samples(6, 1), samples(6, 2)], 2),
        "all to experts 7 and 6": (routed_to(7, 6), [samples(6, 1), samples(6, 2)], 1),
        "saturated router": (saturated(), [samples(6, 1), samples(6, 2)], 2),
        "micro-batch without a target": (plain(), [untrained(samples(4, 1)) + longer(samples(4, 2)), samples(8, 3)], 2),
        "fewer sequences than ranks": (plain(), [samples(1, 1), samples(4, 2), samples(1, 3)], 1),
        "fewer sequences than micro-batches": (plain(), [samples(1, 1), samples(1, 2)], 3),
    }


EMPTY_ROWS = ("fewer sequences than ranks", "fewer sequences than micro-batches")
NO_TARGETS = [untrained(samples(4, 1)), samples(4, 2)]


def train_on(part, w, batches, accumulation, *, args=TINY, balance="global", **options):
    return train(args, *part, batches, w=w, accumulation=accumulation, balance=balance, **options)


def partitions(world):
    return [(layout, mp, mode) for mp, mode in PARTITIONS[world] for layout in LAYOUTS]


BALANCES = ("global", "document")


def run_cases(world):
    results = {}
    for part in partitions(world):
        for name, (w, batches, accumulation) in cases().items():
            if part[-1] == "ddp" and name not in EMPTY_ROWS:
                continue  # routing does not meet the way gradients are kept
            for balance in BALANCES if name in EMPTY_ROWS else BALANCES[:1]:
                results[*part, balance, name] = train_on(part, w, batches, accumulation, balance=balance)
    return results


def without_targets(world):
    """A global batch without any target, with a balance loss and without."""
    silent, results = replace(TINY, load_balancing_weight=0.0), {}
    for part in partitions(world):
        results[part] = (
            train_on(part, plain(), NO_TARGETS, 2),
            train_on(part, plain(), NO_TARGETS[:1], 2, args=silent, z_weight=0.0),
            train_on(part, plain(), NO_TARGETS, 1, balance="document"),
        )
    return results


def loss_and_gradients(layout, mp, mode, dtype, compute, recompute):
    mesh = mesh_for(mp, mode)
    model = build(TINY, layout, Tensors(plain()), mesh=mesh, mode=mode, dtype=dtype, compute=compute, recompute=recompute)
    batch = collate(samples(6, 4))
    loss, stats = model(batch.inputs(), LossSum(batch.targets))
    (loss + stats.probs.square().sum()).backward()
    gradients = {name: tensor for name, (_, tensor) in harness.gradients(model).items()}
    return {"loss": loss.detach(), "counts": stats.counts, "probs": stats.probs.detach()} | gradients


def recompute_differences(world):
    """{partition, dtype: names of what is not bitwise the same}"""
    results = {}
    for part in partitions(world)[:4]:
        for dtype, compute in ((torch.float64, None), (torch.float32, torch.bfloat16)):
            kept, *again = (loss_and_gradients(*part, dtype, compute, recompute) for recompute in get_args(Recompute))
            assert len(kept) == 3 + len(plain())
            results[*part, compute or dtype] = [
                name for name, tensor in kept.items() if not all(torch.equal(tensor, some[name]) for some in again)
            ]
    return results


def learn(world):
    """Losses over twenty steps on one batch; fp32 in one process only, to save time."""
    results, args = {}, replace(TINY, n_layers=1)
    w = {name: t / 2 if t.dim() > 1 else t for name, t in plain().items() if not name.startswith("layers.1.")}
    for part in partitions(world)[:4]:
        for compute in (torch.bfloat16, torch.float32)[: 3 - world]:
            options = {"args": args, "dtype": torch.float32, "compute": compute, "optim": replace(OPTIM, lr=3e-3)}
            result = train_on(part, w, [samples(4, 5)] * 20, 1, **options)
            assert all(math.isfinite(step["norm"]) for step in result["steps"])
            results[*part, compute] = [step["loss"] for step in result["steps"]]
    return results


def run_world(world):
    return {part.__name__: part(world) for part in (run_cases, without_targets, recompute_differences, learn)}


@pytest.fixture(scope="module")
def worlds():
    """{world: what each rank returned}"""
    return {world: run_ranks(world, run_world, world) for world in PARTITIONS}


@pytest.fixture(scope="module")
def expected():
    """{case, balance: (weights, norms, and counts and loss of the first step) of the plain reference}"""
    results = {}
    for name, (w, batches, _) in cases().items():
        pairs = [[(s.tokens, s.trained) for s in batch] for batch in batches]
        counts = sum(route_counts(w, s.tokens) for s in batches[0])
        for balance in BALANCES:
            trained, _, norms = train_in_one_process(w, batches, balance=balance)
            loss = reference.loss(w, TINY, pairs[0], balance).item()
            results[name, balance] = trained, norms, counts, loss
    return results


def route_counts(w, tokens):
    """Rows of each expert [L, E] in one sequence."""
    chosen = reference.forward(w, TINY, torch.tensor(tokens))[2]
    return torch.nn.functional.one_hot(chosen, TINY.moe.num_experts).sum((1, 2))


@pytest.mark.parametrize("world", PARTITIONS)
def test_extremes_equal_one_process(world, worlds, expected):
    ranks = [rank["run_cases"] for rank in worlds[world]]
    for key in ranks[0]:
        balance, name = key[-2:]
        trained, norms, counts, loss = expected[name, balance]
        parts = [rank[key] for rank in ranks]
        steps = parts[0]["steps"]
        training_loss = steps[0]["loss"] + TINY.load_balancing_weight * steps[0]["balance"] + 0.01 * steps[0]["z-loss"]
        assert training_loss == pytest.approx(loss, rel=1e-10), key
        assert [s["norm"] for s in steps] == pytest.approx(norms, rel=1e-9), key
        for step, batch in zip(steps, cases()[name][1], strict=True):
            tokens = sum(len(s.tokens) for s in batch)
            assert step["tokens"] == tokens and step["targets"] == sum(sum(s.trained[1:]) for s in batch), key
            assert (step["counts"].sum(1) == tokens * TINY.moe.num_experts_per_tok).all(), key
        if name != "saturated router":  # there all but one expert are as unlikely, and any may be second
            assert torch.equal(steps[0]["counts"], counts), key
        check_close(assemble([part["weights"] for part in parts]), trained, 1e-9, key)


def test_the_cases_are_as_extreme_as_they_say(worlds):
    results = [rank["run_cases"] for rank in worlds[2]]
    for name, experts in (("all to experts 0 and 1", [0, 1]), ("all to experts 7 and 6", [6, 7])):
        for step in results[0]["mixtral", 2, "fsdp", "global", name]["steps"]:
            assert step["counts"].sum(0).nonzero().flatten().tolist() == experts


def test_the_batches_are_as_empty_as_they_say():
    def counts(name, ranks=1):
        _, batches, accumulation = cases()[name]
        cut = [harness.micro_batches(batches[0], accumulation, rank, ranks) for rank in range(ranks)]
        return [[(batch.real_tokens > 0, batch.target_tokens > 0) for batch in mine] for mine in cut]

    assert counts("micro-batch without a target") == [[(True, False), (True, True)]]
    assert counts("fewer sequences than ranks", ranks=2) == [[(True, True)], [(False, False)]]
    assert counts("fewer sequences than micro-batches") == [[(True, True), (False, False), (False, False)]]


def test_a_whole_batch_without_targets(worlds):
    one = worlds[1][0]["without_targets"]["mixtral", 1, "fsdp"]
    for ranks in worlds.values():
        for key in ranks[0]["without_targets"]:
            balanced, silent, document = ([rank["without_targets"][key][i] for rank in ranks] for i in range(3))
            for parts, same in ((balanced, one[0]), (document, one[2])):
                norms = [step["norm"] for step in parts[0]["steps"]]
                assert norms[0] > 0, key
                assert norms == pytest.approx([step["norm"] for step in same["steps"]], rel=1e-9), key
            assert silent[0]["steps"][0]["loss"] == 0 and silent[0]["steps"][0]["norm"] == 0
            for name, tensor in assemble([part["weights"] for part in silent]).items():
                decay = 1 - OPTIM.lr * OPTIM.weight_decay if tensor.dim() > 1 else 1.0
                torch.testing.assert_close(tensor, plain()[name] * decay, rtol=1e-14, atol=0)


@pytest.mark.parametrize("world", PARTITIONS)
def test_recompute_changes_no_bit(world, worlds):
    for rank in worlds[world]:
        assert not any(rank["recompute_differences"].values()), rank["recompute_differences"]


@pytest.mark.parametrize("world", PARTITIONS)
def test_narrow_precisions_learn_one_batch(world, worlds):
    for rank in worlds[world]:
        for key, curve in rank["learn"].items():
            assert all(math.isfinite(loss) for loss in curve), key
            assert curve[-1] < 0.7 * curve[0], (key, curve)


FEW = {  # settings: three records to train on and one held out, so that at world 3 most ranks have nothing
    "alone": [],
    "packed": ["data.packing=true", "train.accumulation=2"],
    "adapters": [
        "model.checkpoint={out}/alone/epoch1",
        "data.packing=true",
        "tuning.lora.rank=2",
        "tuning.lora.dropout=0.2",
    ],
}


def few_records(home, world):
    """{settings: what metrics.jsonl holds of each run}"""
    rank, results = dist.get_rank(), {}
    out = home / f"world{world}"
    for name, words in FEW.items():
        words = [word.format(out=out) for word in words]
        config = RunConfig.load(home / "run.yaml", [*words, f"out={out}/{name}", f"train.batch_size={6 // world}"])
        finetune(config, Launch(rank, world, rank, world))
        dist.barrier()
        results[name] = [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]
    return results


def test_runs_of_fewer_records_than_ranks(tmp_path):
    """Training, validation, packing and adapters: the same numbers, whatever the number of ranks that have no record."""
    talks = [[("human", " ".join(WORDS[:n])), ("gpt", " ".join(WORDS[-n:]))] for n in (2, 7, 3, 9)]
    records = [{"conversations": [{"from": who, "value": text} for who, text in talk]} for talk in talks]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "mix.yaml").write_text("META: [{path: talks.jsonl}]")
    make_tokenizer(tmp_path / "tokenizer.model")
    args = replace(TINY, vocab_size=300, max_seq_len=1024, sliding_window=None)
    (tmp_path / "model.json").write_text(json.dumps(asdict(args)))
    (tmp_path / "run.yaml").write_text(
        f"""
model: {{layout: mixtral, config: {tmp_path}/model.json, tokenizer: {tmp_path}/tokenizer.model}}
data: {{mix: {tmp_path}/mix.yaml, validation: 0.25}}
parallel: {{precision: fp64}}
optim: {{lr: 1.0e-3, warmup_epochs: 0}}
train: {{epochs: 2}}
log: {{every: 1, tensorboard: false}}
"""
    )
    one, three = (run_ranks(world, few_records, tmp_path, world)[0] for world in (1, 3))
    for name in FEW:
        assert [row["step"] for row in one[name]] == [row["step"] for row in three[name]] == [0, 1, 1, 2, 2], name
        for a, b in zip(one[name], three[name], strict=True):
            for key in {"loss", "balance", "grad_norm", "val_loss"} & a.keys():
                assert a[key] == pytest.approx(b[key], rel=1e-9), (name, a["step"], key)
            assert a.get("loads") == b.get("loads") and a.get("targets") == b.get("targets"), name
