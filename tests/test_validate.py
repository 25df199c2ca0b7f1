"""The validation loss is a mean over the targets of all that is held out, whatever the batches and ranks."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist
from models import TINY, Tensors, build, samples, weights
from ranks import run_ranks

from accessory.certify import reference
from accessory.data.loader import BatchPlan
from accessory.data.packing import Rows
from accessory.parallel.mesh import make_mesh
from accessory.train.objective import NextToken
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
    return Validation(model, NextToken(), data, plan, config, None, None)(0)["val_loss"]


@pytest.mark.parametrize(("world", "batch_size", "width"), [(1, 2, None), (1, 8, None), (2, 1, None), (2, 1, 28)])
def test_the_validation_loss(world, batch_size, width):
    pairs = [(sample.tokens, sample.trained) for sample in HELD_OUT]
    expected = reference.loss_parts(weights(), TINY, pairs, "global").ce.item()
    for loss in run_ranks(world, validate, world, batch_size, width):
        assert loss == pytest.approx(expected, rel=1e-12)
