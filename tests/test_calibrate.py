"""Matrices rounded for the rows that come to them: GPTQ's codes by their definition, and products that change less."""

import argparse
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


@pytest.mark.parametrize("name", ["int4-8", "nf4-16", "int8"])
def test_codes_are_those_of_the_definition(name):
    """Input by input: all that are not rounded yet take the values that make up best, by least squares from the start, for
    those that are; then the next is rounded to the nearest. A block's grid is chosen where its first is met: of narrower and
    narrower ones that by which a row loses least, each input's error counting as what those behind it cannot make up for."""
    codec, x = get_codec(name), correlated(200, 48)
    w = torch.randn(6, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = x.T @ x
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(48)
    fixed, group = torch.empty(6, 0, dtype=torch.float64), codec.group or 48
    for n in range(48):
        lost = fixed - w[:, :n]
        best = w[:, n:] - torch.linalg.solve(damped[n:, n:], damped[n:, :n] @ lost.T).T
        if n % group == 0:
            weight = torch.tensor([1 / torch.linalg.inv(damped[m:, m:])[0, 0] for m in range(n, n + group)])
            grids = [codec.grid(best[:, :group] * share) for share in (1, 0.95, 0.9, 0.85, 0.8)]
            values = [codec.numbers(codec.nearest(best[:, :group], *grid), *grid) for grid in grids]
            lost = [((some - best[:, :group]) ** 2 * weight).sum(1).tolist() for some in values]
            chosen = [min(range(5), key=[of[row] for of in lost].__getitem__) for row in range(6)]
            grid = [torch.stack([grids[c][n][row] for row, c in enumerate(chosen)]) for n in range(2)]
        rounded = codec.numbers(codec.nearest(best[:, :1], *grid), *grid)
        fixed = torch.cat([fixed, rounded.double()], 1)
    ours = codec.decode(encode_for_rows(codec, w, gram), torch.float64)
    assert torch.equal(ours, fixed)
    nearest = codec.decode(codec.encode(w), torch.float64)
    assert (x @ (ours - w).T).norm() < 0.6 * (x @ (nearest - w).T).norm()


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
