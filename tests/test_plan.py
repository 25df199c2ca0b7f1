"""The planner: what it counts of a step is what a real one does, and at full size it is what is promised of it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from jobs import command
from models import TINY
from ranks import run_ranks

from accessory.checkpoint.description import load_args
from accessory.model.logical import LogicalModel
from accessory.model.memory import footprint
from accessory.model.moe.layouts import EXPERT, SPARSE
from accessory.model.visual import VisualArgs
from accessory.parallel.mesh import plan_mesh
from accessory.settings import LoraSection, OptimSection, ParallelSection, TuningSection
from accessory.train.cards import CARDS, card_of
from accessory.train.optim import make_optimizer
from accessory.train.planned_step import PlannedRun, planned_job
from accessory.train.planner import Choice, link_rate, step_seconds
from accessory.train.trace import Collective, Figure, Figures, Trace, follow_step, total
from accessory.tuning.spec import resolve

MIXTRAL = load_args(Path(__file__).parents[1] / "configs/model/mixtral-8x7b.json")
SMALL = dataclasses.replace(TINY, dim=128, hidden_dim=256, head_dim=16, vocab_size=512, n_layers=3, sliding_window=None)
FULL, LORA = TuningSection(), TuningSection(lora=LoraSection(rank=8))


def cut(mp=1, mode="fsdp", recompute="block", shard_size=None):
    return ParallelSection(mp, mode, shard_size, recompute=recompute)


def small(tuning, layout, parallel, accumulation, **changes):
    return PlannedRun(
        dataclasses.replace(SMALL, **changes), tuning, layout, parallel, 2, accumulation, 64, "grouped", on_gpu=False
    )


RUNS = {
    2: [
        small(FULL, "mixtral", cut(mode="sdp", recompute="norms_and_experts"), 2),
        small(LORA, "mixtral_sparse", cut(2), 2),
    ],
    4: [
        small(FULL, "mixtral_sparse", cut(2), 2),
        small(FULL, "mixtral", cut(shard_size=2, recompute="none"), 1),
    ],
}


def really(runs):
    """The figures of this rank's real steps."""
    found = []
    for run in runs:
        model = run.model_without_weights()
        with Trace() as trace:
            model.to_empty(device="cpu")
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0.0, 0.02)
            optimizer = make_optimizer(model, OptimSection())
            follow_step(trace, model, optimizer, [run.batch()])
            found.append(follow_step(trace, model, optimizer, [run.batch()] * run.accumulation))
    return found


@pytest.fixture(scope="module", autouse=True)
def no_group():
    """What other tests have left in this process."""
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("world", RUNS)
def test_what_is_counted_is_what_a_real_step_does(world):
    with planned_job(world):
        planned = [run.figures() for run in RUNS[world]]
    for found in run_ranks(world, really, RUNS[world], timeout=240):
        for run, plan, real in zip(RUNS[world], planned, found, strict=True):
            for name in {*plan, *real}:
                if name.what in ("collectives", "sent", "flops"):
                    assert plan[name] == real[name], (run, name)
            assert plan[Figure("state")] == pytest.approx(real[Figure("state")], rel=0.001), run
            assert total(real, "collectives") > 0
            assert plan[Figure("peak")] == pytest.approx(real[Figure("peak")], rel=0.05), run


def test_a_deeper_model_is_no_surprise():
    """Five layers and four micro-batches, on the lines through fewer and as they are."""
    deeper = dataclasses.replace(MIXTRAL, n_layers=5)
    run = PlannedRun(deeper, FULL, "mixtral", cut(mode="sdp", recompute="norms_and_experts"), 1, 4, 512)
    with planned_job(2):
        assert run.figures() == pytest.approx(run.traced())


@pytest.fixture(scope="module")
def full_size():
    """Figures of Mixtral 8x7B on 32 ranks, by what is cut how."""
    runs = {
        "fsdp": PlannedRun(MIXTRAL, FULL, "mixtral", cut(), 4, 2, 4096),
        "sdp": PlannedRun(MIXTRAL, FULL, "mixtral", cut(mode="sdp", recompute="none"), 4, 2, 4096),
        "once": PlannedRun(MIXTRAL, FULL, "mixtral_sparse", cut(8, "sdp"), 4, 2, 4096),
    }
    with planned_job(32):
        return {name: run.figures() for name, run in runs.items()}


def test_promises_at_full_size(full_size):
    layers = MIXTRAL.n_layers
    for name, mp, each in (("fsdp", 1, 2), ("sdp", 1, 1), ("once", 8, 1)):
        figures, ranks = full_size[name], 32 // mp
        count = {
            kind: figures[Figure("collectives", Collective(kind, ranks, mp))] for kind in ("all-gather", "reduce-scatter")
        }
        micro_batches = 2 if name == "fsdp" else 1
        # a block's, once or for forward and backward; beside them the routers', together, and what is no block
        assert count["all-gather"] == micro_batches * (each * layers + 2), name
        assert count["reduce-scatter"] == micro_batches * (layers + 2), name
        assert figures[Figure("waits")] == 1, "whether the norm is finite"
    # forward 3, backward 6 and, where blocks run again, their two up projections alone
    assert full_size["sdp"][Figure("ran", "aten._grouped_mm")] == 2 * layers * 9
    assert full_size["fsdp"][Figure("ran", "aten._grouped_mm")] == 2 * layers * 11
    assert full_size["fsdp"][Figure("ran", "aten.topk")] == 2 * layers, "experts are chosen once"


def test_flops_are_those_of_the_model(full_size):
    """Without recompute, of a causal document; the router and the norms are no more than a hundredth."""
    expected = MIXTRAL.train_flops_per_token(4096) * 8 * 4096
    assert total(full_size["sdp"], "flops") == pytest.approx(expected, rel=0.02)
    again = total(full_size["fsdp"], "flops") - total(full_size["sdp"], "flops")  # all of a forward but w2, wo and the head
    assert 0.18 < again / expected < 0.25


def told_at_once(logical, layout, mesh, parallel, trains, tokens, accumulation):
    run = {"trains": trains, "tokens": tokens, "accumulation": accumulation}
    return footprint(logical, layout, mesh, parallel, compute=torch.bfloat16, device_type="cuda", **run)


def test_what_is_told_at_once_is_near_what_is_counted(full_size):
    """``footprint``, which a run and its --dry-run tell without tracing anything."""
    logical = LogicalModel(MIXTRAL)
    for name, layout, parallel in (("fsdp", EXPERT, cut()), ("once", SPARSE, cut(8, "sdp"))):
        mesh = plan_mesh(32, parallel.model_parallel)
        told = told_at_once(logical, layout, mesh, parallel, set(logical.shapes), 4 * 4096, 2)
        assert told.total == pytest.approx(full_size[name][Figure("peak")], rel=0.15), name


def test_what_is_told_of_8x22b_is_near_what_is_counted():
    """Each half of its table in docs/scale.md: so what the formula says does not fit by far does not."""
    args = load_args(Path(__file__).parents[1] / "configs/model/mixtral-8x22b.json")
    for tuning, world, recompute, rows in ((FULL, 64, "block", 4), (LORA, 8, "norms_and_experts", 1)):
        parallel, trained = cut(2, recompute=recompute), resolve(tuning, args)
        mesh, accumulation = plan_mesh(world, 2), 1 if tuning is FULL else 2
        with planned_job(world):
            run = PlannedRun(args, tuning, "mixtral_sparse", parallel, rows, accumulation, 4096)
            peak = run.figures()[Figure("peak")]
        told = told_at_once(trained.logical, SPARSE, mesh, parallel, trained.trains, rows * 4096, accumulation)
        assert told.total == pytest.approx(peak, rel=0.15)


def test_seconds_are_those_worked_by_hand():
    card = dataclasses.replace(
        CARDS["a100-80"], flops=1e14, memory_rate=1e12, link=1e11, network=1e10, products=0.5, elementwise=0.5
    )
    inside, gathered = Collective("all-reduce", 8, 1), Collective("all-gather", 4, 8)
    figures = Figures(
        {
            Figure("flops", "aten.mm"): 1e14,
            Figure("flops", "aten._grouped_mm"): 2e14,
            Figure("moved"): 1e12,
            Figure("collectives", inside): 10,
            Figure("sent", inside): 1e11,
            Figure("collectives", gathered): 100,
            Figure("sent", gathered): 5e11,
        }
    )
    run = PlannedRun(MIXTRAL, FULL, "mixtral", cut(8), 1, 1, 4096)
    seconds = step_seconds(figures, run, card, per_node=8, world=32)
    assert seconds["products"] == pytest.approx((3e14 + 0.35 * 2e14) / 0.5e14)
    assert seconds["elementwise"] == pytest.approx(2.0)
    assert seconds["model parallel"] == pytest.approx(1.0 + 10 * 20e-6)
    assert seconds["data parallel"] == pytest.approx(50.002 - 0.85 * (7.4 + 2.0))  # more than there is to hide it behind
    assert link_rate(inside, card, 8) == 1e11 and link_rate(gathered, card, 8) == 1e10
    assert link_rate(Collective("all-gather", 32, 1), card, 8) == 8e10, "a ring leaves a node once for all of its ranks"
    assert inside.sent(8e9) == 14e9 and gathered.sent(8e9) == 6e9
    needs = Choice(run, Figures({Figure("state"): 1e10, Figure("peak"): 3e10}), seconds).memory
    assert needs == {"state": 1e10, "step": 2e10, "overhead": 4e9}
    seeing = dataclasses.replace(run, args=dataclasses.replace(MIXTRAL, visual=VisualArgs("ens")))
    needs = Choice(seeing, Figures({Figure("state"): 1e10, Figure("peak"): 3e10}), seconds).memory
    # BLIP-2's, of CLIP what sees, ConvNeXt, and DINOv2 without its mask token
    assert needs["state"] == 1e10 + 2 * (1_091_114_496 + 303_966_208 + 843_398_016 + 1_136_479_232)


def test_cards_are_known_by_their_own_names():
    names = {"NVIDIA H100 PCIe": "h100-pcie", "NVIDIA H100 NVL": "h100-nvl", "NVIDIA H100 80GB HBM3": "h100"}
    names |= {"NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100-80", "NVIDIA H200": "h200"}
    assert {name: card_of(name)[0] for name in names} == names
    assert card_of("Tesla V100") is None


def test_the_command_names_the_best(tmp_path):
    words = ("plan", "configs/model/tiny.json", "--seq-len", "64", "--rows", "4")
    codes, out, err = command(*words, "--card", "h100")
    assert codes == [0] and not err, err
    ways, fitting = map(int, re.match(r"(\d+) ways, (\d+) fit into 79 GiB; times are estimates, \+-20 %", out).groups())
    assert ways == fitting == out.count(" yes ") == 3
    assert re.search(r"\n1\. products .* s, attention .*\n   model: .*\n   parallel: \{model_parallel: .*\n   train: ", out)
    codes, out, err = command(*words, "--card", "t4", "--tuning", "none")
    assert codes == [0] and "8 of 8: weights" in out and "computed, not measured" in out, err
    codes, out, err = command(*words, "--card", "h1000")
    assert codes == [1] and err == "accessory: error: --card: unknown card 'h1000'; did you mean 'h100'?\n", err
    codes, out, err = command(*words, "--card", "h100", "--gpus", "3")
    assert codes == [1] and "--rows 4 is no multiple of --gpus 3" in err


def the_fastest(*words):
    """What is said of it."""
    codes, out, err = command("plan", *words, "--rows", 4, "--card", "h100")
    assert codes == [0], err
    return out.splitlines()[2].split()


def test_a_row_is_as_long_as_is_said(tmp_path):
    """Also beyond what the model was made for, as a run's is; and what is quantised already is planned as it is."""
    config = json.loads(Path("configs/model/tiny.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"max_seq_len": 64}))
    tokens = {}
    for name, words in {"made for": (), "64": ("--seq-len", 64), "256": ("--seq-len", 256)}.items():
        tokens[name] = float(the_fastest(path, *words)[-1].replace(",", ""))  # a second: launches take nearly all of it
    assert tokens["made for"] == tokens["64"] and tokens["256"] > 3 * tokens["64"]
    path.write_text(json.dumps(config | {"dim": 48, "quantise": {"experts": "nf4-16", "attention": None}}))
    assert the_fastest(path, "--tuning", "qlora") == the_fastest(path, "--tuning", "lora")
