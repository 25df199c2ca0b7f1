"""What one block of Mixtral 8x7B keeps of a token for its backward pass, at full size: the shapes alone are computed."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from accessory.checkpoint.description import load_args
from accessory.model.adapter import ONE_ADAPTER
from accessory.model.decoder import Block
from accessory.model.documents import Documents
from accessory.model.moe.layouts import LAYOUTS
from accessory.model.recompute import run_block
from accessory.model.rope import rotations
from accessory.parallel.mesh import Axis
from accessory.parallel.planned import planned_for_gpu
from accessory.train.trace import Trace

ARGS = load_args(Path(__file__).parents[1] / "configs/model/mixtral-8x7b.json")
TOKENS = 4096


@dataclass(frozen=True)
class Absent(Axis):
    """Of ranks that are not there."""

    def all_reduce(self, x, *_):
        return x


@pytest.fixture
def bf16():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("layout", "size", "recompute", "kilobytes"),
    [
        ("mixtral", 1, "none", 190),
        ("mixtral_sparse", 8, "none", 71),
        ("mixtral", 1, "norms_and_experts", 160),
        ("mixtral_sparse", 8, "norms_and_experts", 40),
        ("mixtral", 1, "block", 9),
    ],
)
def test_what_a_block_keeps_of_a_token(layout, size, recompute, kilobytes, bf16):
    """By the kernels of GPUs; without recompute autograd alone would keep 295 and 127 kB."""
    real = Documents.of([TOKENS])
    with FakeTensorMode() as fake, planned_for_gpu():
        tensors = {name: fake.from_tensor(getattr(real, name)) for name in ("document_of", "positions", "borders")}
        documents = replace(real, **tensors)
        block = Block(ARGS, LAYOUTS[layout], Absent(0, size), "grouped")
        rotation = rotations(documents.positions, ARGS.head_dim, ARGS.rope_theta, ARGS.rope_scaling, torch.bfloat16)
        x = torch.empty(TOKENS, ARGS.dim, requires_grad=True)
        with Trace() as trace:
            given, _ = run_block(block, (x, rotation, documents, None, ONE_ADAPTER), recompute)
            kept = (trace.live - given.nbytes + x.nbytes) / TOKENS / 1000
    assert 0.8 * kilobytes <= kept <= kilobytes
