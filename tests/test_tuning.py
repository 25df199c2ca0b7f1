"""Adapters, and choosing what trains: the same numbers in every layout and parallel size, and nothing else changes."""

import pytest
import reference
import torch
from models import OPTIM, TINY, assemble, samples, train, weights
from ranks import run_ranks

from accessory.model.moe.layouts import get_layout
from accessory.train.config import LoraSection, TuningSection
from accessory.tuning.spec import resolve

STEPS = [samples(6, seed=1, longest=10), samples(5, seed=2, longest=10)]
LAYOUTS = ("mixtral", "mixtral_sparse")
PARTITIONS = {  # world size: (model parallel, data parallel mode)
    1: [(1, "fsdp")],
    2: [(2, "fsdp"), (1, "fsdp"), (1, "sdp"), (1, "ddp")],
    4: [(4, "fsdp"), (2, "fsdp")],
}
ALL_TARGETS = ("attention", "experts", "router", "embeddings", "output")
EVERYTHING = TuningSection(lora=LoraSection(rank=3, alpha=2.0, targets=ALL_TARGETS), bias=True, norm=True)


def tuning(section, layout="mixtral"):
    """What ``section`` means for the tiny model, as arguments of build_model."""
    spec = resolve(section, TINY, get_layout(layout))
    return {"adapters": spec.adapters, "trains": spec.trains}


def run_all(partitions, section):
    return [
        train(TINY, layout, mp, mode, STEPS, accumulation=2, balance="global", recompute=recompute, **tuning(section))
        for layout, mp, mode, recompute in partitions
    ]


@pytest.fixture(scope="module")
def one_process():
    """(weights, gradients, norms) of the plain reference."""
    spec = tuning(EVERYTHING)
    return reference.train(
        weights(adapters=spec["adapters"]),
        TINY,
        [[(s.tokens, s.trained) for s in batch] for batch in STEPS],
        balance="global",
        clip=OPTIM.clip_grad,
        lr=OPTIM.lr,
        weight_decay=OPTIM.weight_decay,
        betas=OPTIM.betas,
        eps=OPTIM.eps,
        trains=spec["trains"],
        scaling=2 / 3,
    )


@pytest.mark.parametrize("world", PARTITIONS)
def test_adapters_equal_one_process(world, one_process):
    trained, gradients, norms = one_process
    assert min(norms) > OPTIM.clip_grad, "clipping must be on"
    adapters = tuning(EVERYTHING)["adapters"]
    start = weights(adapters=adapters)
    partitions = [(layout, mp, mode, layout == "mixtral") for mp, mode in PARTITIONS[world] for layout in LAYOUTS]
    ranks = run_ranks(world, run_all, partitions, EVERYTHING, timeout=240)
    for index, partition in enumerate(partitions):
        parts = [rank[index] for rank in ranks]
        for sample, logits in zip(STEPS[0], parts[-1]["logits"], strict=False):
            expected = reference.forward(start, TINY, torch.tensor(sample.tokens), scaling=2 / 3)[0]
            torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
        for step, norm in enumerate(norms):
            assert parts[0]["steps"][step]["grad_norm"] == pytest.approx(norm, rel=1e-10), (partition, step)
        for what, expected in (("gradients", gradients), ("weights", trained)):
            full = assemble([part[what] for part in parts], adapters=adapters)
            for name, tensor in expected.items():
                error = (full[name] - tensor).abs().max().item() / tensor.abs().max().item()
                assert error <= 1e-10, f"{partition}: {what} of {name} differ by {error:.1e}"
        for name, tensor in full.items():  # weights
            assert name in trained or torch.equal(tensor, start[name]), f"{partition}: {name} is frozen but has changed"
