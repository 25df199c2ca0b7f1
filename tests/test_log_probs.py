"""The log-probability of each target: torch's own numbers and gradients, in chunks that are computed again in backward."""

import pytest
import torch
import torch.nn.functional as F
from models import TINY, Tensors, assemble, build, samples, weights
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from accessory.certify import harness, reference
from accessory.data.loader import collate
from accessory.model.adapter import Adapter
from accessory.model.head import Logits, LogProbs, LossSum, Predictions
from accessory.parallel import cross_entropy
from accessory.parallel.cross_entropy import linear_log_probs
from accessory.parallel.mesh import Axis, make_mesh
from accessory.parallel.regions import copy_to_model_parallel_region

DIM, VOCABULARY, CHUNK, RANK = 8, 48, 5, 3
LENGTHS = [0, 1, CHUNK, 2 * CHUNK + 2]
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}
SCALES = (1.0, 1e4)  # exp() of logits that large overflows


def inputs(rows, scale, dtype=torch.float64):
    """x and W of the output layer and of its adapter, targets, and a weight for each row."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, DIM), (VOCABULARY, DIM), (rows, RANK), (VOCABULARY, RANK), (rows,))
    x, w, low, b, weights = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    factors = [t.to(dtype) for t in (x * scale, w, low, b)]
    return factors, torch.randint(VOCABULARY, (rows,), generator=generator), weights


def loss_of(log_probs, weights):
    """One whose gradient is another for each row, and depends on the values."""
    return (weights.to(log_probs.dtype) * log_probs).sum() + F.logsigmoid(log_probs[::2] + 4).sum()


def run_log_probs(world):
    cross_entropy.CHUNK["cpu"] = CHUNK
    mp = make_mesh(world).mp
    part = slice(mp.rank * VOCABULARY // world, (mp.rank + 1) * VOCABULARY // world)
    results = {}
    for rows, scale, dtype in ((r, s, d) for r in LENGTHS for s in SCALES for d in DTYPES):
        (x, w, low, b), targets, weights = inputs(rows, scale, dtype)
        x, w, low, b = (t.detach().clone().requires_grad_() for t in (x, w[part], low, b[part]))
        entered = (copy_to_model_parallel_region(t, mp) for t in (x, low))
        log_probs = linear_log_probs(list(zip(entered, (w, b), strict=True)), targets, mp)
        loss_of(log_probs, weights).backward()
        results[rows, scale, dtype] = log_probs.detach(), x.grad, low.grad, w.grad, b.grad
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_they_are_torchs_own(world):
    ranks = run_ranks(world, run_log_probs, world)
    for (rows, scale, dtype), parts in {key: [rank[key] for rank in ranks] for key in ranks[0]}.items():
        if dtype != torch.float64 and scale > 1:  # rounding of the logits is all that would be seen
            continue
        (x, w, low, b), targets, weights = inputs(rows, scale, dtype)
        x, w, low, b = (t.double().requires_grad_() for t in (x, w, low, b))
        expected = (x @ w.T + low @ b.T).log_softmax(-1)[torch.arange(rows), targets]
        loss_of(expected, weights).backward()
        for log_probs, d_x, d_low, *_ in parts:
            assert log_probs.dtype == torch.promote_types(dtype, torch.float32) and d_x.dtype == dtype
            close(log_probs, expected.detach(), DTYPES[dtype])
            close(d_x, x.grad, DTYPES[dtype])
            close(d_low, low.grad, DTYPES[dtype])
        close(torch.cat([d_w for *_, d_w, _ in parts]), w.grad, DTYPES[dtype])
        close(torch.cat([d_b for *_, d_b in parts]), b.grad, DTYPES[dtype])


def close(ours, expected, tolerance):
    """As far apart as ``tolerance`` of the largest value at most."""
    assert ours.shape == expected.shape
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * largest)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            self.numbers = max(self.numbers, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out


def test_nothing_of_rows_times_vocabulary_is_made_or_kept(monkeypatch, rows=40):
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", CHUNK)
    (x, w, _, _), targets, weights = inputs(rows, 1.0)
    x.requires_grad_(), w.requires_grad_()
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(linear_log_probs([(x, w)], targets, Axis()), weights).backward()
    largest = max(x.numel(), w.numel(), CHUNK * VOCABULARY)
    assert seen.numbers == largest < rows * VOCABULARY
    assert sum(kept) <= x.numel() + w.numel() + 10 * rows


SAMPLES = samples(5, seed=6)
LORA = {"output.weight": Adapter(rank=RANK, scaling=0.5)}


def preference(log_probs, sizes):
    """Of pairs of documents, the first to be preferred: the loss of each needs both (Rafailov et al. 2023, DPO)."""
    first, second, *_ = (part.sum() for part in log_probs.split(sizes))
    return -F.logsigmoid(0.1 * (first - second))


def predictions(model, batch):
    """Tokens of which every other is the likeliest, and how they are predicted."""
    with torch.no_grad():
        logits, _ = model(batch.inputs(), Logits(batch.targets.rows))
        ids = torch.where(torch.arange(len(logits)) % 2 == 0, logits.argmax(1), batch.targets.ids)
        return ids, model(batch.inputs(), Predictions(batch.targets._replace(ids=ids)))[0]


def run_head(mp):
    batch = collate(SAMPLES)
    sizes = [sum(sample.trained) for sample in SAMPLES]
    results = []
    for layout, adapters in (("mixtral", {}), ("mixtral", LORA), ("mixtral_sparse", LORA)):
        model = build(TINY, layout, Tensors(weights(adapters=adapters)), mesh=make_mesh(mp), adapters=adapters)
        log_probs, _ = model(batch.inputs(), LogProbs(batch.targets))
        loss_sum, _ = model(batch.inputs(), LossSum(batch.targets))
        preference(log_probs, sizes).backward()
        results.append((log_probs.detach(), loss_sum.item(), harness.gradients(model), predictions(model, batch)))
    return results


@pytest.mark.parametrize("mp", [1, 2])
def test_a_model_can_be_trained_by_them(mp):
    ranks = run_ranks(mp, run_head, mp)
    for index, adapters in enumerate(({}, LORA, LORA)):
        w = {name: t.requires_grad_() for name, t in weights(adapters=adapters).items()}
        rows, ids = [], []
        for sample in SAMPLES:
            tokens = torch.tensor(sample.tokens)
            places = torch.tensor(sample.trained).nonzero().squeeze(1)
            rows.append(reference.forward(w, TINY, tokens, scaling=0.5)[0][places - 1])
            ids.append(tokens[places])
        expected = [logits.log_softmax(-1)[range(len(own)), own] for logits, own in zip(rows, ids, strict=True)]
        preference(torch.cat(expected), [len(part) for part in expected]).backward()
        logits = torch.cat(rows).detach()
        for log_probs, loss_sum, _, (asked, predicted) in (rank[index] for rank in ranks):
            close(predicted[0], logits.log_softmax(-1)[range(len(asked)), asked], 1e-12)
            assert predicted[1].tolist() == (logits.argmax(1) == asked).tolist() and 1 < predicted[1].sum() < len(asked)
            close(log_probs, torch.cat(expected).detach(), 1e-12)
            assert -log_probs.sum().item() == pytest.approx(loss_sum, rel=1e-12)
        gradients = assemble([rank[index][2] for rank in ranks], adapters=adapters)
        assert gradients.keys() == w.keys()
        for name, gradient in gradients.items():
            close(gradient, w[name].grad, 1e-9)
