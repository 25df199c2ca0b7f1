"""Our Triton kernels, interpreted, beside their definitions in torch; and compiled for GPUs that need not be there."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import TINY, Tensors, build, weights

from accessory.checkpoint.quantise import Quantising
from accessory.model import norm, quantised, triton_codes, triton_norm
from accessory.model.adapter import Adapter
from accessory.model.codecs import get_codec
from accessory.model.decoder import Inputs
from accessory.model.documents import Documents
from accessory.model.head import Logits
from accessory.model.logical import LogicalModel
from accessory.model.moe import router
from accessory.model.moe.kernels import KERNELS, codes, swiglu, triton_products, triton_swiglu
from accessory.model.moe.kernels.rows import rows_of_experts
from accessory.model.moe.weights import PlainWeights
from accessory.settings import QuantiseSection

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}
LAYOUTS = {
    "plain": lambda t: t,
    "transposed": lambda t: t.T.contiguous().T,
    "strided": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda t: t[:1, :1].expand(t.shape),
}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def numbers(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def check(ours, expected, dtype):
    for number, (mine, right) in enumerate(zip(ours, expected, strict=True)):
        largest = right.abs().max().item() if right.numel() else 0.0
        error = (mine - right).abs().max().item() if right.numel() else 0.0
        assert mine.dtype == dtype and mine.shape == right.shape
        assert error <= TOLERANCES[dtype] * largest, f"result {number} differs by {error / largest:.1e}"


@every_dtype
@pytest.mark.parametrize("rows", [[5, 0, 70, 3], [0, 0, 1]], ids=str)
def test_products(rows, dtype):
    """Tiles that end within an expert, odd widths, and rows that are taken from anywhere, and put anywhere."""
    n, wide, out = sum(rows), 37, 67
    ends, rows = torch.tensor(rows).cumsum(0).int(), rows_of_experts(torch.tensor(rows).cumsum(0), sum(rows))
    w, y, tokens = (
        numbers(len(rows), out, wide, dtype=dtype),
        numbers(n, out, dtype=dtype),
        numbers(n + 9, wide, dtype=dtype),
    )
    take, put = torch.arange(n + 9).flip(0)[:n], torch.arange(n).roll(n // 2)
    x = tokens[take].contiguous()
    products = torch.cat([F.linear(x[of], w[expert]) for expert, of in enumerate(rows)])
    placed = torch.empty_like(products)
    placed[put] = products
    back = torch.cat([y[of] @ w[expert] for expert, of in enumerate(rows)])
    outer = torch.stack([y[of].T @ x[of] for of in rows])
    ours = (
        triton_products.times(x, w, ends),
        triton_products.times(tokens, w, ends, take, put),
        triton_products.times_transposed(y, w, ends),
        triton_products.outer(y, x, ends),
        triton_products.outer(y, tokens, ends, take),
    )
    check(ours, (products, placed, back, outer, outer), dtype)


@every_dtype
@pytest.mark.parametrize("name", ["nf4-32", "int4-32", "int3-32", "int2-32", "int8"])
def test_products_by_codes(name, dtype):
    """Of experts with and without rows, with more than a tile of them, and of one matrix; odd widths and depths."""
    codec, (n, wide, out) = get_codec(name), (22, 160, 67)
    parts, x = codec.encode(numbers(3, out, wide) + 0.3), numbers(n, wide, dtype=dtype)
    ends, w = torch.tensor([5, 5, n], dtype=torch.int32), codec.decode(parts, dtype)
    products = torch.cat([F.linear(x[of], w[expert]) for expert, of in enumerate(rows_of_experts(ends, n))])
    first = {part: tensor[:1] for part, tensor in parts.items()}
    ours = triton_codes.times_codes(x, codec, parts, ends), triton_codes.times_codes(x[:3], codec, first)
    check(ours, (products, F.linear(x[:3], w[0])), dtype)


def test_answers_by_codes(monkeypatch):
    """A model that a GPU holds quantised multiplies a few rows by its codes, and more by numbers; adapters have none."""
    args = replace(TINY, hidden_dim=48, vocab_size=304)
    beside = {f"layers.0.feed_forward.experts.{matrix}": Adapter(4, 1.0) for matrix in ("w1", "w2")}
    logical = LogicalModel(replace(args, quantise=QuantiseSection("int3-16", "nf4-16")), beside)
    source = Quantising(Tensors(weights(args, adapters=beside)), logical)
    model = build(logical.args, "mixtral", source, adapters=beside, dtype=torch.float32)
    inputs, many = (Inputs(torch.arange(9 * n), Documents.of([9] * n)) for n in (1, 29))
    with torch.no_grad():
        expected, of_many = (model(each, Logits())[0] for each in (inputs, many))
    taken = []

    def product(x):
        taken.append(len(x))
        return triton_codes.times_codes

    for module in (quantised, codes):
        monkeypatch.setattr(module, "codes_product", product)
    with torch.no_grad():
        assert (model(inputs, Logits())[0] - expected).abs().max() < 1e-5 * expected.abs().max()
        assert len(taken) == args.n_layers * 8 and max(taken) == 18  # four matrices, a question, and three; of two choices
        assert torch.equal(model(many, Logits())[0], of_many) and max(taken) == 18


@every_dtype
@every_layout
def test_swiglu(layout, dtype):
    """Rows of more than one block of columns, and of a part of one."""
    gate, up, dh = (numbers(3, triton_swiglu.BACKWARD_BLOCK + 37, dtype=dtype, seed=seed) for seed in range(3))
    weight, dh = numbers(3, 1, dtype=dtype), layout(dh)
    ours = triton_swiglu.swiglu(gate, up, weight), *triton_swiglu.swiglu_backward(gate, up, weight, dh, with_h=True)
    expected = swiglu.swiglu(gate, up, weight), *swiglu.swiglu_backward(gate, up, weight, dh, with_h=True)
    check(ours, expected, dtype)


@every_dtype
@every_layout
def test_norm(layout, dtype, monkeypatch):
    """More rows than stripes, and rows that are no power of two."""
    monkeypatch.setattr(triton_norm, "STRIPES", 3)
    x, weight, dy = (
        numbers(7, 37, dtype=dtype),
        numbers(37, dtype=dtype, seed=1),
        layout(numbers(7, 37, dtype=dtype, seed=2)),
    )
    y, scale = triton_norm.rms_norm(x, weight, 1e-5)
    expected_y, expected_scale = norm.rms_norm(x, weight, 1e-5)
    ours = y, scale, *triton_norm.rms_norm_backward(x, weight, scale, dy, True)
    check(ours, (expected_y, expected_scale, *norm.rms_norm_backward(x, weight, expected_scale, dy, True)), dtype)


def test_gradients_by_differences():
    """Of what is written by hand, in fp64: the norm, the router's product, and experts by every kernel that has fp64."""
    x, weight = numbers(5, 6).requires_grad_(), numbers(6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: norm._Normalise.apply(x, weight, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(router._WideLinear.apply, (x, numbers(3, 6).requires_grad_()))
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    shapes = ((3, 4, 6), (3, 6, 4), (3, 4, 6), (5, 1))
    inputs = (x, *(numbers(*shape, seed=number).requires_grad_() for number, shape in enumerate(shapes)))
    for kernel in ("looped", "triton"):

        def experts(x, w1, w2, w3, weight, kernel=kernel):
            return KERNELS[kernel].swiglu(x, PlainWeights(w1), PlainWeights(w2), PlainWeights(w3), weight, ends)

        # along a random direction: each of 250 numbers by itself would take the interpreter a minute
        assert torch.autograd.gradcheck(experts, inputs, fast_mode=True)
        assert torch.autograd.gradcheck(
            lambda x, w, k=kernel: KERNELS[k].matmul(x, PlainWeights(w), ends), inputs[:2], fast_mode=True
        )


COMPILED = """
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from accessory.model import triton_codes, triton_norm
from accessory.model.moe.kernels import triton_products, triton_swiglu

def check(kernel, capability, tensors, constants, warps=4, stages=2):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else tensors.get(name, "i32") for name in names}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages})
    print(kernel.__name__, capability, compiled.metadata.shared, "mma" in compiled.asm["ptx"])

for capability in (80, 90):
    rows, columns, depth, *launch = triton_products.TILES[2]
    tensors = dict.fromkeys(("x", "w", "y"), "*bf16") | {"take": "*i64", "put": "*i64", "row_ends": "*i32"}
    wide = {"WIDE": tl.float32}
    tile = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "EXPERTS": 8, "NEIGHBOURS": 8}
    for strides in ({"depth_stride": 1}, {"column_stride": 1}):
        options = wide | tile | strides | {"TAKE": True, "PUT": True}
        check(triton_products._rows_times_matrices, capability, tensors, options, *launch)
    tile = {"ROWS": depth, "COLUMNS": columns, "DEPTH": rows}
    check(triton_products._outer_of_rows, capability, tensors, wide | tile | {"TAKE": True}, *launch)
    rows, columns, depth, *launch = triton_codes.TILE
    tile = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "ENDS": True}
    tensors = {"x": "*bf16", "y": "*bf16", "codes": "*u8", "zeros": "*u8", "levels": "*fp32", "row_ends": "*i32"}
    for bits, levels, zeros in ((4, True, False), (3, False, True), (8, False, False)):
        options = {"BITS": bits, "LEVELS": levels, "ZEROS": zeros}
        scales = {"scales": "*fp16" if zeros else "*bf16"}
        check(triton_codes._rows_times_codes, capability, tensors | scales, wide | tile | options, *launch)
    names = ("gate", "up", "weight", "h", "dh", "d_gate", "d_up", "d_weight")
    tensors = dict.fromkeys(names, "*bf16")
    check(triton_swiglu._forward, capability, tensors, wide | {"BLOCK": 1024})
    check(triton_swiglu._backward, capability, tensors, wide | {"BLOCK": 2048, "WITH_H": True}, 8)
    tensors = dict.fromkeys(("x", "weight", "y", "dx", "dy"), "*bf16") | dict.fromkeys(("scale", "d_weight"), "*fp32")
    check(triton_norm._forward, capability, tensors | {"eps": "fp32"}, wide | {"BLOCK": 4096}, 8)
    check(triton_norm._backward, capability, tensors, wide | {"BLOCK": 4096, "WITH_WEIGHT": True}, 8)
"""


def test_they_compile_for_gpus(tmp_path):
    """By the assembler that Triton brings, for Ampere and Hopper: of bf16, for tensor cores, in their shared memory."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    assert len(lines) == 20
    for _, capability, shared, _ in lines:
        assert int(shared) <= {"80": 163, "90": 227}[capability] * 1024
    products = [line for line in lines if line[0] in ("_rows_times_matrices", "_outer_of_rows", "_rows_times_codes")]
    assert all(tensor_cores == "True" for *_, tensor_cores in products)
