"""Adapters, and choosing what trains: the same numbers in every layout and parallel size, and nothing else changes."""

import math

import pytest
import torch
import torch.distributed as dist
from models import (
    OPTIM,
    TINY,
    Tensors,
    answer_ids,
    assemble,
    build,
    check_close,
    mesh_for,
    samples,
    train,
    train_in_one_process,
    weights,
)
from ranks import run_ranks
from torch._subclasses import FakeTensorMode

from accessory.certify import harness, reference
from accessory.data.loader import BatchPlan
from accessory.data.packing import Rows
from accessory.errors import UserError
from accessory.model.adapter import ONE_ADAPTER, Adapter, dropout_draws, dropped
from accessory.model.logical import LogicalModel
from accessory.model.moe.dispatch import SortedRows, make_plan
from accessory.model.moe.experts import GroupedExperts
from accessory.model.moe.layouts import get_layout
from accessory.parallel.mesh import ONE_RANK, local_part, make_mesh
from accessory.settings import LoraSection, TuningSection
from accessory.train.balance import RouterLosses
from accessory.train.objective import NextToken
from accessory.train.optim import make_optimizer
from accessory.train.step import train_step
from accessory.train.trace import Trace
from accessory.tuning.spec import resolve
from accessory.tuning.watch import watch_adapters

STEPS = [samples(6, seed=1, longest=10), samples(5, seed=2, longest=10)]
LAYOUTS = ("mixtral", "mixtral_sparse")
PARTITIONS = {  # world size: (model parallel, data parallel mode)
    1: [(1, "fsdp")],
    2: [(2, "fsdp"), (1, "fsdp"), (1, "sdp"), (1, "ddp")],
    4: [(4, "fsdp"), (2, "fsdp")],
    8: [(4, "fsdp")],
}
RECOMPUTE = {"mixtral": "norms_and_experts", "mixtral_sparse": "block"}
ALL_TARGETS = ("attention", "experts", "router", "embeddings", "output")
EVERYTHING = TuningSection(lora=LoraSection(rank=3, alpha=2.0, targets=ALL_TARGETS), bias=True, train=("norms",))


def tuning(section):
    """What ``section`` means for the tiny model, as arguments of build_model."""
    spec = resolve(section, TINY)
    return {"adapters": spec.logical.adapters, "trains": spec.trains}


def run_all(partitions, section):
    return [
        train(TINY, layout, mp, mode, STEPS, accumulation=2, balance="global", recompute=recompute, **tuning(section))
        for layout, mp, mode, recompute in partitions
    ]


@pytest.fixture(scope="module")
def one_process():
    """(weights, gradients, norms) of the plain reference."""
    spec = tuning(EVERYTHING)
    start = weights(adapters=spec["adapters"])
    return train_in_one_process(start, STEPS, balance="global", trains=spec["trains"], scaling=2 / 3)


@pytest.mark.parametrize("world", PARTITIONS)
def test_adapters_equal_one_process(world, one_process):
    trained, gradients, norms = one_process
    assert min(norms) > OPTIM.clip_grad, "clipping must be on"
    adapters = tuning(EVERYTHING)["adapters"]
    start = weights(adapters=adapters)
    partitions = [(layout, mp, mode, RECOMPUTE[layout]) for mp, mode in PARTITIONS[world] for layout in LAYOUTS]
    ranks = run_ranks(world, run_all, partitions, EVERYTHING, timeout=240)
    for index, partition in enumerate(partitions):
        parts = [rank[index] for rank in ranks]
        for sample, logits in zip(STEPS[0], parts[-1]["logits"], strict=False):
            expected = reference.forward(start, TINY, torch.tensor(sample.tokens), scaling=2 / 3)[0]
            torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
        for step, norm in enumerate(norms):
            assert parts[0]["steps"][step]["norm"] == pytest.approx(norm, rel=1e-10), (partition, step)
        for what, expected in (("gradients", gradients), ("weights", trained)):
            full = assemble([part[what] for part in parts], adapters=adapters)
            assert what == "weights" or full.keys() == expected.keys(), "what is frozen has no gradient"
            check_close(full, expected, 1e-10, (partition, what))
        for name, tensor in full.items():  # weights
            assert name in trained or torch.equal(tensor, start[name]), f"{partition}: {name} is frozen but has changed"


def run_dropout(partitions, section):
    return [
        train(
            TINY,
            layout,
            mp,
            mode,
            STEPS,
            accumulation=accumulation,
            balance="global",
            recompute=recompute,
            **tuning(section),
        )
        for layout, mp, mode, accumulation, recompute in partitions
    ]


def test_dropout_does_not_depend_on_the_partition():
    section = TuningSection(lora=LoraSection(rank=3, dropout=0.4, targets=ALL_TARGETS))
    adapters = tuning(section)["adapters"]
    ((one, other),) = run_ranks(
        1, run_dropout, [("mixtral", 1, "fsdp", 1, "none"), ("mixtral_sparse", 1, "fsdp", 3, "block")], section
    )
    whole = assemble([one["weights"]], adapters=adapters)
    ((without,),) = run_ranks(
        1, run_dropout, [("mixtral", 1, "fsdp", 1, "none")], TuningSection(lora=LoraSection(rank=3, targets=ALL_TARGETS))
    )
    assert without["steps"][0]["loss"] != pytest.approx(one["steps"][0]["loss"], rel=1e-6), "nothing was dropped"
    torch.testing.assert_close(without["logits"], one["logits"], rtol=0, atol=0)  # never outside of training
    partitions = [
        ("mixtral", 2, "fsdp", 2, "block"),
        ("mixtral_sparse", 2, "fsdp", 1, "none"),
        ("mixtral", 1, "fsdp", 2, "norms_and_experts"),
    ]
    ranks = run_ranks(2, run_dropout, partitions, section)
    results = [[other]] + [[rank[index] for rank in ranks] for index in range(len(partitions))]
    for parts in results:
        for ours, expected in zip(parts[0]["steps"], one["steps"], strict=True):
            assert ours["norm"] == pytest.approx(expected["norm"], rel=1e-10)
        for name, tensor in assemble([part["weights"] for part in parts], adapters=adapters).items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-10, atol=1e-10)


def test_dropout_keeps_its_share_and_the_mean():
    adapter, other = Adapter(rank=1, dropout=0.3, seed=1), Adapter(rank=1, dropout=0.3, seed=2)
    dropout_draw = dropout_draws(torch.arange(20)[:, None], torch.arange(50)).flatten()
    x = dropped(torch.ones(1000, 200), adapter, dropout_draw)
    assert (x == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert x.mean().item() == pytest.approx(1.0, abs=0.01)
    for dim in (0, 1):  # no row and no column is dropped more than chance has it: 5 standard deviations
        share = (x == 0).float().mean(dim)
        assert (share - 0.3).abs().max() < 5 * (0.3 * 0.7 / x.shape[dim]) ** 0.5
    assert (x == 0).ne(dropped(torch.ones(1000, 200), other, dropout_draw) == 0).float().mean().item() == pytest.approx(
        0.42, abs=0.01
    )
    assert torch.equal(dropped(torch.ones(1000, 50), adapter, dropout_draw, first_column=100), x[:, 100:150])


def test_dropout_of_many_rows_takes_little_memory(monkeypatch):
    """Of w2's input for 4096 tokens of Mixtral 8x7B; and rows drawn a few at a time are those drawn together."""
    adapter = Adapter(rank=1, dropout=0.3, seed=1)
    with FakeTensorMode(), Trace() as trace:
        x, draws = torch.empty(8192, 14336, dtype=torch.bfloat16), torch.empty(8192, dtype=torch.int64)
        trace.reset()
        dropped(x, adapter, draws)
        assert trace.peak - x.nbytes < 3 * x.nbytes
    draws = dropout_draws(torch.zeros(70, dtype=torch.int64), torch.arange(70))
    together = dropped(torch.ones(70, 50), adapter, draws)
    monkeypatch.setattr("accessory.model.adapter.HASHED", 1000)
    assert torch.equal(dropped(torch.ones(70, 50), adapter, draws), together)


def generate(layout, mp, prompts, steps):
    mesh = make_mesh(mp)
    spec = tuning(EVERYTHING)
    model = build(TINY, layout, Tensors(weights(adapters=spec["adapters"])), mesh=mesh, **spec)
    return answer_ids(model, prompts, steps, 32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generation_has_every_adapter(layout):
    prompts = [sample.tokens for sample in STEPS[0][:2]]
    w, expected = weights(adapters=tuning(EVERYTHING)["adapters"]), []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(reference.forward(w, TINY, torch.tensor(tokens), scaling=2 / 3)[0][-1].argmax().item())
        expected.append(tokens[len(prompt) :])
    for tokens in run_ranks(2, generate, layout, 2, prompts, 6):
        assert tokens == expected


def run_mixed(mode, section, layout):
    """One step in bf16 over fp32 masters; bytes of this rank, and dtypes."""
    dp, rank = dist.get_world_size(), dist.get_rank()
    spec = tuning(section)
    source = Tensors(weights(adapters=spec["adapters"], dtype=torch.float32))
    model = build(
        TINY, layout, source, mesh=mesh_for(1, mode), mode=mode, dtype=torch.float32, compute=torch.bfloat16, **spec
    )
    before = {name: tensor.detach().clone() for name, (_, tensor) in harness.weights(model).items()}
    optimizer = make_optimizer(model, OPTIM)
    parameters = dict(model.named_parameters())
    seen = {}

    def count(*_):
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        seen["gradients"] = sum(local_part(g).nbytes for g in gradients)

    optimizer.register_step_pre_hook(count)
    micro_batches = harness.micro_batches(STEPS[0], 2, rank, dp)
    train_step(model, optimizer, micro_batches, NextToken(), RouterLosses("global"), clip_grad=1.0)
    state = [t for moments in optimizer.state.values() for name, t in moments.items() if name != "step"]
    seen["state"] = sum(local_part(t).nbytes for t in state)
    seen["dtypes"] = {name: p.dtype for name, p in parameters.items()}
    return seen | {"before": before, "after": harness.weights(model)}


def run_all_mixed(modes, section, layout):
    return [run_mixed(mode, section, layout) for mode in modes]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("world", "modes"), [(1, ["fsdp"]), (2, ["fsdp", "sdp", "ddp"])])
def test_frozen_in_bf16_and_only_adapters_have_gradients_and_state(world, modes, layout):
    spec = tuning(EVERYTHING)
    cuts = LogicalModel(TINY, spec["adapters"]).cuts(get_layout(layout))
    numbers = sum(math.prod(cuts[name].shape) for name in spec["trains"])
    ranks = run_ranks(world, run_all_mixed, modes, EVERYTHING, layout)
    for index, mode in enumerate(modes):
        parts = [rank[index] for rank in ranks]
        copies = world if mode == "ddp" else 1
        assert sum(p["gradients"] for p in parts) == copies * 4 * numbers
        assert sum(p["state"] for p in parts) == copies * 2 * 4 * numbers
        for name, dtype in parts[0]["dtypes"].items():
            whole = name in spec["trains"] or ".gate." in name  # the router is never rounded
            assert dtype == (torch.float32 if whole else torch.bfloat16), name
        for name, before in parts[0]["before"].items():
            assert torch.equal(before, parts[0]["after"][name][1]) == (name not in spec["trains"]), name


PARTS = {
    "full": (TuningSection(), lambda name: True),
    "frozen router": (TuningSection(freeze=("router",)), lambda name: ".gate." not in name),
    "experts but those of layer 0": (
        TuningSection(train=("experts",), freeze=(r"^layers\.0\.",)),
        lambda name: "layers.1.feed_forward.experts" in name,
    ),
    "norms": (TuningSection(train=("norms",)), lambda name: "norm" in name),
}


def run_parts(partitions, sections):
    return [run_all(partitions, section) for section in sections]


def test_parts_of_the_model_train_as_in_one_process():
    partitions = [("mixtral", 2, "fsdp", "block"), ("mixtral_sparse", 1, "fsdp", "none")]
    ranks = run_ranks(2, run_parts, partitions, [section for section, _ in PARTS.values()], timeout=240)
    for number, (section, trains) in enumerate(PARTS.values()):
        names = {name for name in weights() if trains(name)}
        assert tuning(section)["trains"] == names
        expected, *_ = train_in_one_process(weights(), STEPS, balance="global", trains=names)
        for index in range(len(partitions)):
            full = assemble([rank[number][index]["weights"] for rank in ranks])
            for name, tensor in (weights() | expected).items():
                torch.testing.assert_close(full[name], tensor, rtol=1e-10, atol=1e-10 if name in names else 0.0)


def run_watched(fault, mp, layout, fresh):
    """Three steps under watch with a planted fault; the error, and whether the watch still runs."""
    mesh = make_mesh(mp)
    dp, rank = mesh.dp.size, mesh.dp.rank
    spec = tuning(EVERYTHING)
    w = weights(adapters=spec["adapters"])
    if fresh:
        w |= {name: torch.zeros_like(t) for name, t in w.items() if name.endswith(("lora_b", "bias"))}
    model = build(TINY, layout, Tensors(w), mesh=mesh, **spec)
    fault(model)
    optimizer = make_optimizer(model, OPTIM)
    watch_adapters(model, optimizer, spec["trains"] - weights().keys())
    watching = []
    try:
        for batch in [*STEPS, STEPS[0]]:
            plan = BatchPlan(-(-len(batch) // dp), 1, rank, dp)
            (micro_batches,) = plan.epoch(batch, Rows.alone(range(len(batch))))
            train_step(model, optimizer, micro_batches, NextToken(), RouterLosses("global"), clip_grad=1.0)
            watching.append(bool(optimizer._optimizer_step_pre_hooks))
    except UserError as error:
        return str(error), watching
    return None, watching


def healthy(model):
    pass


def wq_goes_round(model):
    model.layers[1].attention.wq.low_rank = lambda *_: None


def bias_is_cut_off(model):
    model.layers[0].feed_forward.experts.w2_bias.register_hook(torch.zeros_like)


def zero_on_one_rank(model):
    if dist.get_rank() == 0:
        model.layers[0].feed_forward.experts.w1_lora_b.register_hook(torch.zeros_like)


def a_is_cut_off(model):
    model.layers[0].attention.wv.lora_a.register_hook(torch.zeros_like)


@pytest.mark.parametrize(
    ("fault", "fresh", "inert", "steps"),
    [
        (healthy, True, None, 3),
        (zero_on_one_rank, True, None, 3),
        (wq_goes_round, True, {"layers.1.attention.wq.lora_b"}, 0),
        (wq_goes_round, False, {"layers.1.attention.wq.lora_a", "layers.1.attention.wq.lora_b"}, 0),
        (bias_is_cut_off, True, {"layers.0.feed_forward.experts.w2_bias"}, 0),
        (a_is_cut_off, True, {"layers.0.attention.wv.lora_a"}, 1),  # its B was zero in the first step
    ],
)
def test_watch(fault, fresh, inert, steps):
    for error, watching in run_ranks(2, run_watched, fault, 2, "mixtral", fresh):
        assert watching == [True, False, False][:steps]
        assert (error is None) == (inert is None), error
        if inert:
            assert "never learn" in error and {w.rstrip(".,") for w in error.split() if "layers" in w} == inert


def test_what_an_adapter_is():
    spec = tuning(TuningSection(lora=LoraSection(rank=4, alpha=8.0, rslora=True, targets=("attention.w[qv]",)), bias=True))
    adapters = spec["adapters"]
    wq, wk = adapters["layers.0.attention.wq.weight"], adapters["layers.0.attention.wk.weight"]
    assert (wq.rank, wq.scaling, wq.bias) == (4, 4.0, True) and (wk.rank, wk.bias) == (0, True)
    plain = tuning(TuningSection(lora=LoraSection(rank=3)))["adapters"]["layers.0.attention.wq.weight"]
    assert (plain.rank, plain.scaling) == (3, 1.0), "alpha is the rank unless it is said"
    assert "layers.1.attention.wv.lora_b" in spec["trains"] and "layers.1.attention.wk.lora_b" not in spec["trains"]
    assert "layers.1.feed_forward.experts.w2_bias" in spec["trains"]
    assert "layers.1.attention.wq.weight" not in spec["trains"]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            TuningSection(lora=LoraSection(targets=("atention",))),
            "tuning.lora.targets: 'atention'.*did you mean 'attention'",
        ),
        (TuningSection(lora=LoraSection(targets=("norms",))), "tuning.lora.targets: 'norms' matches none"),
        (TuningSection(lora=LoraSection(targets=())), "tuning.lora.targets is empty"),
        (TuningSection(train=(r"layers\.7\.",)), "tuning.train: .* matches none"),
        (TuningSection(train=("experts(",)), "tuning.train: .* not a regular expression"),
        (TuningSection(freeze=("routers",)), "tuning.freeze: 'routers' matches none.*'router'"),
        (TuningSection(lora=LoraSection(), freeze=("router",)), "tuning.freeze: 'router' does not train anyway"),
        (TuningSection(train=("norms",), freeze=("norms",)), "tuning.train: all of 'norms' is frozen"),
        (TuningSection(train=("router", "experts"), freeze=("experts",)), "tuning.train: all of 'experts' is frozen"),
        (TuningSection(freeze=(".",)), "nothing to train"),
        (
            TuningSection(lora=LoraSection(), train=("experts",)),
            "layers.0.feed_forward.experts.w1, .* both itself and by LoRA",
        ),
    ],
)
def test_refused(section, words):
    with pytest.raises(UserError, match=words):
        resolve(section, TINY)


def run_no_rows(layout):
    experts = GroupedExperts(4, 16, 24, "auto", get_layout(layout).cut_dims, ONE_RANK.mp)
    for name in ("w1", "w2", "w3"):
        experts.adapt(name, Adapter(rank=2, bias=True))
    x, weight = torch.zeros(0, 16, requires_grad=True), torch.zeros(0, 1, requires_grad=True)
    nowhere = make_plan(torch.zeros(0, 2, dtype=torch.int64), range(4), 4)
    experts(SortedRows(x, weight, nowhere.ends_e, ONE_ADAPTER, nowhere)).sum().backward()
    return {name: p.grad for name, p in experts.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_rows_has_zero_gradients(layout):
    (gradients,) = run_ranks(1, run_no_rows, layout)
    assert len(gradients) == 12 and not any(g.any() for g in gradients.values())


def test_mixtral_peft_is_the_expert_layout():
    assert get_layout("mixtral_peft") is get_layout("mixtral")


def test_weight_decay_leaves_vectors_alone():
    """An expert's bias is a vector, though all experts' together are a matrix."""
    (decay,) = run_ranks(1, run_decay)
    assert decay and all(name.endswith(("lora_a", "lora_b")) for name in decay)


def run_decay():
    spec = tuning(EVERYTHING)
    model = build(TINY, "mixtral", Tensors(weights(adapters=spec["adapters"])), **spec)
    decaying = {id(p) for p in make_optimizer(model, OPTIM).param_groups[0]["params"]}
    return [name for name, p in model.named_parameters() if id(p) in decaying]
