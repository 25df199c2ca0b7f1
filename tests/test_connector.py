"""What encoders made of images, in the decoder: every preset, layout and way to cut it, against the plain reference."""

import pytest
import torch
from models import OPTIM, check_close, mesh_for, weights
from ranks import run_ranks
from seeing import seeing, seen_batch

from accessory.certify import harness, reference
from accessory.data.loader import collate
from accessory.model.head import Nothing
from accessory.model.logical import LogicalModel
from accessory.train.balance import RouterLosses
from accessory.train.health import RouterHealth
from accessory.train.objective import NextToken
from accessory.train.optim import make_optimizer
from accessory.train.step import train_step

COUNTS = [[1, 0, 2], [0, 0], [1]]
"""Images of the samples in three micro-batches: the second has none."""


def step_on_rank(args, layout, mp, mode, accumulation, recompute):
    """Gradients of a step as this rank has them, and its norm; micro-batches are dealt over the data-parallel ranks."""
    mesh = mesh_for(mp, mode)
    model = harness.build(
        LogicalModel(args), layout, harness.Tensors(weights(args)), mesh=mesh, mode=mode, recompute=recompute
    )
    dealt = range(mesh.dp.rank, accumulation * mesh.dp.size, mesh.dp.size)
    share = [seen_batch(args, COUNTS[n], n)[0] if n < len(COUNTS) else collate([]) for n in dealt]
    optimizer = make_optimizer(model, OPTIM)
    first = {}
    optimizer.register_step_pre_hook(lambda *_: first.update(harness.gradients(model)))
    result = train_step(model, optimizer, share, NextToken(), RouterLosses("document", 0.01), clip_grad=OPTIM.clip_grad)
    return harness.measured(result, mesh.dp), first


def expected(args):
    """(loss parts, norm, clipped gradients) of the reference."""
    posed = [sample for seed, counts in enumerate(COUNTS) for sample in seen_batch(args, counts, seed)[1]]
    w = {name: tensor.requires_grad_() for name, tensor in weights(args).items()}
    parts = reference.loss_parts(w, args, posed, "document")
    reference.weighted(parts, args).backward()
    norm = sum(t.grad.square().sum() for t in w.values()).sqrt().item()
    return parts, norm, {name: t.grad * min(1.0, OPTIM.clip_grad / (norm + 1e-6)) for name, t in w.items()}


@pytest.mark.parametrize(
    ("preset", "layout", "ranks", "mp", "mode", "accumulation"),
    [
        ("clip", "mixtral", 1, 1, "fsdp", 3),
        ("llava", "mixtral_sparse", 2, 2, "fsdp", 3),
        ("ens5", "mixtral", 2, 1, "fsdp", 2),
        ("qformer", "mixtral", 4, 2, "ddp", 2),
        ("ens", "mixtral_sparse", 4, 1, "sdp", 1),
    ],
)
def test_a_step_on_images_is_that_of_the_reference(preset, layout, ranks, mp, mode, accumulation):
    args = seeing(preset)
    outcome = run_ranks(ranks, step_on_rank, args, layout, mp, mode, accumulation, "block" if ranks > 1 else "none")
    parts, norm, gradients = expected(args)
    ours, differ = harness.assemble([first for _, first in outcome], LogicalModel(args).shapes)
    assert not differ
    check_close(ours, gradients, 1e-11)
    for told, _ in outcome:
        assert told["loss"] == pytest.approx(parts.ce.item(), rel=1e-12)
        assert told["norm"] == pytest.approx(norm, rel=1e-12)
        assert torch.equal(told["counts"], parts.counts)


def test_the_routers_of_images_and_of_text_are_told_apart():
    args = seeing("clip")
    model = harness.build(LogicalModel(args), "mixtral", harness.Tensors(weights(args)))
    batch, _ = seen_batch(args, [1, 0, 2], 0)
    chosen, entropies = [], []

    def keep(_, __, routing):
        chosen.append(routing.experts)
        entropies.append(-(routing.probs * routing.probs.log()).sum(-1))

    for block in model.layers:
        block.feed_forward.gate.register_forward_hook(keep)
    with torch.no_grad():
        _, stats = model(batch.inputs(), Nothing())
    tokens, rows = len(batch.tokens), batch.images.rows
    health = RouterHealth.of_sums(stats.counts.sum(1), stats.entropy.sum(1), tokens, stats.of_images)
    text = torch.tensor(sorted(set(range(tokens)) - set(rows.tolist())))
    for part, places in (("image", rows), ("text", text)):
        for layer in range(args.n_layers):
            counts = torch.bincount(chosen[layer][places].flatten(), minlength=args.moe.num_experts)
            assert torch.equal(health.parts[part].counts[layer], counts)
            assert health.parts[part].entropy[layer].item() == pytest.approx(entropies[layer][places].mean().item())
    told = health.metrics()
    assert told["image_load_max"] == health.parts["image"].load.max().item() and "text_layer_entropy" in told
    assert "of image tokens: expert load" in health.line()
