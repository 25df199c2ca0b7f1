"""Validation: loss on the held-out samples, and how far the routing has moved."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accessory.console import is_main, progress, say
from accessory.data.loader import BatchPlan, sample_lengths
from accessory.data.order import permute
from accessory.data.packing import Rows
from accessory.data.store import Sample
from accessory.model.decoder import Decoder
from accessory.parallel.watchdog import progressed
from accessory.settings import RunConfig
from accessory.train.data import RunData
from accessory.train.health import PROBE_FILE, Alarms, RoutingProbe, probe_documents
from accessory.train.objective import Objective, shown


class Validation:
    """What is measured between steps. ``resumed_from``: the run directory of a run that is resumed."""

    def __init__(
        self,
        model: Decoder,
        objective: Objective,
        data: RunData,
        batches: BatchPlan,
        config: RunConfig,
        alarms: Alarms,
        resumed_from: Path | None,
    ):
        self.model, self.objective, self.data, self.alarms = model, objective, data, alarms
        self.device = model.norm.weight.device
        self.batches = dataclasses.replace(batches, accumulation=1, pads=False)
        self.probe_file = Path(config.out) / PROBE_FILE
        self.probe: RoutingProbe | None = None
        if config.log.probe_tokens:
            samples = data.validation or data.training
            lengths = sample_lengths(samples)
            first = permute(
                np.arange(min(len(samples), config.log.probe_tokens)), len(samples), f"{config.train.seed}/probe"
            )
            chosen = probe_documents(first, lengths, config.log.probe_tokens)
            parts = [batch for (batch,) in self.batches.epoch(samples, data.make_rows(chosen, lengths))]
            self.probe = RoutingProbe(chosen, lengths, [batch.on(model) for batch in parts], self.device)
            if resumed_from and not self.probe.load(resumed_from / PROBE_FILE):
                say(f"{PROBE_FILE} is missing or of other tokens: routing will be compared with that of the next validation")
            elif resumed_from and is_main() and resumed_from != self.probe_file.parent:
                self.probe.save(self.probe_file)

    def __call__(self, step: int) -> dict[str, Any]:
        """Measure, and say it: the loss, and the change of routing since the first call."""
        progressed(f"validation after step {step}")
        values: dict[str, Any] = {}
        texts = []
        if self.data.validation:
            samples = self.data.validation
            lengths = sample_lengths(samples)
            rows = self.data.make_rows(lengths.argsort(kind="stable"), lengths)
            loss, metrics = mean_loss(self.model, self.objective, samples, rows, self.batches)
            values |= {"val_loss": loss} | {f"val_{name}": value for name, value in metrics.items()}
            texts.append(f"validation loss {loss:.4f}{shown(metrics)}")
        if self.probe and self.probe.base is None:
            self.probe.record(self.model)
            if is_main():
                self.probe.save(self.probe_file)
        elif self.probe:
            change = self.probe.change(self.model)
            self.alarms.check_change(step, change)
            values |= {"routing_change": change.mean().item(), "layer_routing_change": change.tolist()}
            values |= self.alarms.metrics()
            texts.append(f"routing changed {change.mean():.1%} (most {change.max():.1%}, layer {int(change.argmax())})")
        if values:
            say(f"step {step:5d}  {'  '.join(texts)}")
        return values


@torch.no_grad()
def mean_loss(
    model: Decoder, objective: Objective, samples: Sequence[Sample], rows: Rows, plan: BatchPlan
) -> tuple[float, dict[str, float]]:
    """The objective's mean loss over the targets of ``samples``, and its metrics; one micro-batch a step (a collective)."""
    targets, loss_sums, measures = 0, [], []
    for (batch,) in progress(
        plan.epoch(samples, rows), total=plan.steps(len(rows)), desc="validation", unit="batch", leave=False
    ):
        batch = batch.on(model)
        found = objective.loss(model, batch)
        targets += objective.targets(batch)
        loss_sums.append(found.loss_sum.double())
        measures.append(found.measures.double())
    own = torch.stack([torch.stack(loss_sums).sum(), loss_sums[0].new_tensor(targets)])
    sums = model.mesh.dp.all_reduce(torch.cat([own, torch.stack(measures).sum(0).flatten()])).cpu()
    loss = sums[0].item() / max(1.0, sums[1].item())
    return loss, objective.metrics(loss, sums[2:].view_as(measures[0]))
