"""Matrices rounded for the rows that come to them: GPTQ's codes by their definition, and products that change less."""

import argparse
import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import TINY, make_tokenizer, weights
from test_gptq import contents
from test_quantise import accessory

from accessory.certify import formats, reference
from accessory.checkpoint.calibrate import calibration_batches
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.open import Checkpoint
from accessory.checkpoint.tools import run_quantise
from accessory.data.tokenizer import Tokenizer
from accessory.errors import UserError
from accessory.model.args import MoEArgs
from accessory.model.codecs import get_codec
from accessory.model.logical import whole_region
from accessory.model.rounding import DAMPING, encode_for_rows
from accessory.settings import QuantiseSection

ARGS = replace(TINY, hidden_dim=48, vocab_size=304, sliding_window=None, max_seq_len=256, moe=MoEArgs(4, 2))
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


def correlated(rows, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, width // 4, generator=generator, dtype=torch.float64)
    every = torch.randn(width // 4, width, generator=generator, dtype=torch.float64)
    return few @ every + 0.1 * torch.randn(rows, width, generator=generator, dtype=torch.float64)


def rounded_block(codec, target, cost, grids):
    """Of a block near ``target`` [M, k], whose errors d cost d @ cost @ d: of each row the codes, scale and zero that cost
    least, one input rounded after the other with each grid, all behind it making up for those before by least squares."""
    order = []
    for _ in range(len(cost)):  # the last first: what it costs if those behind make up for it
        alone = {
            n: 1 / torch.linalg.inv(cost[[*order, n]][:, [*order, n]])[-1, -1] for n in range(len(cost)) if n not in order
        }
        order.append(min(alone, key=alone.get))
    order, tried = order[::-1], []
    for scale, zero in grids:
        codes, off = torch.empty(target.shape, dtype=torch.uint8), torch.zeros_like(target)
        for place, n in enumerate(order):
            done, rest = order[:place], order[place:]
            best = target[:, n] - torch.linalg.solve(cost[rest][:, rest], cost[rest][:, done] @ off[:, done].T)[0]
            codes[:, n : n + 1] = codec.nearest(best[:, None], scale, zero)
            off[:, n] = codec.numbers(codes[:, n : n + 1], scale, zero)[:, 0] - target[:, n]
        tried.append((((off @ cost) * off).sum(1), codes, scale, zero))
    best = torch.stack([each[0] for each in tried]).argmin(0).tolist()
    return tuple(torch.stack([tried[of_row][part][row] for row, of_row in enumerate(best)]) for part in (1, 2, 3))


def scale_that_fits(codec, w, cost, numbers, block, codes, scale, zero):
    """Of each row that of the block's codes with which all its numbers cost least: where the parabola has its end."""
    costs = []
    for more in (-0.1, 0, 0.1):
        changed = numbers.clone()
        changed[:, block] = codec.numbers(codes, scale * (1 + more), zero).double()
        costs.append((((changed - w) @ cost) * (changed - w)).sum(1, keepdim=True))
    below, here, above = costs
    return scale * (1 + 0.05 * (below - above) / (below - 2 * here + above)).clamp(0.5, 2)


@pytest.mark.parametrize("name", ["int4-8", "int3-16", "int2-16", "nf4-16", "int8"])
def test_codes_are_those_of_the_definition(name):
    """Block by block, those behind taking the values that make up best for those before by least squares from the start,
    each rounded with grids of 25 reaches; and twice more, beside all others as they are, with grids near what fits."""
    codec, x = get_codec(name), correlated(200, 48)
    w = torch.randn(24, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = x.T @ x
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(48)
    blocks = [slice(n, n + (codec.group or 48)) for n in range(0, 48, codec.group or 48)]
    numbers, held = w.clone(), []
    for block in blocks:
        behind = slice(block.start, None)
        lost = numbers[:, : block.start] - w[:, : block.start]
        best = w[:, behind] - torch.linalg.solve(damped[behind, behind], damped[behind, : block.start] @ lost.T).T
        best = best[:, : block.stop - block.start]
        inverse = torch.linalg.inv(damped[behind, behind])[: best.shape[1], : best.shape[1]]
        low, high = best.amin(1, keepdim=True), best.amax(1, keepdim=True)
        shares = list(itertools.product((1, 0.9, 0.8, 0.7, 0.6), repeat=2)) if codec.group else [(1, 1)]
        grids = [codec.grid(torch.cat([low * a, high * b], 1)) for a, b in shares]
        grids = grids if codec.group else [codec.grid(w)]
        held.append(rounded_block(codec, best, torch.linalg.inv(inverse), grids))
        numbers[:, block] = codec.numbers(*held[-1]).double()
    for _, (place, block) in itertools.product(range(2), enumerate(blocks)):
        codes, scale, zero = held[place]
        others = numbers - w
        others[:, block] = 0
        target = w[:, block] - torch.linalg.solve(damped[block, block], damped[block] @ others.T).T
        grids = [(scale, zero)]
        if codec.group:
            fit = scale_that_fits(codec, w, damped, numbers, block, codes, scale.double(), zero)
            more = (-1, 0, 1) if "int" in name else (0,)
            near = itertools.product((0.94, 0.97, 0.985, 1, 1.015, 1.03, 1.06), more)
            grids = [(codec.kept(fit * share), (zero + m).clamp(0, 2**codec.bits - 1)) for share, m in near]
        anew = rounded_block(codec, target, damped[block, block], grids)
        costs = [
            (((n - target) @ damped[block, block]) * (n - target)).sum(1, keepdim=True)
            for n in (codec.numbers(*some).double() for some in (held[place], anew))
        ]
        codes, scale, zero = (torch.where(costs[1] < costs[0], new, old) for new, old in zip(anew, held[place], strict=True))
        numbers[:, block] = codec.numbers(codes, scale, zero).double()
        for n in range(block.start, block.stop):
            off = numbers - w
            off[:, n] = 0
            wish = w[:, n] - off @ damped[n] / damped[n, n]
            codes[:, n - block.start] = codec.nearest(wish[:, None], scale, zero)[:, 0]
            numbers[:, n] = codec.numbers(codes[:, n - block.start, None], scale, zero).double()[:, 0]
        held[place] = codes, scale, zero
    ours = codec.decode(encode_for_rows(codec, w, gram), torch.float64)
    assert torch.equal(ours, numbers)
    nearest = codec.decode(codec.encode(w), torch.float64)
    assert (x @ (ours - w).T).norm() < 0.5 * (x @ (nearest - w).T).norm()


def test_inputs_that_never_come():
    """Neither an input that is always zero nor rows that say nothing make what is no number."""
    codec, x = get_codec("int4-8"), correlated(64, 16)
    x[:, 5] = 0
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for gram in (x.T @ x, torch.zeros(16, 16)):
        assert (codec.decode(encode_for_rows(codec, w, gram), torch.float64) - w).norm() < 0.2 * w.norm()
    w[2, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        encode_for_rows(codec, w, x.T @ x)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base in both layouts, whose tokens are near one another, and whose last expert hardly any token takes; and a mix."""
    home, rng = tmp_path_factory.mktemp("home"), random.Random(0)
    w = weights(ARGS, scale=5.0)  # in fp64, so that every code is the reference's
    w["tok_embeddings.weight"] = correlated(ARGS.vocab_size, ARGS.dim)
    w["tok_embeddings.weight"][:, 0] += 4
    w["layers.0.feed_forward.gate.weight"][3, 0] = -9
    formats.write(home / "sparse", w, ARGS, "mixtral_sparse", 2)
    formats.write(home / "hf", w, ARGS, "hf", 1)
    make_tokenizer(home / "sparse/tokenizer.model")
    make_tokenizer(home / "hf/tokenizer.model")
    records = [{"text": "".join(rng.choices(LETTERS, k=120))} for _ in range(48)]
    (home / "texts.jsonl").write_text("\n".join(map(json.dumps, records)))
    (home / "mix.yaml").write_text("META: [{path: texts.jsonl}]")
    return home


def numbers(checkpoint):
    """All that a checkpoint's tensors, quantised or not, stand for."""
    return {name: checkpoint.read(name, whole_region(shape)).double() for name, shape in checkpoint.logical.dense.items()}


def rows_of_matrices(w, documents):
    """By the reference: what comes to each matrix, or to each expert's, over all ``documents``."""
    found = {}
    for tokens in documents:
        x = w["tok_embeddings.weight"][tokens]
        for n in range(ARGS.n_layers):
            layer, rows = reference.layer_of(w, n), {}
            h = reference.norm(x, layer["attention_norm.weight"], ARGS.norm_eps)
            heads = reference.attention(h, layer | {"attention.wo.weight": torch.eye(64, dtype=x.dtype)}, ARGS)
            rows |= {"wq": h, "wk": h, "wv": h, "wo": heads}
            x = x + heads @ layer["attention.wo.weight"].T
            h = reference.norm(x, layer["ffn_norm.weight"], ARGS.norm_eps)
            share = reference.routing(h, layer, ARGS)[2]
            for e in range(4):
                own, (w1, w3) = share[:, e] > 0, (layer[f"feed_forward.experts.{m}"][e] for m in ("w1", "w3"))
                hidden = F.silu(h[own] @ w1.T) * (h[own] @ w3.T) * share[own, e : e + 1]
                rows |= {f"w1 {e}": h[own], f"w3 {e}": h[own], f"w2 {e}": hidden}
            x = x + reference.experts(h, share, layer)
            for name, some in rows.items():
                found.setdefault(f"{n} {name}", []).append(some)
    return {name: torch.cat(some) for name, some in found.items()}


def matrix_of(w, name):
    layer, matrix, *expert = name.split()
    if expert:
        return w[f"layers.{layer}.feed_forward.experts.{matrix}"][int(*expert)]
    return w[f"layers.{layer}.attention.{matrix}.weight"]


def by_the_reference(w, documents):
    """What the matrices of a model stand for once they are rounded in turn, each for the rows that come to it through those
    before; and experts with few rows."""
    w, codec, few = {name: tensor.clone() for name, tensor in w.items()}, get_codec("int4-8"), set()
    for n in range(ARGS.n_layers):
        for stage in (("wq", "wk", "wv"), ("wo",), ("w1", "w3"), ("w2",)):
            rows = rows_of_matrices(w, documents)
            for name, x in rows.items():
                if name.split()[0] == str(n) and name.split()[1] in stage:
                    matrix = matrix_of(w, name)
                    few |= {name} if len(x) < 256 else set()
                    parts = codec.encode(matrix) if name in few else encode_for_rows(codec, matrix, x.T @ x)
                    matrix.copy_(codec.decode(parts, torch.float64))
    return w, few


def test_the_command(home, tmp_path):
    """Files of either layout are rounded as by the reference, and products with other rows of the kind change less."""
    how = ("--experts", "int4-8", "--attention", "int4-8", "--calibrate", home / "mix.yaml", "--tokens", "1200")
    told = accessory("quantise", home / "sparse", tmp_path / "ours", *how)
    accessory("quantise", home / "hf", tmp_path / "gptq", *how, "--to", "gptq")
    convert(Checkpoint(tmp_path / "gptq"), tmp_path / "back", Target("mixtral"))
    ours, theirs = ({k: v for k, v in contents(tmp_path / d).items() if "tensors" in k} for d in ("ours", "back"))
    assert ours == theirs
    w, calibrated = numbers(Checkpoint(home / "hf")), numbers(Checkpoint(tmp_path / "ours"))
    nearest = numbers(Checkpoint(home / "hf", quantise=QuantiseSection("int4-8", "int4-8")))
    batches = calibration_batches(Checkpoint(home / "hf"), home / "mix.yaml", 1200, 0)
    documents = [some for batch in batches for some in batch.tokens.split(batch.documents.lengths)]
    expected, few = by_the_reference(w, documents)
    assert all(torch.equal(calibrated[name], tensor) for name, tensor in expected.items())
    assert "layer 0: fewer than 256 rows come to expert 3 (" in told and few == {f"0 w{m} 3" for m in (1, 2, 3)}
    tokenizer, rng, measured = Tokenizer(home / "hf/tokenizer.model"), random.Random(1), 0
    documents = [torch.tensor(tokenizer.encode("".join(rng.choices(LETTERS, k=120)), True, False)) for _ in range(15)]
    for name, x in rows_of_matrices(w, documents).items():
        if len(x) >= 256 and name not in few:
            lost, before = ((x @ (matrix_of(v, name) - matrix_of(w, name)).T).norm() for v in (calibrated, nearest))
            assert lost <= 0.6 * before, name
            measured += 1
    assert measured > 20


def test_what_cannot_be_calibrated(home, tmp_path):
    convert(Checkpoint(home / "hf", quantise=QuantiseSection("int4-8")), tmp_path / "int4", Target("mixtral"))
    convert(Checkpoint(home / "hf"), tmp_path / "bare", Target("hf"))
    for path in (tmp_path / "bare").glob("tokenizer*"):
        path.unlink()
    for source, mp, told in (
        (tmp_path / "int4", 1, r"is quantised \(experts int4-8\) already: calibrate its original"),
        (tmp_path / "bare", 1, "no tokenizer in it"),
        (home / "hf", 2, "writes one part: leave --mp away"),
    ):
        options = {"sources": [source], "destination": tmp_path / "d", "experts": "int4-8", "attention": None, "mp": mp}
        options |= {"to": "mixtral", "config": None, "force": False, "calibrate": home / "mix.yaml", "tokens": 99, "seed": 0}
        with pytest.raises(UserError, match=told):
            run_quantise(argparse.Namespace(**options))
