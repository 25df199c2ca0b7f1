"""The validation loss is a mean over the targets of all that is held out, whatever the batches and ranks."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from models import TINY, Tensors, build, samples, weights
from ranks import run_ranks

from accessory.certify import reference
from accessory.data.loader import BatchPlan
from accessory.data.packing import Rows
from accessory.parallel.mesh import make_mesh
from accessory.train.objective import NextToken, TokenAccuracy
from accessory.train.validate import Validation

HELD_OUT = samples(7, seed=4)


def validate(world, batch_size, width):
    data = SimpleNamespace(
        validation=HELD_OUT,
        make_rows=lambda order, lengths: Rows.packed(order, lengths, width) if width else Rows.alone(order),
    )
    model, plan = (
        build(TINY, "mixtral", Tensors(weights()), mesh=make_mesh()),
        BatchPlan(batch_size, 3, dist.get_rank(), world),
    )
    config = SimpleNamespace(out="", log=SimpleNamespace(probe_tokens=0))
    return [Validation(model, objective, data, plan, config, None, None)(0) for objective in (NextToken(), TokenAccuracy())]


@pytest.mark.parametrize(("world", "batch_size", "width"), [(1, 2, None), (1, 8, None), (2, 1, None), (2, 1, 28)])
def test_the_validation_loss(world, batch_size, width):
    pairs = [(sample.tokens, sample.trained) for sample in HELD_OUT]
    expected = reference.loss_parts(weights(), TINY, pairs, "global").ce.item()
    for values, measured in run_ranks(world, validate, world, batch_size, width):
        assert values["val_loss"] == pytest.approx(expected, rel=1e-12)
        assert measured == pytest.approx(values | {"val_token_accuracy": right_share()}, rel=1e-12)


def right_share():
    """The share of the targets that are the likeliest token."""
    right = []
    for sample in HELD_OUT:
        tokens, trained = torch.tensor(sample.tokens), torch.tensor(sample.trained)
        likeliest = reference.forward(weights(), TINY, tokens)[0].argmax(-1)
        right += (likeliest[:-1] == tokens[1:])[trained[1:]].tolist()
    assert sum(right) > 0
    return sum(right) / len(right)
