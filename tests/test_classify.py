"""A classifier: the numbers of transformers' MixtralForSequenceClassification, and a run from labelled records to its use."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import TINY, Tensors, build, mesh_for, samples, weights
from ranks import run_ranks
from test_transformers import by_logical_name
from transformers import MixtralForSequenceClassification
from transformers.models.mixtral import modeling_mixtral

from accessory.certify import formats
from accessory.certify.judge import assemble, distance, relative
from accessory.certify.parity import grid
from accessory.certify.run import gradients
from accessory.checkpoint.convert import Target, convert
from accessory.checkpoint.open import Checkpoint
from accessory.data.loader import collate
from accessory.model.head import Logits
from accessory.model.logical import LogicalModel
from accessory.model.moe.layouts import get_layout
from accessory.train.objective import Classification

LABELS = ("no", "so", "yes")
ARGS = replace(TINY, rope_scaling=None, labels=LABELS)


def labelled(count, seed):
    """Samples that do not end with the padding, which is what transformers finds their end by."""
    found = enumerate(samples(count, seed))
    return [replace(s, tokens=[*s.tokens[:-1], 5], label=(7 * n + seed) % len(LABELS)) for n, s in found]


class InFp64:
    """torch, for transformers' Mixtral, which computes norms, routers and positions in fp32."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def fp64(monkeypatch):
    monkeypatch.setattr(modeling_mixtral, "torch", InFp64())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def write(directory, w, args=ARGS, format="mixtral_sparse", size=1):
    """The checkpoint of logical tensors."""
    formats.write(directory, w, args, format, size)
    return directory


def run_ours(layout, mp, w, batch):
    model = build(ARGS, layout, Tensors(w), mesh=mesh_for(mp))
    with torch.no_grad():
        logits, _ = model(batch.inputs(), Logits(batch.documents.ends))
    found = Classification().loss(model, batch)
    (found.loss_sum / Classification().targets(batch)).backward()
    return {"logits": logits, "loss": found.loss_sum.item() / batch.documents.count, "gradients": gradients(model)}


@pytest.mark.parametrize("mp", [1, 2])
@pytest.mark.parametrize("layout", ["mixtral", "mixtral_sparse"])
def test_logits_loss_and_gradients_are_those_of_transformers(layout, mp, tmp_path, fp64):
    """In fp64, the weights brought there by a conversion; documents of all lengths are padded there."""
    w, batch = weights(ARGS), collate(labelled(7, seed=5))
    ranks = run_ranks(mp, run_ours, layout, mp, w, batch)

    convert(Checkpoint(write(tmp_path / "ours", w)), tmp_path / "hf", Target("hf"))
    model = MixtralForSequenceClassification.from_pretrained(tmp_path / "hf", dtype=torch.float64, experts_implementation="eager")
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.label2id["yes"] == 2
    tokens, _, real = grid(batch)
    padded = tokens.masked_fill(~real, model.config.pad_token_id)
    out = model(input_ids=padded, attention_mask=real.long(), labels=batch.labels)
    out.loss.backward()
    theirs = by_logical_name({name: p.grad for name, p in model.named_parameters()}, ARGS)
    ours, differ = assemble([rank["gradients"] for rank in ranks], LogicalModel(ARGS).cuts(get_layout(layout)), mp)
    assert not differ and "score.weight" in theirs
    assert distance(ours, theirs) < 1e-12
    for rank in ranks:
        assert distance({"": rank["logits"]}, {"": out.logits}) < 1e-12
        assert relative(rank["loss"], out.loss.item()) < 1e-12
