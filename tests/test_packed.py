"""A model whose matrices are packed gives what it gave before: tokens, scores, adapters side by side, in both layouts."""

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from accessory.certify.problem import SERVED, Problem
from accessory.certify.serving import SEVERAL, ServingCell, served_model
from accessory.model.decoder import Inputs
from accessory.model.documents import Documents
from accessory.model.head import Logits, Predictions, Targets

LENGTHS = [1, 40, 1, 7]  # single tokens, as answers have them, beside prompts
CPU = torch.device("cpu")


@torch.inference_mode()
def before_and_after(world, layout, tuning, dtype):
    problem = replace(Problem(), dtype=dtype)
    model = served_model(problem, ServingCell(world, layout, tuning), CPU)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(problem.args.vocab_size, (sum(LENGTHS),), generator=generator)
    members = torch.arange(len(LENGTHS)) % (len(SERVED) + 1) if tuning == SEVERAL else None
    targets = Targets(torch.arange(len(tokens) - 1), tokens[1:])

    def results():
        for member in (members, None):
            inputs = Inputs(tokens, Documents.of(LENGTHS), members=member)
            yield model(inputs, Logits())[0].double()
            yield model(inputs, Predictions(targets))[0][0].double()

    plain = list(results())
    model.pack()
    return plain, list(results()), sorted(name for name, tensor in model.named_parameters() if tensor.is_mkldnn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("world", "layout", "tuning"),
    [
        (1, "mixtral", SEVERAL),
        (2, "mixtral_sparse", SEVERAL),
        (2, "mixtral", "lora"),  # with biases
        (4, "mixtral_sparse", "full"),  # more ranks than heads of keys
    ],
)
def test_a_packed_model_gives_what_it_gave(world, layout, tuning, dtype):
    for plain, packed, names in run_ranks(world, before_and_after, world, layout, tuning, dtype):
        assert {"output.weight", "layers.0.attention.wq.weight", "layers.1.attention.wo.weight"} <= set(names)
        for ours, expected in zip(packed, plain, strict=True):
            error = (ours - expected).norm() / expected.norm()
            assert error < (1e-5 if dtype == torch.float32 else 3e-2), f"{error:.1e}"
