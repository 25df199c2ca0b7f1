"""A training run from its configuration to its saved model."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml

from accessory.checkpoint.open import Checkpoint, load_args
from accessory.console import is_main, progress, say
from accessory.data.loader import Batch, BatchPlan, sample_lengths
from accessory.data.mix import load_mix
from accessory.data.packing import Rows
from accessory.data.tokenizer import Tokenizer, check_vocabulary
from accessory.dtypes import at_least, get_dtype
from accessory.errors import UserError
from accessory.model.build import RandomWeights, build_model
from accessory.model.logical import Adapters, Source, logical_cuts
from accessory.model.moe.layouts import get_layout
from accessory.parallel.fsdp import wrap
from accessory.parallel.launch import Launch, first_on_each_node
from accessory.parallel.tensor import (
    get_data_parallel_group,
    get_model_parallel_world_size,
    initialize_groups,
)
from accessory.train.config import RunConfig
from accessory.train.loggers import Loggers
from accessory.train.metrics import Window, peak_flops, speed
from accessory.train.optim import learning_rate, make_optimizer
from accessory.train.report import History, load_table, plot
from accessory.train.save import save_model, save_trainable
from accessory.train.step import train_step
from accessory.tuning.spec import AdaptedSource, check_goes_on, resolve
from accessory.tuning.table import tuning_table
from accessory.tuning.watch import watch_adapters


class Trainer:
    """One finetuning run: set up in ``__init__``, done by ``run``.

    Attributes:
        model: the decoder, sharded over data-parallel ranks. training, validation: the samples.
        epoch_ends: how many optimiser steps are done when each epoch is; packed epochs differ by a few rows.
    """

    def __init__(self, config: RunConfig, launch: Launch):
        self.config, self.launch, self.device = config, launch, launch.device
        initialize_groups(config.parallel.model_parallel)
        self.dp_rank = dist.get_rank(get_data_parallel_group())
        self.dp_size = dist.get_world_size(get_data_parallel_group())
        self._read_model_description()
        self._read_data()
        self._build_model()
        train = config.train
        self.batches = BatchPlan(train.batch_size, train.accumulation, self.dp_rank, self.dp_size)
        # packed, epochs differ by a few rows; else each has as many as samples
        different = range(train.epochs) if config.data.packing else [0] * train.epochs
        rows = {epoch: len(self._epoch_rows(epoch)) for epoch in set(different)}
        self.epoch_ends = list(accumulate(self.batches.steps(rows[epoch]) for epoch in different))
        self.steps = min(self.epoch_ends[-1], train.max_steps or self.epoch_ends[-1])
        self.out = Path(config.out)
        self.loggers: Loggers | None = None
        if is_main():
            self.out.mkdir(parents=True, exist_ok=True)
            resolved = dataclasses.asdict(config)
            (self.out / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
            self.loggers = Loggers(self.out, config.log, resolved)
            if bad := [line for source in self.data.sources for line in source.bad()]:
                (self.out / "bad_records.txt").write_text("\n".join(bad) + "\n")

    def _read_model_description(self) -> None:
        section = self.config.model
        self.source: Source
        self.checkpoint: Checkpoint | None = None
        if section.checkpoint:
            self.checkpoint = checkpoint = Checkpoint(section.checkpoint, section.config, strict=section.strict)
            self.args, self.layout, self.source = checkpoint.args, section.layout or checkpoint.layout, checkpoint
            tokenizer = section.tokenizer or checkpoint.tokenizer
            if tokenizer is None:
                raise UserError(f"{section.checkpoint}: no tokenizer.model or tokenizer.json in it; set model.tokenizer")
            carried = {} if section.tokenizer else checkpoint.carried
        else:
            assert section.config and section.tokenizer and section.layout  # RunConfig has checked
            self.args, self.layout, tokenizer = load_args(section.config), section.layout, section.tokenizer
            cuts = logical_cuts(self.args, get_layout(self.layout))
            self.source, carried = RandomWeights(cuts, self.config.train.seed), {}
        self.tokenizer = Tokenizer(tokenizer)
        self.carried = carried | self.tokenizer.files
        check_vocabulary(self.tokenizer, self.args.vocab_size)

    def _read_data(self) -> None:
        section = self.config.data
        self.max_seq_len = section.max_seq_len or self.args.max_seq_len
        arguments = (section.mix, self.tokenizer, self.max_seq_len, self.config.train.seed)
        self.data = first_on_each_node(lambda: load_mix(*arguments, section.validation, section.bad_records), self.launch)
        self.training, self.validation = self.data.training, self.data.validation
        self.lengths = sample_lengths(self.training)
        say(
            f"data: {len(self.training)} samples to train on, {len(self.validation)} held out; "
            f"{self.data.count('truncated')} truncated to {self.max_seq_len} tokens, "
            f"{self.data.count('dropped')} dropped (no target left)"
        )
        if section.packing:
            rows = self._epoch_rows(0)
            full = self.lengths[rows.samples].sum() / (len(rows) * self.max_seq_len)
            say(f"packing: {len(rows)} rows of {self.max_seq_len} tokens, {full:.1%} full")

    def _rows(self, order: Sequence[int] | np.ndarray, lengths: np.ndarray) -> Rows:
        return Rows.packed(order, lengths, self.max_seq_len) if self.config.data.packing else Rows.alone(order)

    def _epoch_rows(self, epoch: int) -> Rows:
        return self._rows(self.data.epoch(epoch), self.lengths)

    def _build_model(self) -> None:
        parallel, section, seed = self.config.parallel, self.config.model, self.config.train.seed
        compute = get_dtype(parallel.precision)
        layout = get_layout(self.layout)
        tuning = resolve(self.config.tuning, self.args, layout, seed)
        cuts = logical_cuts(self.args, layout, tuning.adapters)
        added = cuts.keys() - logical_cuts(self.args, layout).keys()
        self.only_trainable = bool(tuning.adapters) or self.config.save.only_trainable
        given: Adapters = {}
        if self.checkpoint:
            given = self.checkpoint.adapters
            check_goes_on(given, self.checkpoint.changed, tuning, self.only_trainable)
        new = added - logical_cuts(self.args, layout, given).keys()
        self.model = build_model(
            self.args,
            self.layout,
            AdaptedSource(self.source, RandomWeights(cuts, seed), new),
            dtype=at_least(compute),
            device=self.device,
            kernel=section.kernel,
            recompute=parallel.recompute,
            adapters=tuning.adapters,
            trains=tuning.trains,
            frozen_dtype=compute,
            shard=lambda model: wrap(model, parallel.data_parallel, compute, self.device.type),
        )
        self.optimizer = make_optimizer(self.model, self.config.optim)
        watch_adapters(self.model, self.optimizer, added)
        self.cut = {name for name, cut in cuts.items() if cut.dim is not None}
        total = sum(math.prod(cut.shape) for cut in cuts.values())
        self.trained = sum(math.prod(cuts[name].shape) for name in tuning.trains) / total
        peak, origin = peak_flops(self.device, compute)
        self.peak = peak
        say(
            f"model: {total / 1e6:,.1f} M parameters, {self.args.active_parameters() / 1e6:,.1f} M active per token; layout "
            f"{self.layout}, model parallel {get_model_parallel_world_size()} x data parallel {self.dp_size} "
            f"({parallel.data_parallel}), {parallel.precision}\n"
            f"MFU is taken of {peak / 1e12:.3g} TFLOP/s per rank ({origin})\n"
            f"{tuning_table(self.model)}"
        )

    def run(self) -> None:
        """Train, validate, save, report."""
        config = self.config
        if config.train.balance == "global" and config.train.accumulation > 1 and self.args.load_balancing_weight:
            say("balance loss over the global batch: accumulation costs one more forward (train.balance=document: none)")
        self.validate(0)
        step, window = 0, Window()
        bar = progress(total=self.steps, unit="step")
        for epoch, micro_batches in self._steps():
            rate = learning_rate(step, self.steps, self.epoch_ends[0], config.optim)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            try:
                result = train_step(
                    self.model,
                    self.optimizer,
                    micro_batches,
                    clip_grad=config.optim.clip_grad,
                    balance=config.train.balance,
                    data_parallel=config.parallel.data_parallel,
                    cut=self.cut,
                )
            except UserError as error:
                raise UserError(f"step {step + 1} of epoch {epoch}: {error}") from error
            window.add(result)
            step += 1
            bar.update()
            last, epoch_ends = step == self.steps, step in self.epoch_ends
            if step % config.log.every == 0 or last:
                self._log(step, window, rate)
            with window.paused():
                if last or epoch_ends or (config.log.validate_every and step % config.log.validate_every == 0):
                    self.validate(step)
                if last or (epoch_ends and (epoch + 1) % config.save.every_epochs == 0):
                    self._save(f"epoch{epoch}" if epoch_ends else f"epoch{epoch}-iter{step}")
        bar.close()
        self._report()

    def _steps(self) -> Iterator[tuple[int, list[Batch]]]:
        """Yield (epoch, this rank's micro-batches) of every optimiser step."""
        done = 0
        for epoch in range(self.config.train.epochs):
            for micro_batches in self.batches.epoch(self.training, self._epoch_rows(epoch), epoch):
                if done == self.steps:
                    return
                yield epoch, [batch.to(self.device) for batch in micro_batches]
                done += 1

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Mean cross-entropy over the targets of the held-out samples."""
        if not self.validation:
            return
        plan = dataclasses.replace(self.batches, accumulation=1)
        lengths = sample_lengths(self.validation)
        rows = self._rows(lengths.argsort(kind="stable"), lengths)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        bar = progress(
            plan.epoch(self.validation, rows), total=plan.steps(len(rows)), desc="validation", unit="batch", leave=False
        )
        for (batch,) in bar:
            loss, _ = self.model(*batch.to(self.device).inputs())
            total += torch.stack([loss.double(), torch.tensor(batch.target_tokens, device=self.device)])
        dist.all_reduce(total, group=get_data_parallel_group())
        loss_sum, targets = total.tolist()
        mean = loss_sum / max(1.0, targets)
        say(f"step {step:5d}  validation loss {mean:.4f}  perplexity {math.exp(min(700.0, mean)):.3f}")
        if self.loggers:
            self.loggers.log(step, {"val_loss": mean, "val_perplexity": math.exp(min(700.0, mean))})

    def _log(self, step: int, window: Window, rate: float) -> None:
        values, loads = window.reduce()
        values |= {"lr": rate, **speed(values, self.args, float(self.lengths.mean()), self.trained, self.peak)}
        shares = loads / loads.sum(1, keepdim=True).clamp(min=1) * loads.shape[1]
        values |= {"load_max": float(shares.max()), "load_min": float(shares.min())}
        say(
            f"step {step:5d}/{self.steps}  loss {values['loss']:.4f}  balance {values['balance']:.3f}  "
            f"grad {values['grad_norm']:.2f}  lr {rate:.2e}  {values['tokens_per_s']:,.0f} tokens/s  "
            f"MFU {values['mfu']:.1%}  expert load {values['load_min']:.2f}-{values['load_max']:.2f}"
        )
        if self.loggers:
            self.loggers.log(step, values | {"loads": loads.tolist()})

    def _save(self, name: str) -> None:
        directory, section = self.out / name, self.config.save
        if self.only_trainable:
            assert self.checkpoint  # RunConfig has checked
            below = [str(d.directory) for d in self.checkpoint.directories[: self.checkpoint.base_layers]]
            base = {"fingerprint": self.checkpoint.fingerprint, "path": below}
            save_trainable(self.model, directory, self.carried, base)
            say(f"saved {directory} (what was trained; it belongs to the base model)")
            return
        save_model(self.model, directory, self.carried, get_dtype(self.config.parallel.precision), section.format)
        say(f"saved {directory}")

    def _report(self) -> None:
        if self.loggers:
            self.loggers.close()
            history = History.load(self.out)
            plot([history], self.out / "report.png")
            say(f"expert load of the run, 1.00 = a fair share:\n{load_table(history.loads)}")
            say(f"metrics: {self.out / 'metrics.jsonl'}   picture: {self.out / 'report.png'}")


def finetune(config: RunConfig, launch: Launch) -> None:
    """The ``finetune`` verb."""
    torch.manual_seed(config.train.seed)
    Trainer(config, launch).run()
