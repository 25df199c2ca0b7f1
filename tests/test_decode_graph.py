"""Steps of single tokens as CUDA graphs: what a real one would freeze or refuse, one that stands in for it does as well."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from models import TINY, Numbers, Tensors, build, weights
from pretend_gpu import graphs
from ranks import run_ranks

from accessory.certify.problem import SMALL, Problem
from accessory.certify.serving import SEVERAL, ServingCell, run_serving, wrong_tokens
from accessory.checkpoint.quantise import Quantising
from accessory.infer import decode_graph, engine
from accessory.infer.sampling import Sampling
from accessory.model import attention, decoder, quantised, triton_here
from accessory.model.adapter import Adapter
from accessory.model.args import MoEArgs
from accessory.model.build import model_without_weights
from accessory.model.logical import LogicalModel
from accessory.model.moe.kernels import KERNELS, codes
from accessory.model.moe.layouts import EXPERT
from accessory.parallel.mesh import Axis, Mesh
from accessory.settings import QuantiseSection

CPU = torch.device("cpu")


@contextmanager
def recording(kernel, varlen):
    """A CPU that has graphs, ``kernel`` as a GPU's choice if one is named, and its attention over pages if ``varlen``."""
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in graphs.CUDA.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(engine, "can_record", lambda model: True)
        patch.setattr(decode_graph, "say", pytest.fail)
        patch.setattr(decoder, "can_pack", lambda *_: False)
        if kernel:
            patch.setitem(KERNELS, kernel, replace(KERNELS[kernel], suits=lambda *_: True, waits=lambda _: False))
        if varlen:
            patch.setattr(attention, "varlen_runs", lambda *_, **__: True)
        graphs.replays.clear()
        yield


def serve(problem, cell, kernel, varlen):
    with recording(kernel, varlen):
        return run_serving(problem, cell, CPU), list(graphs.replays)


HOPPER = ("grouped", torch.float32, True)  # the kernel of the experts, its dtype here, and attention over pages
CASES = {  # window, layout, adapters, and what computes
    "no window": (None, "mixtral", "full", *HOPPER),
    "a window over pages": (33, "mixtral_sparse", "full", *HOPPER),
    "a window within a page": (9, "mixtral_sparse", "full", "grouped", torch.float32, False),
    "some with adapters": (9, "mixtral", SEVERAL, *HOPPER),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_answers_of_steps_that_are_replayed(case):
    """Requests of every kind join, wait for pages, share beginnings and are cancelled: each is as if alone."""
    window, layout, tuning, kernel, dtype, varlen = case
    problem, cell = Problem(replace(SMALL, sliding_window=window), dtype, seed=1), ServingCell(1, layout, tuning)
    ((told, replays),) = run_ranks(1, serve, problem, cell, kernel, varlen)
    assert wrong_tokens(problem, cell, told) == 0 and told["leaked"] == 0
    assert len(replays) > 8 and (tuning == SEVERAL or {1, 2, 4, 8} == {*replays})


def answered(model, count, most=9, **options):
    """Of ``count`` requests the answers and the experts' loads, and of the engine."""
    asked = engine.Engine(model, Numbers(TINY.vocab_size), max_seq_len=40, **options)
    how = Sampling(max_tokens=most, expert_load=True)
    requests = [asked.submit([n + 1, 7, 3 * n], replace(how, max_tokens=most - n)) for n in range(count)]
    for _ in asked.run():
        pass
    return [one.answer for one in requests], [one.expert_load.tolist() for one in requests], asked.expert_load.tolist()


def test_experts_of_triton_in_a_graph():
    """As on an A100; their interpreter takes its time."""
    args = replace(TINY, n_layers=1, moe=MoEArgs(4, num_experts_per_tok=2))
    model = build(args, "mixtral", Tensors(weights(args)))
    plain = answered(model, 3)
    with recording("triton", varlen=True):
        assert answered(model, 3) == plain and {*graphs.replays} == {1, 2, 4}
        del graphs.replays[:]
        assert answered(model, 1, graphs=False) == answered(model, 1) and len(graphs.replays) == 8


def test_products_by_codes_in_a_graph(monkeypatch):
    """Of so many rows as are multiplied so: for more the host waits."""
    args = replace(TINY, n_layers=1, hidden_dim=48, moe=MoEArgs(4, num_experts_per_tok=2))
    logical = LogicalModel(replace(args, quantise=QuantiseSection("int3-16", "nf4-16")))
    model = build(logical.args, "mixtral", Quantising(Tensors(weights(args)), logical), dtype=torch.float32)
    monkeypatch.setattr(quantised, "triton_compiles", lambda x: True)
    monkeypatch.setattr(codes, "FEW_ROWS", 1)  # of each of four experts, two for a token
    plain = answered(model, 3, most=4)
    with recording(None, varlen=True):
        assert answered(model, 3, most=4) == plain and {*graphs.replays} == {1, 2}


def test_without_graphs_where_none_can_be_recorded(monkeypatch):
    """What goes wrong there is said, and answers come all the same."""
    model, said = build(TINY, "mixtral", Tensors(weights()), dtype=torch.float32, kernel="grouped"), []
    plain = answered(model, 3)

    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    with recording("grouped", varlen=False):
        monkeypatch.setattr(decode_graph, "say", said.append)
        monkeypatch.setattr(torch.cuda, "graph", refuse)
        assert answered(model, 3) == plain
    assert len(said) == 1 and "recorded as a CUDA graph here (operation not permitted" in said[0]


def test_a_kernel_that_waits_cannot_be_in_a_graph():
    """This is how the test of others would end."""
    with recording("looped", varlen=False), pytest.raises(graphs.GraphError, match="tolist"):
        answered(build(TINY, "mixtral", Tensors(weights())), 1)


BESIDE = dict.fromkeys(("layers.0.attention.wq.weight", "layers.0.feed_forward.experts.w1"), Adapter(8, 1.0))
SEVERAL_BESIDE = {name: Adapter.side_by_side([adapter]) for name, adapter in BESIDE.items()}
MODELS = {  # whether it can; adapters, dtype, kernel, the GPU's capability, quantised parts, ranks
    "bf16 on Hopper": (True, {}, torch.bfloat16, "auto", (9, 0), {}, 1),
    "bf16 on an A100": (False, {}, torch.bfloat16, "grouped", (8, 0), {}, 1),
    "Triton's kernel there": (True, {}, torch.float16, "triton", (8, 0), {}, 1),
    "a loop": (False, {}, torch.bfloat16, "looped", (9, 0), {}, 1),
    "an adapter": (False, BESIDE, torch.bfloat16, "auto", (9, 0), {}, 1),
    "several": (True, SEVERAL_BESIDE, torch.bfloat16, "auto", (9, 0), {}, 1),
    "quantised experts": (True, {}, torch.bfloat16, "auto", (8, 0), {"experts": "int8"}, 1),
    "without a product by codes": (False, {}, torch.bfloat16, "auto", (7, 5), {"experts": "int8"}, 1),
    "quantised, and a loop": (False, {}, torch.bfloat16, "looped", (9, 0), {"experts": "int8"}, 1),
    "quantised attention": (True, {}, torch.bfloat16, "auto", (9, 0), {"attention": "int8"}, 1),
    "two ranks": (False, {}, torch.bfloat16, "auto", (9, 0), {}, 2),
}


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_what_can_be_recorded(case, monkeypatch):
    can, adapters, dtype, kernel, capability, quantise, ranks = case
    args = replace(TINY, quantise=QuantiseSection(**quantise) if quantise else None)
    mesh = Mesh(mp=Axis(0, ranks))
    model = model_without_weights(LogicalModel(args, adapters), EXPERT, mesh, dtype, kernel, trains=())
    model.to_empty(device="cpu")
    assert not decode_graph.can_record(model), "on a CPU"
    monkeypatch.setattr(decode_graph, "varlen_runs", lambda *_, **__: True)
    monkeypatch.setattr(triton_here, "capability", lambda device: capability)
    monkeypatch.setattr(quantised, "triton_compiles", lambda x: capability >= (8, 0))
    monkeypatch.setitem(KERNELS, "grouped", replace(KERNELS["grouped"], suits=KERNELS["looped"].suits))
    assert decode_graph.can_record(model) == can
