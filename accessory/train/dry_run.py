"""``finetune --dry-run``: all that a run would stumble over, and what it takes and writes, before a machine is asked for."""

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from accessory.checkpoint.publish import claimed
from accessory.checkpoint.state import KINDS
from accessory.console import in_bytes, is_main, say
from accessory.data.loader import BatchPlan
from accessory.dtypes import at_least, get_dtype
from accessory.errors import UserError
from accessory.files import write_rate
from accessory.model.build import model_without_weights
from accessory.model.logical import held_dtype
from accessory.model.memory import Footprint, memory_of
from accessory.parallel.launch import Launch
from accessory.parallel.mesh import Mesh, plan_mesh
from accessory.parallel.watchdog import end_stalls_after, progressed
from accessory.settings import RunConfig, SaveSection
from accessory.train.data import RunData
from accessory.train.data_check import coloured
from accessory.train.model import Start, described
from accessory.train.plan import Plan, Position
from accessory.train.state import check_state, find_state
from accessory.tuning.table import tuning_table

SHOWN = 700
"""Characters of a sample's text."""


def dry_run(config: RunConfig, launch: Launch, world: int | None, memory_gib: float | None) -> None:
    """Check and plan a run of ``world`` processes (None: those of this job), each with ``memory_gib`` (None: as here).

    No weight is allocated; only tokenised data stays, which the run finds again.

    Raises:
        UserError: the run would not come to its end.
    """
    end_stalls_after(config.parallel.stall_timeout_s)
    mesh = plan_mesh(world or launch.world, config.parallel.model_parallel, config.parallel.dp_shard())
    start = Start(config, mesh, launch)
    out = Path(config.out)
    with claimed(out) if is_main() else nullcontext():
        state = find_state(config, dry=True)
        train = config.train
        data = RunData(config.data, start.tokenizer, start.width, start.args, train.epochs, train.seed, launch)
        if state:
            check_state(state, start.args, start.in_state, data.digest, start.base)
        done = Position(state.notes.steps, state.notes.rows) if state else Position()
        batches = BatchPlan(train.batch_size, train.accumulation, 0, mesh.dp.size, images=data.image_reader)
        plan = Plan(tuple(map(len, data.rows)), batches.global_batch, train.max_steps, done)
        if not is_main():
            return
        for line in (*_model(config, start, mesh), *_steps(plan, start.width)):
            print(line)
        print(_memory(start.footprint(config, mesh, launch.device), _there(launch, mesh, memory_gib)))
        print(_saves(SaveSizes.of(config, start), config.save, plan, out))
        print("\n".join(_first_batch(data, batches, start)))
    say("dry run: nothing was written, and nothing stands in the way of this run")


def _model(config: RunConfig, start: Start, mesh: Mesh) -> Iterator[str]:
    compute, logical = get_dtype(config.parallel.precision), start.tuning.logical
    model = model_without_weights(
        logical, start.layout, mesh, at_least(compute), config.model.kernel, trains=start.tuning.trains, frozen_dtype=compute
    )
    from_where = "random weights"
    if start.checkpoint:
        directories = ", ".join(f"{d.directory} ({d.format})" for d in start.checkpoint.directories)
        from_where = f"{directories}: every tensor is there and has its shape, values are not read"
    yield f"starts from {from_where}"
    yield described(config, start, mesh)
    yield tuning_table(model)


def _steps(plan: Plan, width: int) -> Iterator[str]:
    steps, rows = plan.end.steps - plan.done.steps, plan.global_batch
    if not steps:
        raise UserError("this run is over: raise train.epochs or train.max_steps to go on")
    epochs = f"{len(plan.epoch_rows)} epoch(s) of {plan.epoch_rows[0]:,} rows"
    yield (f"steps: {steps:,} to do of {plan.end.steps:,}, {rows:,} rows and at most {rows * width:,} tokens each; {epochs}")


def _there(launch: Launch, mesh: Mesh, memory_gib: float | None) -> float | None:
    """Bytes of memory that a rank has, if that is known."""
    if memory_gib is not None:
        return memory_gib * 2**30
    return memory_of(launch.device) / launch.sharing if mesh.world.size == launch.world else None


def _memory(needed: Footprint, there: float | None) -> str:
    """Raises UserError: it is not there."""
    if there is not None and needed.total > there:
        raise UserError(
            f"a rank has {there / 2**30:,.2f} GiB of memory and would need {needed}: cut it over more ranks, "
            "lower train.batch_size or data.max_seq_len, set parallel.recompute=block, or train less of it (tuning.lora)"
        )
    return f"memory of a rank: {needed}" + (f"; it has {there / 2**30:,.2f} GiB" if there else "")


@dataclass(frozen=True)
class SaveSizes:
    """Bytes of what a run writes. ``model``: of a saved model or adapter; ``state``: of a training state."""

    model: float
    state: float

    @classmethod
    def of(cls, config: RunConfig, start: Start) -> "SaveSizes":
        compute, sizes = get_dtype(config.parallel.precision), start.tuning.logical.sizes
        state = sum(sizes[name] for name in start.in_state) * at_least(compute).itemsize
        model = sum(size * held_dtype(name, compute).itemsize for name, size in sizes.items())
        return cls(model=state if start.only_trainable else model, state=len(KINDS) * state)


def _saves(sizes: SaveSizes, save: SaveSection, plan: Plan, out: Path) -> str:
    """Raises UserError: the disk is too small."""
    left = [step for step in plan.steps()]
    models = sum(step.after == plan.end or (step.ends_epoch and (step.epoch + 1) % save.every_epochs == 0) for step in left)
    needed, text = models * sizes.model, f"saves: {models} x the model, {in_bytes(sizes.model)}"
    if save.best:
        needed += 2 * sizes.model  # a new one is whole before the last goes
        text += ", and the best of them"
    if save.state_every:
        written = {step.after.steps for step in left if step.after == plan.end or step.after.steps % save.state_every == 0}
        forever = sum(steps % save.keep_every == 0 for steps in written) if save.keep_every else 0
        states = min(len(written), save.keep_states + 1 + forever)  # a new one is whole before the oldest goes
        needed += states * sizes.state
        text += f"; {len(written)} x a state to resume from, {in_bytes(sizes.state)}, of which {states} are there at a time"
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UserError(
            f"{out}: the disk is too small: {text}: {in_bytes(needed)} in all, {in_bytes(free)} are free; save less "
            "(save.keep_states, save.every_epochs, save.only_trainable), or set out elsewhere"
        )
    rate = write_rate(out)
    largest = max(sizes.model, sizes.state if save.state_every else 0)
    return (
        f"{text}; {in_bytes(needed)} of the {in_bytes(free)} that are free; from here alone, at {in_bytes(rate)}/s, the "
        f"largest would take {largest / rate:,.1f} s"
    )


def _first_batch(data: RunData, batches: BatchPlan, start: Start) -> Iterator[str]:
    """The samples of the first rank's first micro-batch, with what is trained marked."""
    progressed("reading the first batch")
    batch = batches.step(data.training, data.rows[0], 0)[0]
    numbers = batch.sample_keys.tolist()
    yield (
        f"the first micro-batch: {len(numbers)} samples, {batch.real_tokens:,} tokens, {batch.target_tokens:,} [[learnt]]"
    )
    for number in numbers:
        sample = data.training[number]
        yield f"== {data.training.where(number)}: {len(sample.tokens)} tokens"
        text = coloured(sample, start.tokenizer, colours=False)
        yield text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
