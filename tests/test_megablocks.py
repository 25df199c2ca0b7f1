"""The real megablocks and stk, interpreted: experts in the sparse layout, training, and what their age makes wrong."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from models import samples, train, weights
from ranks import run_ranks

from accessory.certify.problem import SMALL
from accessory.errors import UserError
from accessory.model.adapter import Adapter
from accessory.model.args import MoEArgs
from accessory.model.moe import MoE
from accessory.model.moe.kernels import pick_kernel
from accessory.model.moe.kernels.megablocks import load_megablocks, topology
from accessory.model.moe.layouts import LAYOUTS
from accessory.parallel.mesh import make_mesh

ARGS = replace(SMALL, dim=128, hidden_dim=256, head_dim=16, n_heads=8, moe=MoEArgs(8, num_experts_per_tok=2))
ADAPTER = Adapter(rank=3, scaling=0.5, bias=True)


def run_layers(mp):
    """For each case, by megablocks and by the definition: output, and gradients of the input and all that trains."""
    mp, results = make_mesh(mp).mp, []
    for tokens, adapter in ((1, None), (3, None), (3, ADAPTER)):  # so some experts have no rows
        both = []
        for kernel in ("megablocks", "reference"):
            torch.manual_seed(mp.rank)
            layer = MoE(ARGS, LAYOUTS["mixtral_sparse"], mp, kernel)
            for matrix in ("w1", "w2", "w3") if adapter else ():
                layer.experts.adapt(matrix, adapter)
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            generator = torch.Generator().manual_seed(1)
            torch.nn.init.normal_(layer.gate.weight, generator=generator)
            x, gradient = (torch.randn(tokens, ARGS.dim, generator=generator) for _ in range(2))
            y, _ = layer(x.requires_grad_())
            y.backward(gradient)
            both.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
        results.append(both)
    return results


@pytest.mark.parametrize("mp", [1, 2])
def test_a_layer_equals_the_definition(mp):
    for rank in run_ranks(mp, run_layers, mp):
        for both in rank:
            for ours, expected in zip(*both, strict=True):
                assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def train_small(kernel):
    args = replace(ARGS, n_layers=1)
    w = weights(args, scale=3.0, dtype=torch.float32)
    steps = [samples(2, seed, args, longest=6) for seed in range(3)]
    options = {"accumulation": 1, "balance": "document", "w": w, "dtype": torch.float32, "kernel": kernel}
    return train(args, "mixtral_sparse", 2, "fsdp", steps, **options)["steps"]


def test_a_model_trains():
    for ours, expected in zip(*(run_ranks(2, train_small, kernel)[0] for kernel in ("megablocks", "looped")), strict=True):
        for name in ("loss", "balance", "norm"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-5), name


def test_blocks_beyond_the_255th():
    """With megablocks' int16 numbers of blocks, Triton of today reads elsewhere: here, what lies before the matrix."""
    stk = load_megablocks().stk
    before, columns = 2**15, 2**15 + 256
    x, memory = torch.randn(128, 32), torch.randn(before + 32 * columns)
    w = memory[before:].view(32, columns)
    ours = topology(torch.tensor([0] * (columns // 128 - 1) + [128], dtype=torch.int32), x, width=128)
    expected = x @ w[:, -128:]
    torch.testing.assert_close(stk.ops.sdd(x, w, ours).data[0], expected, rtol=1e-5, atol=1e-5)
    narrow = stk.Matrix(ours.size(), ours.data, ours.row_indices.short(), ours.column_indices.short(), ours.offsets)
    assert (stk.ops.sdd(x, w, narrow).data[0] - expected).abs().max() > 1, "mended upstream: int32 is no longer needed"


WITHOUT = """
import sys
sys.modules["megablocks"] = None  # as if it were not installed
import torch
from accessory.model.moe.kernels import pick_kernel
pick_kernel("auto", torch.empty(1, 128), 128)
assert not {"triton", "stk"} & set(sys.modules), "imported though nobody asked"
pick_kernel("megablocks", torch.empty(1, 128), 128)
"""


def test_what_is_missing_is_said():
    found = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    last = found.stderr.strip().splitlines()[-1]
    assert "model.kernel=megablocks needs megablocks, which is not installed: make megablocks" in last, found.stderr


@pytest.mark.parametrize(
    ("hidden_dim", "dtype"), [(192, torch.float32), (128, torch.bfloat16), (128, torch.float64)], ids=str
)
def test_what_it_cannot_do_is_said_in_a_line(hidden_dim, dtype):
    with pytest.raises(UserError, match=r"'megablocks' cannot .* widths that 128 divides, .*; 'looped' can$"):
        pick_kernel("megablocks", torch.empty(1, 128, dtype=dtype), hidden_dim)


def test_nothing_of_it_stays_behind():
    """What stands in for megablocks' extension is found by megablocks alone."""
    load_megablocks()
    assert "megablocks_ops" not in sys.modules
