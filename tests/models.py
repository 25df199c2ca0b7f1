"""Small models and data for the tests, and what every rank of a test does with them."""

import random
from dataclasses import replace

import torch

from accessory.certify.problem import SMALL
from accessory.certify.run import Tensors
from accessory.data.loader import BatchPlan, sample_lengths
from accessory.data.mix import Sample
from accessory.data.packing import Rows
from accessory.data.tokenizer import train_tokenizer
from accessory.model.args import MoEArgs
from accessory.model.build import RandomWeights, build_model
from accessory.model.decoder import Inputs
from accessory.model.documents import Documents
from accessory.model.head import Logits
from accessory.model.logical import LogicalModel
from accessory.model.moe.layouts import get_layout
from accessory.parallel.fsdp import wrap
from accessory.parallel.mesh import ONE_RANK, make_mesh
from accessory.settings import OptimSection, ParallelSection
from accessory.train.balance import RouterLosses
from accessory.train.objective import NextToken
from accessory.train.optim import make_optimizer
from accessory.train.save import gathered
from accessory.train.step import train_step

TINY = replace(
    SMALL,
    head_dim=8,
    n_heads=8,
    n_kv_heads=4,
    sliding_window=6,
    max_seq_len=64,
    moe=MoEArgs(8, num_experts_per_tok=2),
)
OPTIM = OptimSection(lr=1e-2, weight_decay=0.1, clip_grad=0.5, betas=(0.9, 0.95), eps=1e-8)


WORDS = ["the", "a", "list", "of", "tokens", "is", "made", "from", "words", "and", "then", "every", "answer", "not"]


def make_tokenizer(path, pieces=300):
    """A small tokenizer.model at ``path``."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=8)) + ", and then some." for _ in range(200)]
    return train_tokenizer(lines, path, pieces)


def weights(args=TINY, seed=0, scale=10.0, dtype=torch.float64, adapters=None):
    """Random logical tensors, large enough for routing and attention to be far from uniform; adapters are not zero."""
    logical = LogicalModel(args, adapters or {})
    source = RandomWeights(logical, seed)
    whole = {name: source.read(name, logical.whole(name)).to(dtype) for name in logical.shapes}
    result = {name: tensor * (scale if tensor.dim() > 1 else 1.0) for name, tensor in whole.items()}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in result.items():
        if name.endswith(("lora_b", "bias")):
            tensor.normal_(0.0, 0.1, generator=generator)
    return result


def samples(count, seed, args=TINY, longest=14):
    """Random sequences with a masked prompt of random length."""
    rng = random.Random(seed)
    result = []
    for _ in range(count):
        length = rng.randint(3, longest)
        prompt = rng.randint(1, length - 1)
        tokens = [rng.randrange(args.vocab_size) for _ in range(length)]
        result.append(Sample(tokens, [False] * prompt + [True] * (length - prompt)))
    return result


def build(
    args,
    layout,
    source,
    *,
    mesh=ONE_RANK,
    mode="fsdp",
    dtype=torch.float64,
    compute=None,
    recompute=False,
    kernel="auto",
    adapters=None,
    trains=None,
):
    """A decoder, sharded over data-parallel ranks as in a run."""
    return build_model(
        LogicalModel(args, adapters or {}),
        get_layout(layout),
        source,
        mesh=mesh,
        dtype=dtype,
        device=torch.device("cpu"),
        recompute=recompute,
        kernel=kernel,
        frozen_dtype=compute,
        trains=trains,
        shard=lambda model: wrap(model, mesh, mode, compute or dtype, "cpu"),
    )


def mesh_for(mp, mode="fsdp"):
    """The mesh of a run with these settings (a collective)."""
    return make_mesh(mp, ParallelSection(data_parallel=mode).dp_shard())


def local_parts(model):
    """{name: (region, tensor)} of this model-parallel rank; gathered over data-parallel ranks."""
    rank, size = model.mesh.mp.rank, model.mesh.mp.size
    return {name: (model.cuts[name].region(rank, size), tensor.detach().clone()) for name, tensor in gathered(model)}


def assemble(parts, args=TINY, adapters=None):
    """Full logical tensors from what the ranks returned; where several hold the same part they must agree bitwise."""
    shapes = LogicalModel(args, adapters or {}).shapes
    full = {name: torch.full(shapes[name], torch.nan) for name in parts[0]}
    for part in parts:
        for name, (region, tensor) in part.items():
            full[name] = full[name].to(tensor.dtype)
            box = tensor.view([s.stop - s.start for s in region])
            before = full[name][region]
            assert before.isnan().all() or torch.equal(before, box), f"ranks disagree about {name}"
            full[name][region] = box
    assert not any(tensor.isnan().any() for tensor in full.values())
    return full


def train(
    args,
    layout,
    mp,
    mode,
    steps,
    *,
    accumulation,
    balance,
    z_weight=0.01,
    width=None,
    recompute=False,
    dtype=torch.float64,
    compute=None,
    **tuning,
):
    """Train on ``steps`` (lists of samples, one global batch each) and return what happened on this rank.

    ``width``: pack them into rows of so many tokens.
    """
    mesh = mesh_for(mp, mode)
    dp = mesh.dp
    source = Tensors(weights(args, adapters=tuning.get("adapters")))
    model = build(args, layout, source, mesh=mesh, mode=mode, dtype=dtype, compute=compute, recompute=recompute, **tuning)
    logits = [evaluate(model, sample.tokens) for sample in steps[0][:2]]
    optimizer = make_optimizer(model, OPTIM)
    seen = {}
    optimizer.register_step_pre_hook(lambda *_: seen.setdefault("gradients", _gradients(model)) and None)
    results = []
    for batch in steps:
        order = range(len(batch))
        rows = Rows.packed(order, sample_lengths(batch), width) if width else Rows.alone(order)
        plan = BatchPlan(-(-len(rows) // (accumulation * dp.size)), accumulation, dp.rank, dp.size)
        (micro_batches,) = plan.epoch(batch, rows)
        result = train_step(
            model,
            optimizer,
            micro_batches,
            NextToken(),
            RouterLosses(balance, z_weight),
            clip_grad=OPTIM.clip_grad,
        )
        sums = dp.all_reduce(torch.stack([result.loss_sum.double(), result.balance.double(), result.z.double()]))
        counts = dp.all_reduce(result.counts.clone())
        loss = sums[0] / result.targets + args.load_balancing_weight * sums[1] + z_weight * sums[2]
        results.append({"loss": loss.item(), "grad_norm": result.grad_norm.item(), "counts": counts})
    return {"logits": logits, "steps": results, "gradients": seen["gradients"], "weights": local_parts(model)}


@torch.no_grad()
def evaluate(model, tokens):
    """Logits [S, V] of one sequence."""
    return model(Inputs(torch.tensor(tokens), Documents.of([len(tokens)])), Logits())[0]


def _gradients(model):
    parts = {}
    rank, size = model.mesh.mp.rank, model.mesh.mp.size
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if not parameter.requires_grad:
            assert gradient is None, f"{name} is frozen but has a gradient"
            continue
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        parts[name] = (model.cuts[name].region(rank, size), full.clone())
    return parts
