"""A training run from its configuration to its saved model."""

import argparse
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import yaml

from accessory.checkpoint.encoders import FILE, write_encoders
from accessory.checkpoint.publish import claimed
from accessory.checkpoint.state import StateNotes
from accessory.checkpoint.training import Training
from accessory.console import in_time, is_main, progress, say
from accessory.data.image_reader import one_ahead
from accessory.data.loader import Batch, BatchPlan
from accessory.dtypes import get_dtype
from accessory.errors import Stopped, UserError
from accessory.model.moe.offload.meter import OffloadMeter
from accessory.parallel.launch import Launch, run_job
from accessory.parallel.mesh import Mesh, make_mesh
from accessory.parallel.watchdog import end_stalls_after, note_memory, progressed
from accessory.settings import ParallelSection, RunConfig
from accessory.train.balance import RouterLosses, balance_note
from accessory.train.data import RunData
from accessory.train.dry_run import dry_run
from accessory.train.health import Alarms
from accessory.train.loggers import Loggers, lowest_validation
from accessory.train.malloc import keep_freed_memory
from accessory.train.metrics import Window, speed
from accessory.train.model import RunModel, Start
from accessory.train.nonfinite import NotFinite, blame
from accessory.train.objective import Classification, MeanOfMeans, NextToken, Objective, shown
from accessory.train.optim import learning_rate
from accessory.train.plan import Plan, Position, Step
from accessory.train.report import History, load_table, plot
from accessory.train.save import save_model, save_trainable
from accessory.train.saver import Save, Saver
from accessory.train.state import changed_settings, find_state, number_settings, save_state
from accessory.train.step import StepResult, train_step
from accessory.train.stop import StopRequest
from accessory.train.validate import Validation


class Trainer:
    """One training run: set up in ``__init__``, done by ``run``. ``plan``: the steps that are left to do."""

    def __init__(self, config: RunConfig, start: Start, mesh: Mesh, launch: Launch):
        self.config, self.start, self.device, self.out = config, start, launch.device, Path(config.out)
        train, log = config.train, config.log
        if is_main():
            for unfinished in (self.out / "states").glob(".step*"):  # of a job that was killed while it saved
                shutil.rmtree(unfinished)
        self.state = find_state(config)
        self.data = RunData(config.data, start.tokenizer, start.width, start.args, train.epochs, train.seed, launch)
        self.built = RunModel(config, start, self.state, self.data.digest, mesh, launch)
        if start.args.visual and FILE not in start.companions:
            start.companions[FILE] = self.out / FILE  # which every save of the run shares
            if is_main() and self.built.vision:
                write_encoders(self.out / FILE, self.built.vision, get_dtype(config.parallel.precision))
        dp = mesh.dp
        self.batches = BatchPlan(
            train.batch_size, train.accumulation, dp.rank, dp.size, train.reference_loss, self.data.image_reader
        )
        self.settings = number_settings(config, start.args, self.batches.world)
        done = Position(self.state.notes.steps, self.state.notes.rows) if self.state else Position()
        self.saver = Saver()
        self.offload = OffloadMeter(self.built.model.offloaded)
        self.plan = Plan(tuple(map(len, self.data.rows)), self.batches.global_batch, train.max_steps, done)
        # from random weights all of the routing is to change
        self.alarms = Alarms(log.alarms if start.checkpoint else dataclasses.replace(log.alarms, routing_change=None))
        resumed_from = self.state.directory.parents[1] if self.state else None
        # what is held out has one mean, however a run takes that of its steps
        objective: Objective = Classification() if start.args.labels else NextToken()
        self.objective: Objective = MeanOfMeans(objective) if train.reference_loss else objective
        self.router_losses = RouterLosses(train.balance, train.z_loss_weight, train.bias_rate)
        self.validation = Validation(self.built.model, objective, self.data, self.batches, config, self.alarms, resumed_from)
        if config.save.best and not self.data.validation:
            raise UserError("save.best needs held-out samples to tell which model is best: set data.validation above 0")
        self.lowest = lowest_validation(self.out, done.steps)
        self.loggers: Loggers | None = None
        if is_main() and self.plan.end != done:
            resolved = dataclasses.asdict(config)
            (self.out / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False))
            self.loggers = Loggers(self.out, log, resolved, done.steps)
            if bad_records := list(self.data.bad_records):
                (self.out / "bad_records.txt").write_text("\n".join(bad_records) + "\n")

    def run(self) -> None:
        """Train, validate, save, report."""
        try:
            self._run()
        except Exception:
            self.saver.settle()
            raise

    def _run(self) -> None:
        config, end, done = self.config, self.plan.end, self.plan.done
        if note := balance_note(config.train.balance, config.train.accumulation, self.start.args.load_balancing_weight):
            say(note)
        say(f"run {self.out.name}: its files are in {self.out.absolute()}")
        if self.state:
            say(self._resumed(self.state.notes))
        if end == done:
            return
        if not self.state:
            self._validate(0)
        window, stop = Window(self.objective), StopRequest(self.built.model.mesh.world, self.device)
        bar = progress(total=end.steps, initial=done.steps, unit="step")
        for step, micro_batches in self._steps():
            rate = learning_rate(step, self.plan, config.optim)
            window.add(self._train(step, micro_batches, rate))
            bar.update()
            steps, last = step.after.steps, step.after == end
            keeps_state = config.save.state_every and (last or steps % config.save.state_every == 0)
            if last or keeps_state or steps % config.log.every == 0:
                bar.set_postfix_str(self._log(steps, window, rate))
            with window.paused():
                validates = last or step.ends_epoch or (config.log.validate_every and steps % config.log.validate_every == 0)
                models = ["best"] if validates and self._validate(steps) and config.save.best else []
                self.saver.check()
                if last or (step.ends_epoch and (step.epoch + 1) % config.save.every_epochs == 0):
                    models.append(f"epoch{step.epoch}" + ("" if step.ends_epoch else f"-iter{steps}"))
                self._save(models, step.after if keeps_state else None)
                if not last and (signal := stop.agreed()):
                    self._stop(signal, step.after, bool(keeps_state))
        self.saver.wait()
        bar.close()
        stop.close()
        self._report()

    def _stop(self, signal: int, done: Position, is_saved: bool) -> NoReturn:
        """End the run early, with a training state where the run keeps them."""
        text = f" after step {done.steps} of {self.plan.end.steps}; "
        if self.config.save.state_every:
            if not is_saved:
                self._save([], done)
            self.saver.wait()
            text += "resume=auto goes on from there"
        else:
            text += "save.state_every is null: what was learnt since the last save is lost"
        if self.loggers:
            self.loggers.close()
        raise Stopped(signal, text, everywhere=True)

    def _steps(self) -> Iterator[tuple[Step, list[Batch]]]:
        """Yield every optimiser step, with this rank's micro-batches."""
        steps: Iterator[tuple[Step, list[Batch]]] = (
            (step, self.batches.step(self.data.training, self.data.rows[step.epoch], step.start, step.epoch))
            for step in self.plan.steps()
        )
        progressed("reading the batch of the first step")
        for step, micro_batches in one_ahead(steps) if self.batches.images else steps:
            progressed(f"step {step.after.steps} of epoch {step.epoch}")
            yield step, [batch.on(self.built.model) for batch in micro_batches]
            progressed(f"reading the batch of step {step.after.steps + 1}")

    def _train(self, step: Step, micro_batches: list[Batch], rate: float) -> StepResult:
        built = self.built
        for group in built.optimizer.param_groups:
            group["lr"] = rate
        try:
            return train_step(
                built.model,
                built.optimizer,
                micro_batches,
                self.objective,
                self.router_losses,
                clip_grad=self.config.optim.clip_grad,
            )
        except UserError as error:
            text: object = error
            if isinstance(error, NotFinite):
                path = self.out / "non_finite.json"
                text = blame(error.finite, micro_batches, self.data.training, path, step.after.steps, self.batches.rank)
            raise UserError(f"step {step.after.steps} of epoch {step.epoch}: {text}") from error

    def _validate(self, step: int) -> bool:
        """Returns whether no validation of trained weights had so low a loss before; on all ranks alike."""
        values = self.validation(step)
        if self.loggers and values:
            self.loggers.log(step, values)
        loss = values.get("val_loss", math.inf)
        improves = [step > 0 and loss < self.lowest]
        dist.broadcast_object_list(improves)  # its last digits may differ from rank to rank
        if improves[0]:
            self.lowest = loss
        return improves[0]

    def _log(self, step: int, window: Window, rate: float) -> str:
        """Tell the steps since the last log. Returns what is most of interest."""
        share = (self.plan.end.steps - step) / len(window.steps)
        values, metrics, health = window.reduce(self.built.model.mesh.dp)
        left = in_time(share * values["seconds"])
        built, mean_length = self.built, float(self.data.lengths.mean())
        values |= {"lr": rate, **speed(values, self.start.args, mean_length, built.trained_share, built.peak_flops)}
        say(
            f"step {step:5d}/{self.plan.end.steps}  loss {values['loss']:.4f}{shown(metrics)}  "
            f"balance {values['balance']:.3f}  grad {values['grad_norm']:.2f}  lr {rate:.2e}  "
            f"{values['tokens_per_s']:,.0f} tokens/s  MFU {values['mfu']:.1%}  {left} left\n            {health.line()}"
        )
        self.alarms.check(step, health)
        values |= self.offload.metrics()
        if self.loggers:
            self.loggers.log(step, values | metrics | health.metrics() | self.alarms.metrics())
        return f"loss {values['loss']:.4f}, {values['tokens_per_s']:,.0f} tokens/s"

    def _save(self, models: list[str], state: Position | None) -> None:
        """Begin to save the model under some names, and a training state; the saves before are waited for."""
        saves: list[Save] = []
        if models or state:
            self.saver.wait()
        for model in models:
            progressed(f"saving {self.out / model}")
            self._save_model(self.out / model, saves.append)
        if state:
            progressed(f"saving the training state of step {state.steps}")
            self._save_state(state, saves.append)
        if saves:
            self.saver.begin(saves)

    def _save_model(self, directory: Path, write: Callable[[Save], None]) -> None:
        companions, checkpoint = self.start.companions, self.start.checkpoint
        if self.start.only_trainable:
            assert checkpoint  # RunConfig has checked
            below = [str(d.directory) for d in checkpoint.directories[: checkpoint.base_layers]]
            quantise = checkpoint.args.quantise
            base = {"fingerprint": checkpoint.fingerprint, "path": below, "quantise": quantise and vars(quantise)}
            save_trainable(self.built.model, directory, companions, base, self._describe, write)
            return
        save_model(
            self.built.model,
            directory,
            companions,
            get_dtype(self.config.parallel.precision),
            self.config.save.format,
            self._describe,
            write,
            self.start.tokenizer,
            checkpoint.hf_config() if checkpoint else {},
        )

    def _describe(self, directory: Path) -> None:
        """Say beside a saved model how it was trained."""
        train = self.config.train
        Training(self.data.template, train.balance, train.z_loss_weight).write(directory, self.start.tokenizer)

    def _save_state(self, done: Position, write: Callable[[Save], None]) -> None:
        notes = StateNotes(
            parts=dist.get_world_size(),
            steps=done.steps,
            rows=done.rows,
            of_steps=self.plan.end.steps,
            global_batch=self.batches.global_batch,
            data_digest=self.data.digest,
            base=self.start.base,
            settings=self.settings,
        )
        directory = self.out / "states" / f"step{done.steps}"
        save = self.config.save
        save_state(self.built.model, self.built.optimizer, directory, notes, save.keep_states, save.keep_every, write)

    def _resumed(self, notes: StateNotes) -> str:
        assert self.state
        if self.plan.end == self.plan.done:
            return (
                f"{self.state.directory}: this run is over; raise train.epochs or train.max_steps to go on, on the "
                "learning-rate curve of the longer run"
            )
        text = f"resumed from {self.state.directory}, of {notes.of_steps} steps"
        if notes.global_batch != self.batches.global_batch:
            text += (
                f"; a step had {notes.global_batch} rows, now {self.batches.global_batch}: set train.batch_size or "
                "train.accumulation to keep it. The rows that are left are the same"
            )
        if notes.settings is None:
            text += "; it does not say with which settings it was saved"
        elif changed := changed_settings(notes.settings, self.settings):
            text += f"; changed since: {', '.join(changed)}"
        return text

    def _report(self) -> None:
        if self.loggers:
            self.loggers.close()
            history = History.load(self.out)
            plot([history], self.out / "report.png")
            say(f"expert load of the run, 1.00 = a fair share:\n{load_table(history.loads)}")
            say(f"metrics: {self.out / 'metrics.jsonl'}   picture: {self.out / 'report.png'}")


def finetune(config: RunConfig, launch: Launch) -> None:
    """What one rank of a job does."""
    end_stalls_after(config.parallel.stall_timeout_s)
    torch.manual_seed(config.train.seed)
    mesh = make_mesh(config.parallel.model_parallel, config.parallel.dp_shard())
    dist.barrier()  # a rank that fails now breaks none of the connections that others are about to make
    start = Start(config, mesh, launch)
    note_memory(str(start.footprint(config, mesh, launch.device)))
    with claimed(Path(config.out)) if is_main() else nullcontext():
        trainer = Trainer(config, start, mesh, launch)
        if launch.device.type == "cpu":
            keep_freed_memory()
        trainer.run()


def run_finetune(arguments: argparse.Namespace) -> None:
    """The ``finetune`` verb."""

    def config() -> RunConfig:
        return RunConfig.load(arguments.config, arguments.overrides)

    try:
        start_timeout_s = config().parallel.stall_timeout_s
    except UserError:  # one rank says it, when all are there
        start_timeout_s = ParallelSection.stall_timeout_s
    if arguments.dry_run:
        run_job(lambda launch: dry_run(config(), launch, arguments.world, arguments.memory), start_timeout_s)
    run_job(lambda launch: finetune(config(), launch), start_timeout_s)


def run_pretrain(arguments: argparse.Namespace) -> None:
    """The ``pretrain`` verb."""
    arguments.overrides = ["data.packing=true", *arguments.overrides]
    run_finetune(arguments)
