"""Packing: documents that share a row give the numbers they give alone, and rows are full."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import TINY, Tensors, assemble, build, check_close, samples, train, weights
from ranks import run_ranks

from accessory.data.loader import BatchPlan, collate
from accessory.data.mix import Sample
from accessory.data.order import permute
from accessory.data.packing import Rows, best_fit
from accessory.model import attention
from accessory.model.decoder import Inputs
from accessory.model.documents import Documents
from accessory.model.head import Logits, LossSum
from accessory.settings import LoraSection, TuningSection
from accessory.train.balance import document_balance, global_balance
from accessory.tuning.spec import resolve


def random_order(count, seed):
    return permute(np.arange(count), count, seed)


STEPS = [samples(13, seed=1), samples(11, seed=2)]
WIDTH = 28  # one to five documents a row; the window of 6 is shorter than most of them
LAYOUTS = ("mixtral", "mixtral_sparse")
PARTITIONS = {1: [(1, "fsdp")], 2: [(2, "fsdp"), (1, "fsdp")], 4: [(2, "fsdp")]}  # world: (model parallel, data parallel)


def tuning():
    """LoRA with dropout on every matrix, biases, and the norms."""
    lora = LoraSection(rank=3, dropout=0.3, targets=("attention", "experts", "router", "output"))
    section = TuningSection(lora=lora, bias=True, train=("norms",))
    spec = resolve(section, TINY, seed=5)
    return {"adapters": spec.logical.adapters, "trains": spec.trains}


def step_both_ways(world):
    """{(layout, mp, tuned): (alone, packed)}"""
    results = {}
    for mp, mode in PARTITIONS[world]:
        for layout in LAYOUTS:
            for tuned in (False, True):
                options = {
                    "balance": "document" if tuned else "global",
                    "recompute": "norms_and_experts" if tuned == (layout == "mixtral") else "none",
                }
                options |= tuning() if tuned else {}
                results[layout, mp, tuned] = [
                    train(TINY, layout, mp, mode, STEPS, accumulation=2, width=width, **options) for width in (None, WIDTH)
                ]
    return results


@pytest.mark.parametrize("world", PARTITIONS)
def test_a_packed_step_is_the_unpacked_one(world):
    ranks = run_ranks(world, step_both_ways, world, timeout=240)
    for key in ranks[0]:
        _, _, tuned = key
        adapters = tuning()["adapters"] if tuned else None
        alone, packed = ([rank[key][way] for rank in ranks] for way in range(2))
        for ours, expected in zip(packed[0]["steps"], alone[0]["steps"], strict=True):
            assert torch.equal(ours["counts"], expected["counts"]), key
            for what in ("loss", "balance", "z-loss", "norm"):
                assert ours[what] == pytest.approx(expected[what], rel=1e-10), (key, what)
        for what in ("gradients", "weights"):
            full = [assemble([part[what] for part in way], adapters=adapters) for way in (packed, alone)]
            assert len(full[0]) > 20
            check_close(full[0], full[1], 1e-10, (key, what))


def packed_batch(documents):
    rows = best_fit([len(s.tokens) for s in documents], WIDTH)
    order = [place for row in rows for place in row]
    assert max(len(row) for row in rows) > 2
    return collate([documents[place] for place in order], keys=order), order


def statistics(layout, recompute):
    """Statistics of each document, and both balance losses, packed and alone."""
    options = tuning()
    model = build(TINY, layout, Tensors(weights(adapters=options["adapters"])), recompute=recompute, **options)
    batch, order = packed_batch(STEPS[0])
    results = []
    for b, inverse in ((collate(STEPS[0]), slice(None)), (batch, torch.tensor(order).argsort())):
        loss, stats = model(b.inputs(dropout=True), LossSum(b.targets))
        tokens = torch.tensor(b.real_tokens)
        balances = [global_balance(stats, stats.counts.sum(1), 2), document_balance(stats, tokens, 2)]
        results.append([loss, stats.counts[:, inverse], stats.probs[:, inverse], *balances])
    return [[x.detach() for x in result] for result in results]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_are_those_of_each_document(layout):
    ((alone, packed),) = run_ranks(1, statistics, layout, "block" if layout == "mixtral" else "norms_and_experts")
    assert alone[1].shape == (TINY.n_layers, len(STEPS[0]), TINY.moe.num_experts)
    assert torch.equal(alone[1], packed[1])
    for ours, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert alone[3].item() != pytest.approx(alone[4].item(), rel=1e-3)


def change_each(layout, gate):
    """Per document, by how much changing its first token moved the logits of all others, and its own.

    ``gate`` scales the router's weights. With 0 all tokens go to the same experts, whose products then keep their
    shape; else a product of other rows may round differently.
    """
    w = {name: tensor * gate if name.endswith("gate.weight") else tensor for name, tensor in weights().items()}
    model = build(TINY, layout, Tensors(w))
    batch, _ = packed_batch(STEPS[0])
    with torch.no_grad():
        before, _ = model(batch.inputs(), Logits())
        results = []
        for number in range(1, batch.documents.count + 1):
            mine = batch.documents.document_of == number
            tokens = torch.where(mine & (batch.documents.positions == 0), (batch.tokens + 1) % TINY.vocab_size, batch.tokens)
            after, _ = model(Inputs(tokens, batch.documents), Logits())
            results.append([(after - before)[some].abs().max().item() for some in (~mine, mine)])
    return results


@pytest.mark.parametrize(("gate", "rounding"), [(0.0, 0.0), (1.0, 1e-12)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_crosses_a_border(layout, gate, rounding):
    (results,) = run_ranks(1, change_each, layout, gate)
    assert len(results) == len(STEPS[0])
    assert all(others <= rounding and mine > 1e-3 for others, mine in results), results


def by_mask(q, k, v, documents, window):
    """Attention under one dense mask over the whole batch."""
    number, steps = documents.document_of, torch.arange(len(q))
    distance = steps[:, None] - steps
    mask = (number[:, None] == number) & (distance >= 0) & (distance < (window or len(steps)))
    flat = (x.transpose(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(*flat, attn_mask=mask, enable_gqa=True).transpose(0, 1)


LENGTHS = [5, 5, 7, 20, 1, 9, 9, 1]


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(sum(LENGTHS), heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("window", [None, 1, 4, 9, 100])
def test_attention_equals_one_under_a_mask(window):
    documents = Documents.of(LENGTHS)
    results = []
    for attend in (attention.attend, by_mask):
        leaves = [x.requires_grad_() for x in qkv()]
        out = attend(*leaves, documents, window)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 6, 7, 36, 41, 43])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 7])
def test_attention_over_many_windows(length, window):
    """Up to 43 windows, the last of them full or not, against a masked softmax."""
    generator = torch.Generator().manual_seed(length)
    leaves = [torch.randn(2, heads, length, 4, dtype=torch.float64, generator=generator) for heads in (6, 2, 2)]
    q, k, v = (x.requires_grad_() for x in leaves)
    behind = torch.arange(length)[:, None] - torch.arange(length)
    scores = q @ k.repeat_interleave(3, 1).mT / math.sqrt(4)
    expected = scores.masked_fill((behind < 0) | (behind >= window), -math.inf).softmax(-1) @ v.repeat_interleave(3, 1)
    out = attention.causal_attention(q, k, v, window)
    back = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    ours, theirs = ([y, *torch.autograd.grad(y, leaves, back)] for y in (out, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def as_documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
    """What torch.nn.attention.varlen.varlen_attn says it does; as in torch 2.11, which knows nothing of shared heads."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and query.shape == key.shape == value.shape
    assert cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query) and torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == cu_seq_q.diff().max()
    left, right = (math.inf if side < 0 else side for side in window_size)
    out = torch.empty_like(query)
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        steps = torch.arange(stop - start)
        ahead = steps - steps[:, None]
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        seen = (ahead >= -left) & (ahead <= right)
        out[start:stop] = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1)
    return out


def as_documented_later(query, key, value, *arguments, window_size, enable_gqa=False):
    """The same from torch 2.12 on."""
    assert enable_gqa
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return as_documented(query, key, value, *arguments, window_size=window_size)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("kernel", [as_documented, as_documented_later])
def test_what_the_gpu_kernel_is_asked_for(kernel, window, monkeypatch):
    documents = Documents.of(LENGTHS)
    monkeypatch.setattr(attention, "varlen_kernel", lambda: kernel)
    monkeypatch.setattr(attention, "varlen_runs", lambda *_: True)
    out, expected = (attend(*qkv(), documents, window) for attend in (attention.attend, by_mask))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_batch_says_where_its_documents_lie():
    first, second, third = (Sample(list(range(n, n + n)), [True] * n) for n in (3, 2, 4))
    batch = collate([first, second, third], keys=[7, 8, 9])
    assert batch.tokens.tolist() == [3, 4, 5, 2, 3, 4, 5, 6, 7]
    assert batch.documents.document_of.tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 3]
    assert batch.documents.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert batch.documents.borders.tolist() == [0, 3, 5, 9] and batch.documents.lengths == (3, 2, 4)
    assert batch.targets.rows.tolist() == [0, 1, 3, 5, 6, 7]  # no first token is a target, though all are trained
    assert batch.targets.ids.tolist() == [4, 5, 3, 5, 6, 7]
    assert batch.sample_keys.tolist() == [7, 8, 9] and (batch.real_tokens, batch.target_tokens) == (9, 6)
    first, second, third = (Sample(np.array(s.tokens), np.array(s.trained)) for s in (first, second, third))
    arrays = collate([first, second, third])
    assert torch.equal(arrays.tokens, batch.tokens) and torch.equal(arrays.targets.rows, batch.targets.rows)


@pytest.mark.parametrize("seed", range(30))
def test_every_sample_once_and_no_row_too_long(seed):
    rng = random.Random(seed)
    width = rng.choice([1, 2, 7, 64, 2048])
    lengths = np.array([rng.randint(1, width) for _ in range(rng.choice([1, 2, 50, 3000]))])
    order = random_order(len(lengths), f"{seed}/{0}")
    rows = Rows.packed(order, lengths, width)
    held = [rows[i] for i in range(len(rows))]
    assert sorted(i for row in held for i in row) == list(range(len(lengths)))
    assert all(row and lengths[row].sum() <= width for row in held)
    again = Rows.packed(order, lengths, width)
    assert [again[i] for i in range(len(again))] == held


@pytest.mark.parametrize("cut", [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (2, 1, 4), (1, 2, 4)])
def test_global_batches_hold_the_same_rows_for_every_cut(cut):
    batch_size, accumulation, world = cut
    documents = [Sample([i, *s.tokens[1:]], s.trained) for i, s in enumerate(samples(150, seed=3))]
    rows = Rows.packed(random_order(150, f"{0}/{0}"), np.array([len(s.tokens) for s in documents]), 40)
    plans = [BatchPlan(batch_size, accumulation, rank, world) for rank in range(world)]
    ranks = [list(plan.epoch(documents, rows)) for plan in plans]
    for step, parts in enumerate(zip(*ranks, strict=True)):
        batches = [batch for part in parts for batch in part]
        assert all(b.real_tokens <= batch_size * 40 for b in batches)
        first = [b.tokens[b.documents.borders[: b.documents.count]] for b in batches]
        expected = Counter(i for row in range(step * 8, min(len(rows), step * 8 + 8)) for i in rows[row])
        seen = torch.cat([b.sample_keys for b in batches])
        assert Counter(torch.cat(first).tolist()) == expected == Counter(seen.tolist())


def test_rows_hold_others_every_epoch():
    lengths = np.random.default_rng(0).integers(10, 200, 5000)
    epochs = [Rows.packed(random_order(5000, f"{0}/{epoch}"), lengths, 512) for epoch in range(2)]
    first, second = ({frozenset(rows[i]) for i in range(len(rows))} for rows in epochs)
    assert len(first & second) < 0.05 * len(first)


@pytest.mark.parametrize(("mu", "sigma", "width"), [(6.8, 0.6, 4096), (6.8, 0.6, 2048), (4.6, 0.6, 2048), (6.0, 1.3, 2048)])
def test_rows_are_full(mu, sigma, width):
    """Lengths of long dialogues (UltraChat's mean is about 1000 tokens), short instructions, and the open web."""
    lengths = np.random.default_rng(0).lognormal(mu, sigma, 20_000).astype(int).clip(10, width)
    rows = Rows.packed(random_order(len(lengths), f"{0}/{0}"), lengths, width)
    assert lengths.sum() / (len(rows) * width) > 0.98
