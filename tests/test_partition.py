"""Results do not depend on the partition: every layout and parallel size gives the numbers of one plain process."""

import pytest
import torch
from models import OPTIM, TINY, assemble, check_close, samples, train, train_in_one_process, weights
from ranks import run_ranks

from accessory.certify import reference
from accessory.model.build import RandomWeights, build_model
from accessory.model.decoder import Inputs
from accessory.model.documents import Documents
from accessory.model.head import LossSum, Targets
from accessory.model.moe.layouts import EXPERT
from accessory.parallel.fsdp import wrap
from accessory.parallel.mesh import ONE_RANK, local_part
from accessory.settings import TuningSection
from accessory.tuning.spec import resolve

STEPS = [samples(8, seed=1), samples(8, seed=2), samples(7, seed=3)]  # the last global batch is not full

RECOMPUTE = {"mixtral": "block", "mixtral_sparse": "norms_and_experts"}
PARTITIONS = {  # world size: (model parallel, data parallel mode, micro-batches of a step)
    1: [(1, "fsdp", 4)],
    2: [(2, "fsdp", 2), (1, "fsdp", 4), (1, "sdp", 3), (1, "ddp", 3)],
    4: [(4, "fsdp", 3), (2, "fsdp", 3), (2, "ddp", 4)],
    8: [(4, "fsdp", 2)],
}


def run_all(partitions, steps, balance):
    return [
        train(TINY, layout, mp, mode, steps, accumulation=accumulation, balance=balance, recompute=recompute)
        for layout, mp, mode, accumulation, recompute in partitions
    ]


@pytest.fixture(scope="module", params=["global", "document"])
def one_process(request):
    """(balance, weights, gradients, norms) of the plain reference."""
    trained, gradients, norms = train_in_one_process(weights(), STEPS, balance=request.param)
    assert min(norms) > OPTIM.clip_grad, "clipping must be on"
    return request.param, trained, gradients, norms


@pytest.mark.parametrize("world", PARTITIONS)
def test_three_steps_equal_one_process(world, one_process):
    balance, trained, gradients, norms = one_process
    partitions = [(layout, *cut, recompute) for cut in PARTITIONS[world] for layout, recompute in RECOMPUTE.items()]
    ranks = run_ranks(world, run_all, partitions, STEPS, balance, timeout=240)
    for index, partition in enumerate(partitions):
        parts = [rank[index] for rank in ranks]
        assert all(p["steps"][0]["norm"] == parts[0]["steps"][0]["norm"] for p in parts), "norm differs by rank"
        for sample, logits in zip(STEPS[0], parts[-1]["logits"], strict=False):
            expected = reference.forward(weights(), TINY, torch.tensor(sample.tokens))[0]
            torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
        for step, norm in enumerate(norms):
            assert parts[0]["steps"][step]["norm"] == pytest.approx(norm, rel=1e-10), (partition, step)
        for what, expected in (("gradients", gradients), ("weights", trained)):
            check_close(assemble([part[what] for part in parts]), expected, 1e-10, (partition, what))


def gradients_of_micro_batches():
    """Of two together, and the sums of each one's own, on a rank alone that computes in bf16."""
    tuning, cpu = resolve(TuningSection(), TINY), torch.device("cpu")
    model = build_model(
        tuning.logical,
        EXPERT,
        RandomWeights(tuning.logical, 0),
        dtype=torch.float32,
        device=cpu,
        trains=tuning.trains,
        shard=lambda m: wrap(m, ONE_RANK, "fsdp", torch.bfloat16, "cpu"),
    )

    def gradients(*texts):
        model.zero_grad()
        for tokens in texts:
            targets = Targets(torch.arange(len(tokens) - 1), tokens[1:])
            model(Inputs(tokens, Documents.of([len(tokens)])), LossSum(targets))[0].backward()
        return [local_part(parameter.grad) for parameter in model.parameters()]

    first, second = torch.randint(TINY.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    return gradients(first, second), [x + y for x, y in zip(gradients(first), gradients(second), strict=True)]


def test_a_rank_alone_adds_up_what_it_reduces_in_place():
    """Each gradient lies where it was reduced; the next ones must lie elsewhere."""
    ((together, added),) = run_ranks(1, gradients_of_micro_batches)
    for all_at_once, one_by_one in zip(together, added, strict=True):
        assert all_at_once.any() and torch.equal(all_at_once, one_by_one)
