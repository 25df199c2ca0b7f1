"""The certificate is red for every fault that it is there to find, and only then; norm and clipping are worked by hand."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import assemble, mesh_for
from ranks import run_ranks
from torch.utils.checkpoint import set_checkpoint_early_stop

from accessory.certify import harness, run
from accessory.certify.judge import Judge
from accessory.certify.matrix import Cell, FileCell
from accessory.certify.parity import ParityCell, TransformersJudge, run_parity
from accessory.certify.problem import SMALL, Problem
from accessory.checkpoint import accessory, huggingface
from accessory.checkpoint.encoding import AS_IS, Encoding
from accessory.model import attention, decoder, linear
from accessory.model.args import ModelArgs
from accessory.model.logical import LogicalModel
from accessory.model.moe import dispatch, experts, layouts
from accessory.parallel import fsdp
from accessory.parallel.mesh import local_part
from accessory.train import balance, step
from accessory.train.balance import RouterLosses
from accessory.train.objective import MeanOfMeans, NextToken

CPU = torch.device("cpu")

FULL = Cell(2, 2, "fsdp", "mixtral_sparse", 2, False, True, "block", "full", "global")
EXPERTS = replace(FULL, layout="mixtral")
LORA = replace(FULL, accumulation=1, recompute="none", tuning="lora")
SPREAD = replace(FULL, model_parallel=1, layout="mixtral", recompute="none")
RECOMPUTED = replace(SPREAD, data_parallel="ddp", recompute="block", balance="document")
KEPT = replace(RECOMPUTED, recompute="none")
SPARSE_FILES = FileCell("mixtral_sparse", 2, 2, 1, "mixtral_sparse")
HF_FILES = FileCell("hf", 1, 2, 2, "mixtral")
CELLS = (FULL, EXPERTS, LORA, SPREAD, RECOMPUTED, KEPT, SPARSE_FILES, HF_FILES)


def not_entered(module):
    """A missed all-reduce of a partial gradient."""
    return lambda patch: patch.setattr(module, "copy_to_model_parallel_region", lambda x, mp: x)


def lora_not_entered(patch):
    not_entered(linear)(patch)
    not_entered(experts)(patch)


def counted_twice(patch):
    """What is whole on several ranks, by each of them."""
    norm = fsdp.global_grad_norm
    patch.setattr(step, "global_grad_norm", lambda model, is_owner, world: norm(model, dict.fromkeys(is_owner, True), world))


def norm_of_each_rank(patch):
    def norm(model, is_owner, world):
        return torch.stack([local_part(p.grad).norm() for p in model.parameters() if p.grad is not None]).norm()

    patch.setattr(step, "global_grad_norm", norm)


def mean_of_means(patch):
    """Each micro-batch's loss as a mean over its own targets, and the mean of those."""
    patch.setattr(harness, "NextToken", lambda: MeanOfMeans(NextToken()))


def counted_on_the_side(patch):
    """Counts kept by the block itself, each time it runs: recompute counts twice."""
    forward, train_step = decoder.Block.forward, step.train_step

    def noting(self, x, rotation, documents, *others):
        out, routing = forward(self, x, rotation, documents, *others)
        real = routing.experts[documents.document_of > 0]
        self.seen += torch.bincount(real.flatten(), minlength=routing.probs.shape[1])
        return out, routing

    def faulty(model, *inputs, **options):
        for layer in model.layers:
            layer.seen = 0
        with set_checkpoint_early_stop(False):  # else recompute ends where the next layer's gradient has what it needs
            result = train_step(model, *inputs, **options)
        return replace(result, counts=torch.stack([layer.seen for layer in model.layers]))

    patch.setattr(decoder.Block, "forward", noting)
    patch.setattr(harness, "train_step", faulty)


def documents_pooled(patch):
    """All tokens are counted as the first document's."""
    stats = decoder.router_stats

    def faulty(layers, documents, image_rows):
        return stats(layers, replace(documents, document_of=documents.document_of.clamp(max=1)), image_rows)

    patch.setattr(decoder, "router_stats", faulty)


def weighted_twice(patch):
    train_step = step.train_step

    def faulty(model, *inputs, **options):
        args = model.args
        model.args = replace(args, load_balancing_weight=args.load_balancing_weight**2)
        result = train_step(model, *inputs, **options)
        model.args = args
        return result

    patch.setattr(harness, "train_step", faulty)


def layers_pooled(patch):
    """Opposite imbalances of two layers cancel."""

    global_balance = balance.global_balance

    def faulty(stats, counts, top_k):
        pooled = stats._replace(sums=stats.sums.mean(0, keepdim=True))
        return global_balance(pooled, counts.double().mean(0, keepdim=True), top_k)

    patch.setattr(balance, "global_balance", faulty)


def experts_interleaved(patch):
    """Written and read alike, so that only the format's description can tell."""
    patch.setattr(accessory, "Encoding", lambda pattern, **sizes: Encoding(pattern.replace("(e f)", "(f e)"), **sizes))


def pairs_not_parted(patch):
    patch.setattr(huggingface, "row_order", lambda matrix, args: AS_IS)


def saved_with_another_theta(patch):
    to_dict = ModelArgs.to_dict
    patch.setattr(ModelArgs, "to_dict", lambda args: to_dict(args) | {"rope_theta": 2 * args.rope_theta})


def converted_with_another_eps(patch):
    patch.setitem(huggingface._CONFIG, "rms_norm_eps", "rope_theta")


FAULTS = {  # name: (how to plant it, cells to run, (cell, quantity) that must be red)
    "none": (lambda patch: None, CELLS, ()),
    "experts' gradient not summed": (
        not_entered(dispatch),
        (FULL, EXPERTS),
        ((FULL, "gradients"), (FULL, "reason"), (EXPERTS, "norm")),
    ),
    "attention's gradient not summed": (not_entered(attention), (FULL,), ((FULL, "gradients"),)),
    "adapters' gradient not summed": (lora_not_entered, (LORA,), ((LORA, "gradients"),)),
    "norm counted twice": (counted_twice, (FULL,), ((FULL, "norm"), (FULL, "clipping"))),
    "norm of one rank": (norm_of_each_rank, (EXPERTS,), ((EXPERTS, "norm"), (EXPERTS, "reason"))),
    "mean of means": (mean_of_means, (SPREAD,), ((SPREAD, "gradients"), (SPREAD, "loss"))),
    "recompute counted twice": (counted_on_the_side, (RECOMPUTED, KEPT), ((RECOMPUTED, "counts"),)),
    "documents pooled": (documents_pooled, (KEPT, SPREAD), ((KEPT, "balance"),)),
    "weight applied twice": (weighted_twice, (FULL,), ((FULL, "gradients"),)),
    "layers pooled": (layers_pooled, (FULL,), ((FULL, "balance"),)),
    "config.json with another rope_theta": (saved_with_another_theta, (SPARSE_FILES,), ((SPARSE_FILES, "reason"),)),
    "Hugging Face's norm_eps wrong": (converted_with_another_eps, (SPARSE_FILES,), ((SPARSE_FILES, "reason"),)),
    "experts interleaved": (
        experts_interleaved,
        (SPARSE_FILES, HF_FILES),
        ((SPARSE_FILES, "saved"), (SPARSE_FILES, "logits"), (SPARSE_FILES, "hf")),
    ),
    "rotary rows not permuted": (
        pairs_not_parted,
        (SPARSE_FILES, HF_FILES),
        ((HF_FILES, "logits"), (HF_FILES, "saved"), (SPARSE_FILES, "hf")),
    ),
}
PARITY = (ParityCell(2, "mixtral"), ParityCell(2, "mixtral_sparse"))
FP32 = Problem(dtype=torch.float32)


def run_with_faults(home):
    """{fault: [what each cell returns]} of one rank, and the cells in fp32 and those that transformers judges."""
    results, number = {}, 0
    for name, (plant, cells, _) in FAULTS.items():
        results[name] = []
        for cell in cells:
            number += 1
            scratch = Path(home, str(number))
            scratch.mkdir(exist_ok=True)
            with pytest.MonkeyPatch.context() as patch:
                plant(patch)
                results[name].append(run.run_cell(Problem(), cell, CPU, scratch))
    results["fp32"] = [run.run_cell(FP32, cell, CPU, Path(home, "fp32")) for cell in (FULL, EXPERTS, LORA)]
    results["parity"] = [run_parity(FP32, cell, CPU, Path(home)) for cell in PARITY]
    return results


@pytest.fixture(scope="module")
def planted():
    """{fault: what the judge needs of each cell}"""
    with tempfile.TemporaryDirectory() as home:
        ranks = run_ranks(2, run_with_faults, home)
    return {name: list(zip(*(rank[name] for rank in ranks), strict=True)) for name in ranks[0]}


@pytest.fixture(scope="module")
def judge():
    return Judge(Problem())


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_red(name, planted, judge):
    _, cells, expected = FAULTS[name]
    rows = {cell: judge.row(cell, list(ranks)) for cell, ranks in zip(cells, planted[name], strict=True)}
    red = {(cell, quantity) for cell, row in rows.items() for quantity in row.errors if not row.passes(quantity)}
    red |= {(cell, "reason") for cell, row in rows.items() if row.reason}
    assert set(expected) <= red, {cell: row.errors for cell, row in rows.items()}
    cells_expected = {cell for cell, _ in expected}
    assert all(row.passed != (cell in cells_expected) for cell, row in rows.items()), red  # and no other


def test_fp32(planted):
    judge = Judge(FP32)
    for cell, ranks in zip((FULL, EXPERTS, LORA), planted["fp32"], strict=True):
        row = judge.row(cell, list(ranks))
        assert row.passed and 1e-9 < row.errors["gradients"] < 1e-5, row
    assert judge.margin > 2e-5  # many times the errors of fp32: routing decides like fp64


def test_transformers(planted):
    judge = TransformersJudge(FP32)
    for cell, ranks in zip(PARITY, planted["parity"], strict=True):
        row = judge.row(cell, list(ranks))
        assert row.passed and row.errors.keys() == {"logits", "loss", "gradients"}, row
        assert not judge.row(cell, spoiled(ranks, "logits", lambda x: x * (1 + 1e-4))).passed
        assert not judge.row(cell, spoiled(ranks, "logits", lambda x: x * torch.nan)).passed
        assert not judge.row(cell, spoiled(ranks, "loss", lambda x: x * torch.nan)).passed
        row = judge.row(cell, spoiled(ranks, "gradients", copies_differ))
        assert not row.passed and "norm.weight" in row.reason


def spoiled(ranks, key, change):
    """What rank 1 returned under a key is other than it was."""
    return [ranks[0], ranks[1] | {key: change(ranks[1][key])}]


def copies_differ(tensors):
    """By less than the tolerance, in a tensor that every rank holds whole."""
    region, norm = tensors["norm.weight"]
    return tensors | {"norm.weight": (region, norm * (1 + 1e-6))}


def test_values_that_are_no_numbers_are_red(planted, judge):
    outcomes = dict(zip(CELLS, planted["none"], strict=True))
    row = judge.row(SPARSE_FILES, spoiled(outcomes[SPARSE_FILES], "logits", lambda x: x * torch.nan))
    assert not row.passed and not row.passes("logits")
    ranks = outcomes[FULL]
    region, norm = ranks[0]["weights"]["norm.weight"]
    nothing = ranks[0]["weights"] | {"norm.weight": (region, norm * torch.nan)}
    row = judge.row(FULL, [ranks[0] | {"weights": nothing}, ranks[1]])
    assert not row.passed and "norm.weight" in row.reason


def test_ranks_with_other_tensors_are_red(planted, judge):
    ranks = dict(zip(CELLS, planted["none"], strict=True))[FULL]
    for place in (0, 1):
        fewer = {name: t for name, t in ranks[place]["weights"].items() if name != "norm.weight"}
        row = judge.row(FULL, [rank | {"weights": fewer} if n == place else rank for n, rank in enumerate(ranks)])
        assert not row.passed and "norm.weight" in row.reason


def planted_gradients():
    """Zero but for these:

    - w1 of expert e holds one value, e + 1, far from the others': 1 + 4 + 9 + ... + 64 = 204 as squares
    - the router, which every rank holds whole, 6: 36
    - a norm's weight, likewise, 4: 16

    Together 256, so that the norm is 16. Were what is whole counted by each of two ranks: sqrt(204 + 2 * 52) = 17.5, of
    four: sqrt(204 + 4 * 52) = 20.3; were only a rank's own experts counted, experts 0 and 1 of four ranks: sqrt(5 + 52).
    """
    gradients = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in LogicalModel(SMALL).shapes.items()}
    for e in range(8):
        gradients["layers.1.feed_forward.experts.w1"][e, 3 * e, 4 * e] = e + 1
    gradients["layers.0.feed_forward.gate.weight"][7, 31] = 6
    gradients["norm.weight"][5] = 4
    return gradients


def plant(parameter, gradient):
    local_part(parameter.grad).copy_(local_part(gradient.detach()))


def step_with_planted_gradients(partitions):
    """[(norm, how far plain gradient descent at rate 1 moved this rank's parts of each weight)]"""
    results = []
    for layout, mp, mode in partitions:
        mesh = mesh_for(mp, mode)
        zeros = {name: torch.zeros_like(t) for name, t in planted_gradients().items()}
        model, planted = (
            harness.build(LogicalModel(SMALL), layout, harness.Tensors(w), mesh=mesh, mode=mode)
            for w in (zeros, planted_gradients())
        )
        for p, g in zip(model.parameters(), planted.parameters(), strict=True):
            p.register_post_accumulate_grad_hook(lambda p, g=g: plant(p, g))
        result = step.train_step(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            harness.micro_batches(Problem().batches(False)[0][:8], 1, mesh.dp.rank, mesh.dp.size),
            NextToken(),
            RouterLosses("global"),
            clip_grad=4.0,
        )
        results.append((result.grad_norm.item(), harness.weights(model)))
    return results


def test_norm_and_clipping_by_hand():
    partitions = [(layout, mp, "fsdp") for layout in layouts.LAYOUTS for mp in (4, 2)] + [("mixtral", 2, "ddp")]
    ranks = run_ranks(4, step_with_planted_gradients, partitions)
    for number in range(len(partitions)):
        assert {rank[number][0] for rank in ranks} == {16.0}
        weights = assemble([rank[number][1] for rank in ranks], SMALL)
        for name, gradient in planted_gradients().items():
            # to a norm of 4: but for 1e-6 beside the norm, which keeps zero from dividing
            torch.testing.assert_close(-weights[name], gradient / 4, rtol=1e-7, atol=0)
