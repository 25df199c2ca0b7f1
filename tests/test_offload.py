"""Experts that lie elsewhere than on the device: the same numbers, within the memory, and never a stale one."""

import json
import os
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake_device import FakeDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import command
from models import OPTIM, TINY, Tensors, answer_ids, check_close, evaluate, samples, weights
from prometheus_client import generate_latest
from ranks import run_ranks
from slips import make_home

from accessory.certify import harness
from accessory.certify.serving import Numbers
from accessory.checkpoint.quantise import Quantising
from accessory.errors import UserError
from accessory.infer.engine import Engine
from accessory.infer.metrics import Metrics
from accessory.infer.sampling import Sampling
from accessory.model.adapter import Adapter
from accessory.model.answering import GPU_PAGE, fits_of, in_pages, plan_answers
from accessory.model.build import build_model
from accessory.model.logical import LogicalModel
from accessory.model.memory import footprint
from accessory.model.moe.layouts import EXPERT, LAYOUTS, get_layout
from accessory.model.moe.offload import lane, records
from accessory.model.moe.offload.meter import told
from accessory.model.moe.offload.plan import plan_offload
from accessory.model.moe.offload.slots import Slots, in_turn
from accessory.parallel.mesh import ONE_RANK, make_mesh
from accessory.settings import OffloadSection, ParallelSection, QuantiseSection
from accessory.train.balance import RouterLosses
from accessory.train.objective import NextToken
from accessory.train.optim import make_optimizer
from accessory.train.step import train_step

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], list(range(20))]
FORMATS = {"fp32": None, "bf16": None, "nf4": QuantiseSection("nf4-8", "nf4-8"), "int8": QuantiseSection("int8", "int8")}
FORMATS["int4"] = QuantiseSection("int4-8", None)


def model_of(section, *, args=TINY, layout="mixtral", dtype=torch.float32, mesh=ONE_RANK, kernel="auto"):
    """One that answers; ``section``: of its offloading, or None."""
    logical = LogicalModel(args)
    source = Quantising(Tensors(weights(replace(args, quantise=None))), logical)
    plan = None
    if section:
        plan = plan_offload(section, logical, get_layout(layout), mesh.mp.size, dtype, 0.0, kernel)
    return build_model(
        logical,
        get_layout(layout),
        source,
        mesh=mesh,
        dtype=dtype,
        device=CPU,
        kernel=kernel,
        trains=frozenset(),
        offload=plan,
    )


@given(
    st.integers(1, 6),
    st.sampled_from(["lru", "frequency"]),
    st.lists(st.tuples(st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7), max_size=3), st.booleans()), max_size=30),
)
@settings(max_examples=100, deadline=None, database=None)
def test_slots_never_serve_a_stale_expert_nor_give_up_one_in_use(count, policy, batches):
    """On a device that does what it is told, in the slot of each expert that is used there is that expert."""
    slots, device, moved = Slots(count, policy), {}, 0

    def bring(places):
        nonlocal moved
        moved += len(places)
        for expert, slot in places:
            assert 0 <= slot < count
            device[slot] = expert

    for used, guess, fails in batches:
        slots.judge(used)
        known, before, seen, told = set(slots.slot_of), moved, [], []
        for expert in in_turn(slots, used, bring, lambda told=told: told.append(True)):
            seen.append(expert)
            assert device.get(slots.slot_of.get(expert)) == expert
            assert len(set(slots.slot_of.values())) == len(slots.slot_of) <= count
            if fails:
                slots.lose(expert)
                break
        else:  # each comes once, and none that was there makes room before it is used
            assert sorted(seen) == sorted(used) and moved - before == len(used - known) and len(told) == 1
        bring(slots.guess(guess))
    tally = slots.tally
    assert tally.moved == moved and tally.guessed_hits <= tally.hits <= tally.used and tally.right <= tally.guessed


def test_the_least_recent_or_the_least_frequent_makes_room():
    for policy, gone in (("lru", 1), ("frequency", 2)):
        slots = Slots(3, policy)
        for expert in (1, 1, 2, 1, 3, 3, 2, 3):
            slots.hold([expert])
            slots.release([expert])
        slots.hold([4])
        assert {1, 2, 3} - slots.slot_of.keys() == {gone}, policy
        slots = Slots(3, policy)
        slots.hold([1, 2])
        slots.release([1, 2])
        slots.guess([5])
        slots.hold([6])  # what a guess brought, and nothing has used, goes first
        assert slots.slot_of.keys() == {1, 2, 6}
        use(slots := Slots(2, policy), [2, 2, 2, 1])
        slots.hold([1])
        slots.hold([3])  # 1 is in use, however seldom
        assert slots.slot_of.keys() == {1, 3}


def use(slots, experts):
    """One after the other."""
    for expert in experts:
        slots.judge([expert])
        slots.hold([expert])
        slots.release([expert])


def test_what_was_used_often_long_ago_makes_room():
    slots = Slots(2, "frequency")
    use(slots, [*[1] * 40, *[2] * 30, 3])
    assert slots.slot_of.keys() == {2, 3}


def test_guesses_that_are_mostly_wrong_bring_nothing_until_they_are_right():
    slots = Slots(4)
    brought = []
    for named, used in [([1, 2], [3, 4])] * 10 + [([1, 2], [1, 2])] * 20:
        slots.lose(1) if 1 in slots.slot_of else None
        brought.append(len(slots.guess(named)) > 0)
        slots.judge(used)
    assert brought[0] and not brought[9] and brought[-1]
    assert slots.tally.right == 40 and slots.tally.guessed == 60  # judged all the same


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_are_those_of_a_model_that_has_all_its_experts(layout, name):
    """To the bit, by a kernel that takes experts one by one: which are on the device changes nothing."""
    args = replace(TINY, hidden_dim=32, quantise=FORMATS[name])
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    options = {"args": args, "layout": layout, "dtype": dtype, "kernel": "reference"}
    resident = model_of(None, **options)
    expected, logits = answer_ids(resident, PROMPTS, 10, 64), evaluate(resident, PROMPTS[2])
    for experts, policy, prefetch in ((2, "lru", "none"), (3, "frequency", "speculative"), (5, "lru", "speculative")):
        model = model_of(OffloadSection(experts, policy=policy, prefetch=prefetch), **options)
        before = [experts.store.rows.clone() for experts in model.offloaded]
        assert answer_ids(model, PROMPTS, 10, 64) == expected
        assert torch.equal(evaluate(model, PROMPTS[2]), logits)
        for layer, rows in zip(model.offloaded, before, strict=True):
            assert torch.equal(layer.store.rows, rows), "something was written back"
            assert layer.on_device.shape == (experts, layer.record.nbytes)
        tally = model.offloaded[1].slots.tally
        assert (tally.foretold > 0) <= (prefetch == "speculative") and (tally.right > 0 or experts < 5)
        assert "layer 1" in told(model.offloaded)


def answers_of_ranks(layout, section):
    model = model_of(section, layout=layout, dtype=torch.float64, mesh=make_mesh(2))
    return answer_ids(model, PROMPTS, 10, 64), [layer.count for layer in model.offloaded], model.offloaded[1].slots.tally


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_offloads_its_own(layout):
    expected = answer_ids(model_of(None, dtype=torch.float64), PROMPTS, 10, 64)
    for answers, counts, tally in run_ranks(2, answers_of_ranks, layout, OffloadSection(4)):
        assert answers == expected and counts == [4 if layout == "mixtral" else 8] * 2
        assert tally.right > 0


class Slow(records.HostStore):
    """What it copies is there late, and garbage before."""

    def read(self, expert, slot):
        slot.fill_(255)
        time.sleep(0.01)
        super().read(expert, slot)


def test_no_expert_is_used_before_it_has_come(monkeypatch):
    expected = evaluate(model_of(None), PROMPTS[2])
    monkeypatch.setattr("accessory.model.moe.offload.plan.HostStore", Slow)
    model = model_of(OffloadSection(3))
    torch.testing.assert_close(evaluate(model, PROMPTS[2]), expected, rtol=1e-5, atol=1e-5)
    assert answer_ids(model, PROMPTS[:1], 4, 64) == answer_ids(model_of(None), PROMPTS[:1], 4, 64)
    assert sum(layer.waited_s for layer in model.offloaded) > 0


def test_an_answer_stays_within_the_memory():
    """Weights, slots, cache and all that a step makes, on a device that has no more; one expert fewer would have fitted."""
    args = replace(TINY, dim=64, hidden_dim=512, max_seq_len=700, n_layers=3)
    logical, prompt = LogicalModel(args), [n % 61 for n in range(600)]  # more than a step takes
    for experts in (3, 6):
        slot_bytes = plan_answers(OffloadSection(experts), logical, EXPERT, 1, torch.float32, 700).slot_bytes
        enough = slot_bytes + room_beside(logical)
        plan = plan_answers(OffloadSection(device_memory=f"{enough}B"), logical, EXPERT, 1, torch.float32, 700)
        assert plan.slots == experts
        model = model_of(OffloadSection(experts), args=args)
        with FakeDevice(enough) as device:
            device.hold(model)
            answer = answer_within(model, prompt)
        assert answer == answer_within(model_of(None, args=args), prompt)
        assert device.peak > slot_bytes


def test_what_is_said_to_fit_does():
    """What ``inspect --fit`` and ``plan`` print: weights, cache and experts exactly, of a step no less than it takes."""
    args, prompt = replace(TINY, dim=64, hidden_dim=512, max_seq_len=700, n_layers=3), [n % 61 for n in range(600)]
    for way in fits_of(args, EXPERT, 1, 7.3e6, 700):
        model = model_of(OffloadSection(way.plan.slots), args=replace(args, quantise=way.quantise), dtype=torch.bfloat16)
        assert way.memory["experts"] == sum(layer.on_device.nbytes for layer in model.offloaded)
        assert way.memory["weights"] == sum(parameter.nbytes for parameter in model.parameters())
        assert way.memory["cache"] == (in_pages(700) + GPU_PAGE) // 16 * model.make_cache(1, 16).page_bytes
        one_more = way.memory["experts"] / way.plan.slots
        assert sum(way.memory.values()) <= 7.3e6, way
        assert way.plan.slots == way.plan.of or sum(way.memory.values()) > 7.3e6 - one_more, way
        with FakeDevice(sum(way.memory.values())) as device:
            device.hold(model)
            answer_within(model, prompt)
    assert "too little: " in str(next(fits_of(args, EXPERT, 1, 1e6, 700)))


def answer_within(model, prompt):
    """In the cache that is reckoned with."""
    engine = Engine(model, Numbers(model.args.vocab_size), max_seq_len=700, cache_tokens=in_pages(700))
    request = engine.submit(prompt, Sampling(max_tokens=8))
    list(engine.run())
    return request.answer


def room_beside(logical):
    """What ``plan_answers`` reckons with beside experts: the least memory that it does not refuse, less theirs."""
    low, high = 0, 10**9
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan = plan_answers(OffloadSection(device_memory=f"{middle}B"), logical, EXPERT, 1, torch.float32, 700)
            high, slot_bytes = middle, plan.slot_bytes
        except UserError:
            low = middle
    return high - slot_bytes


ADAPTER = Adapter(rank=3, scaling=0.5, dropout=0.1, bias=True)


@pytest.mark.parametrize("recompute", ["none", "norms_and_experts", "block"])
def test_training_brings_each_expert_twice_and_stays_within_the_memory(recompute):
    args = replace(TINY, dim=64, hidden_dim=256, n_layers=3)
    adapters = {name: ADAPTER for name in LogicalModel(args).matrices if "experts" in name or ".wq" in name}
    logical = LogicalModel(args, adapters)
    w = weights(args, adapters=adapters)
    results, peaks = [], []
    for section in (None, OffloadSection(2)):
        model = harness.build(
            logical, "mixtral", Tensors(w), recompute=recompute, trains=frozenset(logical.added), offload=section
        )
        optimizer, losses = make_optimizer(model, OPTIM), RouterLosses("document", 0.01)
        with FakeDevice(10**9) as device:
            device.hold(model)
            for seed in range(2):
                batches = harness.micro_batches(samples(4, seed, args), 2, 0, 1)
                train_step(model, optimizer, batches, NextToken(), losses, clip_grad=0.5)
        results.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
        peaks.append(device.peak)
    check_close(*reversed(results), 1e-11)
    for layer in model.offloaded:
        assert layer.slots.tally.used <= 2 * 2 * 2 * layer.count  # forward and backward, of two micro-batches, in two steps
        assert layer.slots.tally.moved <= layer.slots.tally.used
    spared = sum(layer.record.nbytes * (layer.count - layer.slots.count) for layer in model.offloaded)
    assert peaks[1] <= peaks[0] - 0.95 * spared
    tokens = 2 * 14  # of a micro-batch at most
    reckoned = footprint(
        *(logical, EXPERT, ONE_RANK, ParallelSection(recompute=recompute)),
        compute=torch.float64,
        trains=logical.added,
        tokens=tokens,
        accumulation=2,
        device_type="cpu",
        slot_bytes=sum(layer.on_device.nbytes for layer in model.offloaded),
    )
    assert peaks[1] <= reckoned.total  # with which a memory for training is compared


def test_a_disk_holds_them_and_what_is_wrong_with_it_is_said(tmp_path, monkeypatch):
    section = OffloadSection(3, disk=str(tmp_path))
    expected = answer_ids(model_of(None), PROMPTS, 10, 64)
    model = model_of(section)
    assert answer_ids(model, PROMPTS, 10, 64) == expected
    assert not list(tmp_path.iterdir())

    def fails(*_):
        raise OSError(5, "Input/output error")

    for preadv, sentence in (
        (fails, "cannot be read back from .*Input/output error"),
        (lambda *_: 0, "ends .* bytes too early"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", preadv)
            with pytest.raises(UserError, match=sentence):
                answer_ids(model, [[30, 31, 32, 33, 34]], 20, 64)
    assert answer_ids(model, PROMPTS, 10, 64) == expected  # nothing that failed to come is taken for an expert
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: time.sleep(0.5))
        patch.setattr(lane, "PATIENCE_S", 0.05)
        with pytest.raises(UserError, match="has not come"):
            answer_ids(model, [[35, 36, 37, 38]], 20, 64)
    with pytest.raises(UserError, match="No such file"):
        model_of(OffloadSection(3, disk=str(tmp_path / "gone")))
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: fails_for_room())
    with pytest.raises(UserError, match="has no room"):
        model_of(section)


def fails_for_room():
    raise OSError(28, "No space left on device")


def test_the_command_line(tmp_path):
    home = make_home(tmp_path)
    words = ("generate", home / "ckpt", "the list", "--raw", "--max-gen-len", 4, "--precision", "fp32", "--max-seq-len", 64)
    _, plain, _ = command(*words)
    codes, answer, told_beside = command(*words, "--offload", "experts=2,policy=frequency")
    assert codes == [0] and answer == plain and "2 of 4 experts" in told_beside and "guess right" in told_beside
    engine = Engine(model_of(OffloadSection(4)), Numbers(TINY.vocab_size), max_seq_len=64)
    assert 'accessory:offload_moved_total{layer="1"' in generate_latest(Metrics(engine, "tiny").registry).decode()
    for option, sentence in (
        ("experts=1", "a token takes 2"),
        ("device_memory=3kB", "with 2 experts of each layer"),
        ("device_memory=lots", "argument --offload: device_memory: expected a size"),
        ("policy=lru", "argument --offload: experts, how many"),
        ("experts", "argument --offload: expected experts=4"),
        ("experts=2,disk=/nowhere", "/nowhere: No such file"),
    ):
        codes, _, refusal = command(*words, "--offload", option)
        assert codes != [0] and sentence in refusal and "Traceback" not in refusal, (option, refusal)


def test_a_run_logs_what_it_brought(tmp_path):
    home = make_home(tmp_path)
    words = ["tuning.lora.rank=2", f"model.checkpoint={home}/ckpt", "model.config=null", "data.validation=0"]
    codes, said, error = command(
        "finetune", home / "run.yaml", *words, "model.offload.experts=2", f"model.offload.disk={home}"
    )
    assert codes == [0] and "2 of 4 experts of each layer on the device" in said, error
    rows = map(json.loads, (home / "run/metrics.jsonl").read_text().splitlines())
    logged = next(row for row in rows if "loss" in row)
    assert logged["offload_moved_bytes"] > 0 and 0 <= logged["offload_hit_rate"] < 1
    assert len(logged["layer_offload_hit_rate"]) == 2


def test_what_a_run_used_most_is_there_first(tmp_path):
    """Of each layer, on the rank that has it; it changes no answer."""
    loads = [[(7 * e + layer) % 8 for e in range(8)] for layer in range(TINY.n_layers)]
    half = [{"step": n, "loads": [[load / 2 for load in layer] for layer in loads]} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*half, {"step": 2, "val_loss": 1.0}])))
    section = OffloadSection(3, loads=str(tmp_path))
    for policy in ("lru", "frequency"):
        model = model_of(replace(section, policy=policy))
        for layer, of_layer in zip(model.offloaded, loads, strict=True):
            assert list(layer.slots.slot_of) == sorted(range(8), key=lambda e, of_layer=of_layer: of_layer[e])[-3:]
        assert answer_ids(model, PROMPTS, 10, 64) == answer_ids(model_of(None), PROMPTS, 10, 64)
    for there in run_ranks(2, first_of_ranks, section, loads):
        assert there
    for text, sentence in (
        ("", "no loads in it"),
        ('{"loads": [[1, 2]]}', "not the loads of a model with 2 layers of 8 experts"),
        ('{"loads": ', "not the loads of"),
    ):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=sentence):
            model_of(section)
    with pytest.raises(UserError, match="gone"):
        model_of(replace(section, loads=str(tmp_path / "gone")))


def first_of_ranks(section, loads):
    model = model_of(section, mesh=make_mesh(2))
    own = model.layers[0].feed_forward.dispatcher.local_experts
    most = sorted(range(4), key=lambda e: loads[0][own.start + e])[-3:]
    return list(model.offloaded[0].slots.slot_of) == most


class FakeStream:
    """It notes what it is told; an event is the name of the stream that recorded it."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def record_event(self):
        self.notes.append(f"{self.name} records")
        return self.name

    def wait_event(self, event):
        self.notes.append(f"{self.name} waits for {event}")


def test_on_a_gpu_a_copy_waits_for_what_reads_its_slot_and_products_for_the_copy(monkeypatch):
    notes = []
    main, beside = FakeStream("main", notes), FakeStream("beside", notes)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: beside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(notes.append(f"in {stream.name}")))
    store = SimpleNamespace(read=lambda expert, slot: notes.append(f"copies {expert}"))
    load = lane.Lane(torch.device("cuda")).bring(store, 3, torch.empty(1))
    load.wait()
    assert notes == [
        "main records",
        "in beside",
        "beside waits for main",
        "copies 3",
        "beside records",
        "main waits for beside",
    ]


class FakeCudart:
    """Of CUDA's runtime what locks memory."""

    def __init__(self, code):
        self.code, self.locked = code, {}

    def cudaHostRegister(self, start, nbytes, flags):
        self.locked[start] = nbytes
        return self.code

    def cudaHostUnregister(self, start):
        del self.locked[start]


def test_what_a_gpu_copies_from_is_locked_to_the_byte_and_let_go(monkeypatch):
    cudart = FakeCudart(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    store = records.HostStore(3, 1000, torch.device("cuda"))
    assert cudart.locked == {store.rows.data_ptr(): 3000}
    del store
    assert not cudart.locked
    cudart.code = 2
    with pytest.raises(UserError, match=r"3.00kB of experts cannot be locked .*\(CUDA error 2\)"):
        records.HostStore(3, 1000, torch.device("cuda"))


def test_what_is_refused(monkeypatch):
    logical = LogicalModel(TINY)
    for options, sentence in (
        ({"trains": logical.shapes}, "trains, and stays on the device"),
        ({"kernel": "grouped"}, "takes all experts at once"),
    ):
        with pytest.raises(UserError, match=sentence):
            plan_offload(OffloadSection(2), logical, EXPERT, 1, torch.float32, 0.0, **options)
    monkeypatch.setattr("accessory.model.moe.offload.plan.memory_of", lambda _: 1000)
    with pytest.raises(UserError, match="do not fit into this"):
        model_of(OffloadSection(2))
