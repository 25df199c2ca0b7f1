"""Experts whose weights are packed, or lie elsewhere: kernels ask for what they need of them, when they need it."""

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from accessory.certify.problem import SMALL
from accessory.model.adapter import Adapter
from accessory.model.args import MoEArgs
from accessory.model.moe import MoE
from accessory.model.moe.kernels import KERNELS
from accessory.model.moe.layouts import LAYOUTS
from accessory.model.moe.weights import PlainWeights
from accessory.parallel.mesh import make_mesh

DIM, HIDDEN = 16, 24
ROWS = {  # rows of each expert
    "all": [5, 1, 7, 3],
    "some": [0, 4, 0, 6],
    "one": [0, 0, 1, 0],
    "none": [0, 0, 0, 0],
    "blocks of several": [70, 72, 0, 71],
}
KERNEL_DTYPES = [("looped", torch.float64, 1e-12), ("reference", torch.float64, 1e-12), ("grouped", torch.float32, 1e-5)]


class Packed:
    """int8 numbers with a scale for each row of a matrix, dense when asked for; it remembers what it is told."""

    trained = None

    def __init__(self, matrices):
        self.shape, self.at_once, self.scale = matrices.shape, 2, matrices.abs().amax(-1, keepdim=True) / 127
        self.codes = (matrices / self.scale).round().to(torch.int8)
        self.asked, self.announced = [], []

    def dense(self):
        return self.codes * self.scale

    def __getitem__(self, experts):
        self.asked += range(self.shape[0])[experts]
        assert experts == slice(None) or experts.stop - experts.start <= self.at_once
        return self.codes[experts] * self.scale[experts]

    def prefetch(self, experts):
        self.announced += range(self.shape[0])[experts]


class Watched(PlainWeights):
    """A parameter that remembers which experts were asked for."""

    def __init__(self, matrices):
        super().__init__(matrices)
        self.asked = []

    def __getitem__(self, experts):
        self.asked += range(self.shape[0])[experts]
        return super().__getitem__(experts)


def inputs(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    e, n = len(rows), sum(rows)
    shapes = [(n, DIM), (e, HIDDEN, DIM), (e, DIM, HIDDEN), (e, HIDDEN, DIM), (n, DIM)]
    x, *matrices, gradient = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    weight = torch.rand(n, 1, generator=generator).to(dtype)
    return x.requires_grad_(), matrices, weight.requires_grad_(), gradient, torch.tensor(rows).cumsum(0).int()


def assert_close(ours, expected, tolerance):
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * largest)


def swiglu_and_product(kernel, x, matrices, weight, row_ends, gradient):
    """Output and gradients of the experts' SwiGLU and of one product of theirs, by ``kernel``."""
    results = []
    for y in (
        KERNELS[kernel].swiglu(x, *matrices, weight, row_ends),
        KERNELS[kernel].matmul(x, matrices[0], row_ends)[:, : x.shape[1]],
    ):
        x.grad = weight.grad = None
        y.backward(gradient)
        results += [y.detach(), x.grad, *([] if weight.grad is None else [weight.grad])]
    return results


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("kernel", "dtype", "tolerance"), KERNEL_DTYPES)
def test_packed_weights_give_what_their_dense_ones_give(kernel, dtype, tolerance, rows):
    x, matrices, weight, gradient, row_ends = inputs(rows, dtype)
    packed = [Packed(w) for w in matrices]
    ours = swiglu_and_product(kernel, x, packed, weight, row_ends, gradient)
    dense = [PlainWeights(w.dense()) for w in packed]
    for result, expected in zip(ours, swiglu_and_product("reference", x, dense, weight, row_ends, gradient), strict=True):
        assert_close(result, expected, tolerance)
    with_rows = {expert for expert, count in enumerate(rows) if count}
    for w in packed:
        assert set(w.asked) == (set(range(len(rows))) if kernel == "grouped" and any(rows) else with_rows)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_looped_asks_again_in_backward_and_announces_what_it_will_ask(rows):
    x, matrices, weight, gradient, row_ends = inputs(rows, torch.float64)
    w1, w2, w3 = packed = [Packed(w) for w in matrices]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = KERNELS["looped"].swiglu(x, w1, w2, w3, weight, row_ends)
        product = KERNELS["looped"].matmul(x, w1, row_ends)
    with_rows = [expert for expert, count in enumerate(rows) if count]
    assert all(t.dim() == 2 for t in kept), "a matrix that was made for the forward is kept"
    assert w1.asked == 2 * with_rows and w2.asked == w3.asked == with_rows
    y.backward(gradient)
    product.backward(torch.ones_like(product))
    assert w1.asked == 4 * with_rows and w2.asked == w3.asked == 2 * with_rows
    assert all(w.announced == w.asked for w in packed)


@pytest.mark.parametrize("trained", [(0, 1, 2), (1,), (0,)], ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_experts_without_rows_are_not_asked_for_and_their_gradient_is_zero(rows, trained):
    """Also of a parameter that trains beside frozen ones."""
    x, matrices, weight, gradient, row_ends = inputs(rows, torch.float64)
    matrices = [w.requires_grad_(place in trained) for place, w in enumerate(matrices)]
    for kernel in ("looped", "reference"):
        watched = [Watched(w) for w in matrices]
        KERNELS[kernel].swiglu(x, *watched, weight, row_ends).backward(gradient)
        for place, w in enumerate(watched):
            without_rows = [expert for expert, count in enumerate(rows) if not count]
            if kernel == "looped" or place not in trained:
                assert not set(w.asked) & set(without_rows)
            if place in trained:
                assert not matrices[place].grad[without_rows].any()
                matrices[place].grad = None


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_what_trains_is_frozen_where_no_gradient_is_taken(without_gradients):
    """To decode one token with a model that trains is to read its few experts' matrices too."""
    x, matrices, weight, _, row_ends = inputs(ROWS["one"], torch.float64)
    matrices = [torch.nn.Parameter(w.flatten(0, 1)) for w in matrices]
    for kernel in ("looped", "reference"):
        with without_gradients():
            watched = [Watched(w.unflatten(0, (len(ROWS["one"]), -1))) for w in matrices]
            KERNELS[kernel].swiglu(x, *watched, weight, row_ends)
        assert all(w.asked == [2] for w in watched)


ARGS = replace(SMALL, dim=DIM, hidden_dim=HIDDEN, moe=MoEArgs(num_experts=8, num_experts_per_tok=2))
ADAPTER = Adapter(rank=3, scaling=0.5, bias=True)


def make_layer(layout, kernel, mp, adapter):
    """A layer of random numbers, the same every time, whose experts' weights are frozen."""
    torch.manual_seed(mp.rank)
    layer = MoE(ARGS, LAYOUTS[layout], mp, kernel).double()
    for matrix in ("w1", "w2", "w3"):
        if adapter:
            layer.experts.adapt(matrix, adapter)
    for name, parameter in layer.double().named_parameters():
        torch.nn.init.normal_(parameter, std=0.5)
        parameter.requires_grad = "lora" in name or "bias" in name
    return layer


def run_layer(layer, tokens):
    """Output, and gradients of the input and of what trains."""
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(tokens, DIM, dtype=torch.float64, generator=generator) for _ in range(2))
    x.requires_grad_()
    torch.nn.init.normal_(layer.gate.weight, generator=generator)
    y, _ = layer(x)
    y.backward(gradient)
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def run_packed_layers(mp, cases):
    """For each case what packed and dense experts give, and (experts with rows, experts asked for)."""
    mp = make_mesh(mp).mp
    results = []
    for layout, kernel, adapter, tokens in cases:
        layer, rows = make_layer(layout, kernel, mp, adapter), []
        packed = {name: Packed(layer.experts.expert_weights(name, torch.float64)[:].detach()) for name in ("w1", "w2", "w3")}
        plain = layer.experts.expert_weights
        layer.experts.expert_weights = lambda name, dtype, packed=packed, plain=plain: packed.get(name) or plain(name, dtype)
        layer.experts.register_forward_pre_hook(lambda _, given, rows=rows: rows.extend(given[0].ends_e.tolist()))
        ours = run_layer(layer, tokens)
        layer = make_layer(layout, "reference", mp, adapter)
        for name, weights in packed.items():
            getattr(layer.experts, name).data.copy_(weights.dense().flatten(0, 1))
        with_rows = {e for e, (start, end) in enumerate(zip([0, *rows], rows, strict=False)) if start < end}
        asked = [set(weights.asked) for weights in packed.values()]
        results.append((ours, run_layer(layer, tokens), with_rows, asked))
    return results


def test_layers_of_packed_experts():
    """With and without adapters, in both layouts, equal dense ones as the definition computes them."""
    cases = [
        (layout, kernel, adapter, tokens)
        for layout in LAYOUTS
        for kernel in ("looped", "reference")
        for adapter in (None, ADAPTER)
        for tokens in (1, 3, 40)
    ]
    some_idle = False
    for rank in run_ranks(2, run_packed_layers, 2, cases):
        for case, (ours, expected, with_rows, asked) in zip(cases, rank, strict=True):
            for result, wanted in zip(ours, expected, strict=True):
                assert_close(result, wanted, 1e-12)
            assert all(experts == with_rows for experts in asked), case
            some_idle |= 0 < len(with_rows) < 4
    assert some_idle
