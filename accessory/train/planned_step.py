"""The real training step of a rank of a job that is not there, at full size: shapes alone, on this CPU, in a second."""

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode

from accessory.data.loader import Batch, collate
from accessory.data.store import Sample
from accessory.dtypes import at_least, get_dtype
from accessory.model.args import ModelArgs
from accessory.model.build import model_without_weights
from accessory.model.decoder import Decoder
from accessory.model.holdings import holding_of
from accessory.model.moe.layouts import get_layout
from accessory.parallel.fsdp import wrap
from accessory.parallel.mesh import make_mesh
from accessory.parallel.planned import planned_for_gpu
from accessory.settings import LayoutName, OptimSection, ParallelSection, TuningSection
from accessory.train.optim import make_optimizer
from accessory.train.trace import PEAK, Figures, Trace, follow_step
from accessory.tuning.spec import resolve


@dataclass(frozen=True)
class PlannedRun:
    """What of a run decides what its step takes.

    Attributes:
        args, tuning: the model, and what of it trains. layout, parallel, batch_size, accumulation: as in a run's settings.
        width: tokens of a row.
        kernel: of the experts. on_gpu: what chooses by device chooses as there.
    """

    args: ModelArgs
    tuning: TuningSection
    layout: LayoutName
    parallel: ParallelSection
    batch_size: int
    accumulation: int
    width: int
    kernel: str = "grouped"
    on_gpu: bool = True

    def figures(self) -> Figures:
        """Those of the first rank. A job of so many ranks must be ``planned_job``.

        They are linear in layers, and in micro-batches once there are two: the step is traced for few.
        """
        layers, micro_batches = self.args.n_layers, self.accumulation
        if layers > 4:  # from three on there is one at work, one before and one behind
            return _line(3, self._with_layers(3).figures(), 4, self._with_layers(4).figures(), layers)
        few = 1 if self.parallel.data_parallel == "fsdp" else 2  # the others have whole gradients from the second on
        if micro_batches > few + 1:
            first, second = self._steps(few, few + 1)
            figures = _line(few, first, few + 1, second, micro_batches)
            figures[PEAK] = second[PEAK]
            return figures
        return self.traced()

    def _with_layers(self, layers: int) -> "PlannedRun":
        return dataclasses.replace(self, args=dataclasses.replace(self.args, n_layers=layers))

    def traced(self) -> Figures:
        """The same, of all layers and micro-batches."""
        return self._steps(self.accumulation)[0]

    def _steps(self, *accumulations: int) -> list[Figures]:
        """Of steps of so many micro-batches each, one after the other."""
        there = planned_for_gpu() if self.on_gpu else nullcontext()
        model, batch = self.model_without_weights(), self.batch()
        with there, FakeTensorMode(allow_non_fake_inputs=True) as fake, Trace(assumed=lambda: 1) as trace:
            model.to_empty(device="cpu")
            optimizer = make_optimizer(model, OptimSection())
            shapes = _as_shapes(batch, fake)
            follow_step(trace, model, optimizer, [shapes])
            return [follow_step(trace, model, optimizer, [shapes] * count) for count in accumulations]

    def model_without_weights(self) -> Decoder:
        """The model of this rank, on the meta device (a collective)."""
        parallel, compute = self.parallel, get_dtype(self.parallel.precision)
        mesh = make_mesh(parallel.model_parallel, parallel.dp_shard())
        tuning = resolve(self.tuning, self.args)
        model = model_without_weights(
            tuning.logical,
            get_layout(self.layout),
            mesh,
            at_least(compute),
            self.kernel,
            parallel.recompute,
            tuning.trains,
            compute,
        )
        wrap(model, mesh, parallel.data_parallel, compute, "cpu")
        model.holdings = {name: holding_of(tensor, model.cuts[name], mesh) for name, tensor in model.named_tensors()}
        return model

    def batch(self) -> Batch:
        """A micro-batch of as many documents of the width."""
        row = Sample(np.ones(self.width, np.int64), np.ones(self.width, bool))
        return collate([row] * self.batch_size)


def _as_shapes(batch: Batch, fake: FakeTensorMode) -> Batch:
    def made(tensor: Tensor) -> Tensor:
        return fake.from_tensor(tensor)

    documents, targets = batch.documents, batch.targets
    return dataclasses.replace(
        batch,
        tokens=made(batch.tokens),
        sample_keys=made(batch.sample_keys),
        labels=made(batch.labels),
        documents=dataclasses.replace(
            documents,
            document_of=made(documents.document_of),
            positions=made(documents.positions),
            borders=made(documents.borders),
        ),
        targets=type(targets)(*(made(tensor) for tensor in targets)),
    )


def _line(at: int, first: Figures, then: int, second: Figures, where: int) -> Figures:
    """What lies on the straight lines through two points."""
    share = (where - at) / (then - at)
    return Figures({name: first[name] + share * (second[name] - first[name]) for name in {*first, *second}})


@contextmanager
def planned_job(world: int) -> Iterator[None]:
    """This process as the first of ``world`` ranks of which the others are not there: nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # with it the backend "fake" is there

    assert not dist.is_initialized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that such a group has no time-out
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        try:
            yield
        finally:
            dist.destroy_process_group()
