"""What accessory.parallel.tensor corrects in fairscale, and layers that equal plain ones, on two ranks."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import TINY, Tensors, build, weights
from ranks import run_ranks

from accessory.errors import UserError
from accessory.model.args import MoEArgs
from accessory.parallel.tensor import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    initialize_groups,
    reduce_from_model_parallel_region,
)

RANKS = 2
SHAPE = (3, 4)


def values(rank, shape=SHAPE):
    """Other numbers on each rank, exact in any order of addition."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) * 10 + rank


def everything():
    """What each part below gives on this rank."""
    initialize_groups(RANKS)
    parts = (shared_gradients, reduce_leaf, not_contiguous, column_row, embedding, construction)
    return {part.__name__: part(dist.get_rank()) for part in parts}


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(RANKS, everything)


def shared_gradients(rank):
    leaf = torch.ones(SHAPE, requires_grad=True)
    (leaf + copy_to_model_parallel_region(leaf)).backward(torch.ones(SHAPE))
    inner = torch.ones(SHAPE, requires_grad=True)
    z = inner * 1
    (z + copy_to_model_parallel_region(z)).backward(torch.ones(SHAPE))
    given = torch.ones(SHAPE)
    copy_to_model_parallel_region(torch.ones(SHAPE, requires_grad=True)).backward(given)
    return leaf.grad, inner.grad, given


def test_copy_to_leaves_a_shared_gradient_alone(ranks):
    for rank in ranks:
        leaf, inner, given = rank["shared_gradients"]
        assert torch.equal(leaf, torch.full(SHAPE, 3.0))  # 1 from the sum, 2 from the two ranks
        assert torch.equal(inner, torch.full(SHAPE, 3.0))
        assert torch.equal(given, torch.ones(SHAPE))


def reduce_leaf(rank):
    leaf = values(rank).requires_grad_()
    out = reduce_from_model_parallel_region(leaf)
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


def not_contiguous(rank):
    results = {}
    x = torch.ones(SHAPE, requires_grad=True)
    copy_to_model_parallel_region(x).sum().backward()  # an expanded gradient
    results["copy of sum"] = x.grad
    x = torch.ones(SHAPE, requires_grad=True)
    copy_to_model_parallel_region(x).backward(values(rank, SHAPE[::-1]).T)
    results["copy of transposed"] = x.grad
    results["reduce transposed"] = reduce_from_model_parallel_region(values(rank).T)
    results["reduce expanded"] = reduce_from_model_parallel_region(values(rank)[:1].expand(SHAPE))
    results["reduce stepped"] = reduce_from_model_parallel_region(values(rank)[:, ::2])
    results["reduce, strides differ"] = reduce_from_model_parallel_region(strides_of_its_own(rank))
    results["gather, strides differ"] = gather_from_model_parallel_region(strides_of_its_own(rank))
    results["gather expanded"] = gather_from_model_parallel_region(values(rank)[:1].expand(SHAPE))
    results["gather transposed"] = gather_from_model_parallel_region(values(rank).T)
    x = values(rank).requires_grad_()
    out = gather_from_model_parallel_region(x[:, ::2])
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


def column_row(rank):
    torch.set_default_dtype(torch.float64)
    column, row = ColumnParallelLinear(WIDTH, INNER), RowParallelLinear(INNER, OUTER)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        column.weight.copy_(own(full(INNER, WIDTH), rank, 0))
        row.weight.copy_(own(full(OUTER, INNER), rank, 1))
    x = full(TOKENS, WIDTH).requires_grad_()
    out = row(F.silu(column(copy_to_model_parallel_region(x))))
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


def embedding(rank):
    torch.set_default_dtype(torch.float64)
    layer = ParallelEmbedding(10, WIDTH)
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


def construction(rank):
    made = {}
    for name, layer in (("column", ColumnParallelLinear), ("row", RowParallelLinear), ("embedding", ParallelEmbedding)):
        with torch.device("meta"):
            made[name, "meta"] = layer(8, 6).weight
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            torch.set_default_dtype(dtype)
            made[name, dtype] = layer(8, 6).weight
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
    "key heads": ("mixtral_sparse", replace(TINY, n_kv_heads=1), "n_kv_heads 1", [1]),
    "vocabulary": ("mixtral", replace(TINY, vocab_size=63), "vocab_size 63", [1]),
    "width": ("mixtral_sparse", replace(TINY, dim=30), "dim 30", [1, 2]),
}
EVEN = [("mixtral", replace(TINY, hidden_dim=26)), ("mixtral_sparse", replace(TINY, moe=MoEArgs(6, 2)))]


def refusals():
    """Messages of the errors, and whether what only the other layout would cut is accepted."""
    messages = {}
    for size in (3, 8):
        with pytest.raises(UserError) as error:
            initialize_groups(size)
        messages[size] = str(error.value)
    initialize_groups(4)
    for name, (layout, args, _, _) in UNEVEN.items():
        with pytest.raises(UserError) as error:
            build(args, layout, Tensors({}))
        messages[name] = str(error.value)
    for layout, args in EVEN:
        build(args, layout, Tensors(weights(args)))
    return messages


def test_sizes_that_do_not_divide_are_refused_with_those_that_do():
    for messages in run_ranks(4, refusals):
        for size in (3, 8):
            assert f"model_parallel {size} " in messages[size] and "[1, 2, 4]" in messages[size]
        for name, (layout, _, what, allowed) in UNEVEN.items():
            assert f"'{layout}'" in messages[name] and f"size 4 does not divide {what}:" in messages[name]
            assert messages[name].endswith(f"use one of {allowed}")
