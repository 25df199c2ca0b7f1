"""The mesh, the borders of the model-parallel region, and layers that equal plain ones, on real ranks."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as fairscale
from models import TINY, Tensors, build, samples, weights
from ranks import run_ranks

from accessory.certify import harness
from accessory.data.loader import collate
from accessory.errors import UserError
from accessory.model.args import MoEArgs
from accessory.model.head import LossSum
from accessory.model.linear import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear
from accessory.model.moe import layouts
from accessory.parallel.mesh import make_mesh, mesh_of
from accessory.parallel.regions import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)

RANKS = 2
SHAPE = (3, 4)


def values(rank, shape=SHAPE):
    """Other numbers on each rank, exact in any order of addition."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) * 10 + rank


def everything():
    """What each part below gives on this rank."""
    mp = make_mesh(RANKS).mp
    parts = (shared_gradients, reduce_leaf, not_contiguous, column_row, embedding, construction)
    return {part.__name__: part(dist.get_rank(), mp) for part in parts}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(RANKS, everything)


def shared_gradients(rank, mp):
    leaf = torch.ones(SHAPE, requires_grad=True)
    (leaf + copy_to_model_parallel_region(leaf, mp)).backward(torch.ones(SHAPE))
    inner = torch.ones(SHAPE, requires_grad=True)
    z = inner * 1
    (z + copy_to_model_parallel_region(z, mp)).backward(torch.ones(SHAPE))
    given = torch.ones(SHAPE)
    copy_to_model_parallel_region(torch.ones(SHAPE, requires_grad=True), mp).backward(given)
    return leaf.grad, inner.grad, given


def test_copy_to_leaves_a_shared_gradient_alone(ranks):
    for rank in ranks:
        leaf, inner, given = rank["shared_gradients"]
        assert torch.equal(leaf, torch.full(SHAPE, 3.0))  # 1 from the sum, 2 from the two ranks
        assert torch.equal(inner, torch.full(SHAPE, 3.0))
        assert torch.equal(given, torch.ones(SHAPE))


def reduce_leaf(rank, mp):
    leaf = values(rank).requires_grad_()
    out = reduce_from_model_parallel_region(leaf, mp)
    out.backward(values(rank))
    return leaf.detach(), out.detach(), leaf.grad


def test_reduce_from_sums_a_leaf_and_keeps_it(ranks):
    for number, rank in enumerate(ranks):
        leaf, out, gradient = rank["reduce_leaf"]
        assert torch.equal(leaf, values(number))
        assert torch.equal(out, values(0) + values(1))
        assert torch.equal(gradient, values(number))


def strides_of_its_own(rank):
    """The same shape on both ranks, laid out by rows on one and by columns on the other."""
    return values(rank) if rank == 0 else values(rank).T.contiguous().T


def not_contiguous(rank, mp):
    results = {}
    x = torch.ones(SHAPE, requires_grad=True)
    copy_to_model_parallel_region(x, mp).sum().backward()  # an expanded gradient
    results["copy of sum"] = x.grad
    x = torch.ones(SHAPE, requires_grad=True)
    copy_to_model_parallel_region(x, mp).backward(values(rank, SHAPE[::-1]).T)
    results["copy of transposed"] = x.grad
    results["reduce transposed"] = reduce_from_model_parallel_region(values(rank).T, mp)
    results["reduce expanded"] = reduce_from_model_parallel_region(values(rank)[:1].expand(SHAPE), mp)
    results["reduce stepped"] = reduce_from_model_parallel_region(values(rank)[:, ::2], mp)
    results["reduce, strides differ"] = reduce_from_model_parallel_region(strides_of_its_own(rank), mp)
    results["gather, strides differ"] = gather_from_model_parallel_region(strides_of_its_own(rank), mp)
    results["gather expanded"] = gather_from_model_parallel_region(values(rank)[:1].expand(SHAPE), mp)
    results["gather transposed"] = gather_from_model_parallel_region(values(rank).T, mp)
    x = values(rank).requires_grad_()
    out = gather_from_model_parallel_region(x[:, ::2], mp)
    out.backward(values(0, (4, 3)).T)
    results["gather stepped"], results["gradient of stepped"] = out.detach(), x.grad
    return results


def test_tensors_that_are_not_contiguous(ranks):
    for number, rank in enumerate(ranks):
        sums = values(0) + values(1)
        gathered = torch.zeros(SHAPE, dtype=torch.float64)
        gathered[:, ::2] = values(0, (4, 3)).T[:, 2 * number : 2 * number + 2]
        expected = {
            "copy of sum": torch.full(SHAPE, 2.0),
            "copy of transposed": (values(0, SHAPE[::-1]) + values(1, SHAPE[::-1])).T.float(),
            "reduce transposed": sums.T,
            "reduce expanded": sums[:1].expand(SHAPE),
            "reduce stepped": sums[:, ::2],
            "reduce, strides differ": sums,
            "gather, strides differ": torch.cat([values(0), values(1)], 1),
            "gather expanded": torch.cat([values(0)[:1], values(1)[:1]], 1).expand(3, 8),
            "gather transposed": torch.cat([values(0).T, values(1).T], 1),
            "gather stepped": torch.cat([values(0)[:, ::2], values(1)[:, ::2]], 1),
            "gradient of stepped": gathered,
        }
        for name, tensor in expected.items():
            assert torch.equal(rank["not_contiguous"][name], tensor), name


WIDTH, INNER, OUTER, TOKENS = 6, 8, 10, 5


def full(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def own(tensor, rank, dim):
    return tensor.chunk(RANKS, dim)[rank].clone()


def column_row(rank, mp):
    torch.set_default_dtype(torch.float64)
    column, row = ColumnParallelLinear(WIDTH, INNER, mp), RowParallelLinear(INNER, OUTER, mp)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        column.weight.copy_(own(full(INNER, WIDTH), rank, 0))
        row.weight.copy_(own(full(OUTER, INNER), rank, 1))
    x = full(TOKENS, WIDTH).requires_grad_()
    out = row(F.silu(column(copy_to_model_parallel_region(x, mp))))
    out.backward(full(TOKENS, OUTER))
    return out.detach(), x.grad, column.weight.grad, row.weight.grad


def test_column_then_row_equals_the_plain_product(ranks):
    x, first, second = (t.requires_grad_() for t in (full(TOKENS, WIDTH), full(INNER, WIDTH), full(OUTER, INNER)))
    out = F.silu(x @ first.T) @ second.T
    out.backward(full(TOKENS, OUTER))
    for number, rank in enumerate(ranks):
        expected = (out.detach(), x.grad, own(first.grad, number, 0), own(second.grad, number, 1))
        for ours, plain in zip(rank["column_row"], expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


IDS = torch.tensor([[3, 0, 9], [3, 7, 3]])


def embedding(rank, mp):
    torch.set_default_dtype(torch.float64)
    layer = ParallelEmbedding(10, WIDTH, mp)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        layer.weight.copy_(own(full(10, WIDTH), rank, 1))
    out = layer(IDS)
    out.backward(full(*IDS.shape, WIDTH))
    return out.detach(), layer.weight.grad


def test_embedding_equals_the_plain_one(ranks):
    weight = full(10, WIDTH).requires_grad_()
    out = F.embedding(IDS, weight)
    out.backward(full(*IDS.shape, WIDTH))
    for number, rank in enumerate(ranks):
        ours, gradient = rank["embedding"]
        assert torch.equal(ours, out.detach())
        assert torch.equal(gradient, own(weight.grad, number, 1))


def construction(rank, mp):
    made = {}
    for name, layer in (("column", ColumnParallelLinear), ("row", RowParallelLinear), ("embedding", ParallelEmbedding)):
        with torch.device("meta"):
            made[name, "meta"] = layer(8, 6, mp).weight
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            torch.set_default_dtype(dtype)
            made[name, dtype] = layer(8, 6, mp).weight
    return {key: (weight.device.type, weight.dtype, tuple(weight.shape)) for key, weight in made.items()}


def test_layers_are_made_on_the_default_device_in_the_default_dtype(ranks):
    shapes = {"column": (3, 8), "row": (6, 4), "embedding": (8, 3)}
    for rank in ranks:
        for (name, what), (device, dtype, shape) in rank["construction"].items():
            assert shape == shapes[name]
            assert (device, dtype) == (("meta", torch.float32) if what == "meta" else ("cpu", what))


UNEVEN = {  # layout, what 4 does not divide, the sizes that divide everything
    "experts": ("mixtral", replace(TINY, moe=MoEArgs(6, 2)), "moe.num_experts 6", [1, 2]),
    "hidden": ("mixtral_sparse", replace(TINY, hidden_dim=26), "hidden_dim 26", [1, 2]),
    "heads": ("mixtral", replace(TINY, n_heads=6, n_kv_heads=6), "n_heads 6, n_kv_heads 6", [1, 2]),
    "key heads": ("mixtral_sparse", replace(TINY, n_heads=12, n_kv_heads=6), "n_kv_heads 6", [1, 2]),
    "vocabulary": ("mixtral", replace(TINY, vocab_size=63), "vocab_size 63", [1]),
    "width": ("mixtral_sparse", replace(TINY, dim=30), "dim 30", [1, 2]),
}
EVEN = [("mixtral", replace(TINY, hidden_dim=26)), ("mixtral_sparse", replace(TINY, moe=MoEArgs(6, 2)))]


def refusals():
    """Messages of the errors, and whether what only the other layout would cut is accepted."""
    messages = {}
    for size in (3, 8):
        with pytest.raises(UserError) as error:
            make_mesh(size)
        messages[size] = str(error.value)
    with pytest.raises(UserError) as error:
        make_mesh(2, 4)
    messages["shard"] = str(error.value)
    mesh = make_mesh(4)
    for name, (layout, args, _, _) in UNEVEN.items():
        with pytest.raises(UserError) as error:
            build(args, layout, Tensors({}), mesh=mesh)
        messages[name] = str(error.value)
    for layout, args in EVEN:
        build(args, layout, Tensors(weights(args)), mesh=mesh)
    return messages


def test_sizes_that_do_not_divide_are_refused_with_those_that_do():
    for messages in run_ranks(4, refusals):
        for size in (3, 8):
            assert f"model_parallel {size} " in messages[size] and "[1, 2, 4]" in messages[size]
        assert "shard_size 4 does not divide the 2 data-parallel ranks: use one of [1, 2]" in messages["shard"]
        for name, (layout, _, what, allowed) in UNEVEN.items():
            assert f"'{layout}'" in messages[name] and f"size 4 does not divide {what}:" in messages[name]
            assert messages[name].endswith(f"use one of {allowed}")


def axes(meshes):
    """Of each mesh and axis: this rank's place, the axis' size, and the ranks that its reduction meets."""
    found = {}
    for sizes in meshes:
        mesh = make_mesh(*sizes)
        for name in ("mp", "dp_shard", "dp_replicate", "dp", "world"):
            axis = getattr(mesh, name)
            met = axis.all_reduce(torch.nn.functional.one_hot(torch.tensor(dist.get_rank()), 8))
            found[sizes, name] = axis.rank, axis.size, met.nonzero().flatten().tolist()
        assert fairscale.get_model_parallel_rank() == mesh.mp.rank
        assert fairscale.get_data_parallel_world_size() == mesh.dp.size
    return found


def test_a_mesh_is_replicas_of_shards_of_model_parallel_ranks():
    """Of 8 ranks, mp innermost: by hand for each mesh what rank 5 meets along which axis."""
    expected = {
        (1, None): {"mp": [5], "dp_shard": [*range(8)], "dp_replicate": [5], "dp": [*range(8)]},
        (2, None): {"mp": [4, 5], "dp_shard": [1, 3, 5, 7], "dp_replicate": [5], "dp": [1, 3, 5, 7]},
        (2, 2): {"mp": [4, 5], "dp_shard": [5, 7], "dp_replicate": [1, 5], "dp": [1, 3, 5, 7]},
        (1, 4): {"mp": [5], "dp_shard": [4, 5, 6, 7], "dp_replicate": [1, 5], "dp": [*range(8)]},
        (2, 1): {"mp": [4, 5], "dp_shard": [5], "dp_replicate": [1, 3, 5, 7], "dp": [1, 3, 5, 7]},
        (8, None): {"mp": [*range(8)], "dp_shard": [5], "dp_replicate": [5], "dp": [5]},
    }
    every = run_ranks(8, axes, list(expected))
    for sizes, by_axis in expected.items():
        for name, ranks in (by_axis | {"world": [*range(8)]}).items():
            assert every[5][sizes, name] == (ranks.index(5), len(ranks), ranks), (sizes, name)
    for rank, found in enumerate(every):  # every other rank stands where those that it meets say it does
        for (sizes, name), (place, size, met) in found.items():
            assert met[place] == rank and len(met) == size, (sizes, name, rank)


def two_models():
    """Of models on both ranks together, on each alone, and sharded over both, made one after the other and run by turns."""
    w, batch = Tensors(weights()), collate(samples(4, seed=1))
    both, alone = make_mesh(2), mesh_of(None)
    models = [build(TINY, layout, w, mesh=mesh) for layout in layouts.LAYOUTS for mesh in (both, alone, make_mesh(1))]
    losses = []
    for model in models + models[::-1]:
        model.zero_grad()
        loss, _ = model(batch.inputs(), LossSum(batch.targets))
        (loss / model.mesh.dp.size).backward()  # data-parallel ranks have the same batch here
        gradient = harness.gradients(model)["norm.weight"][1]
        losses.append((loss.item(), gradient.norm().item()))
    return losses


def test_models_with_other_meshes_live_in_one_process():
    for losses in run_ranks(2, two_models):
        for loss, gradient in losses:
            assert loss == pytest.approx(losses[1][0], rel=1e-12) and gradient == pytest.approx(losses[1][1], rel=1e-12)
