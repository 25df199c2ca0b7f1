"""Save a run's training state, and go on from it in any layout and at any parallel size.

Nothing else is random in a step: the order of the samples and the adapters' dropout are functions of the seed.
"""

import dataclasses
import hashlib
import json
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from accessory.checkpoint.state import (
    KINDS,
    StateNotes,
    TrainingState,
    drop_states,
    states_in,
    write_notes,
    write_part,
)
from accessory.config import read_mapping
from accessory.console import is_main, listed, say
from accessory.data.packing import Rows
from accessory.errors import UserError
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.logical import Region, Shape
from accessory.parallel.fsdp import show_masters
from accessory.parallel.mesh import local_part
from accessory.parallel.watchdog import progressed
from accessory.settings import RunConfig
from accessory.train.saver import Save, to_host, wait_for_copies, write_now


def find_state(config: RunConfig, dry: bool = False) -> TrainingState | None:
    """The training state that a run is to go on from, checked against its checksums (a collective).

    Of ``resume=auto`` it is the newest of the run's that is whole, if there is one; damaged ones of more steps get another
    name, for the run will come to their steps again; ``dry``: nothing is renamed.

    Raises:
        UserError: it is damaged, or all are, or a run is to begin where an earlier one left its state, or another its model.
    """
    states, resume = Path(config.out) / "states", config.resume
    given = [[str(path) for path in reversed(states_in(states))]]
    dist.broadcast_object_list(given)  # a node may see another rank's directories late
    newest_first = [Path(path) for path in given[0]]
    if resume is None:
        if newest_first:
            raise UserError(
                f"{newest_first[0]}: an earlier run left its training state here; resume=auto goes on from it. To begin "
                f"anew, set another out, or remove {states}"
            )
        _keep_models(config)
        return None
    if resume != "auto":
        directory = Path(resume).resolve()
        if newest_first and directory in [path.resolve() for path in newest_first[1:]]:
            raise UserError(
                f"{directory}: {newest_first[0]} is of more steps, and resume=auto would go on from that one: remove it to "
                "go on from here, or set another out"
            )
        if not newest_first:
            _keep_models(config)
        return _whole_state(directory)
    damaged: dict[Path, UserError] = {}
    for path in newest_first:
        try:
            state = _whole_state(path.resolve())
        except UserError as error:
            damaged[path] = error
            continue
        for other, damage in damaged.items():
            _set_aside(other, damage, instead=path, dry=dry)
        return state
    for damage in damaged.values():
        raise damage
    _keep_models(config)
    say(f"resume=auto: no training state in {states}, the run begins")
    return None


def _keep_models(config: RunConfig) -> None:
    """Raise UserError if a run that begins would write over the models of another one; the same run makes the same again."""
    out = Path(config.out)
    models, said = sorted(out.glob("epoch*")), out / "config.yaml"
    if not is_main() or not models or not said.is_file():
        return
    was, now = read_mapping(said), json.loads(json.dumps(dataclasses.asdict(config)))
    others = [
        f"{section}.{name}"
        for section in ("data", "model", "tuning", "optim", "train")
        for name, value in now[section].items()
        if was.get(section, {}).get(name, value) != value
    ]
    if others:
        raise UserError(
            f"{models[-1]}: the model of a run with another {listed(others)}, which this run would write over: set another "
            f"out, or remove {out}"
        )


def _whole_state(directory: Path) -> TrainingState:
    """A training state, if its files are as their checksums say: each rank reads some parts (a collective).

    Raises:
        UserError: they are not; on all ranks alike.
    """
    state, problem = None, ""
    try:
        state = TrainingState(directory)
        for part in range(dist.get_rank(), state.notes.parts, dist.get_world_size()):
            for place in state.damaged(part):
                problem = problem or f"{place} is not what was saved; resume from another training state"
    except UserError as error:
        problem = str(error)
    problems = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for text in filter(None, problems):
        raise UserError(text)
    assert state
    return state


def _set_aside(state: Path, damage: UserError, instead: Path, dry: bool) -> None:
    aside = state.with_name(f"{state.name}.damaged")
    if is_main() and not dry:
        shutil.rmtree(aside, ignore_errors=True)
        state.rename(aside)
    say(f"warning: {damage}. resume=auto does: it goes on from {instead.name}, and {state.name} is called {aside.name} now")


def data_digest(rows: Rows, lengths: np.ndarray, *settings: Any) -> str:
    """What a position in the data depends on: the samples' lengths, how an epoch begins, and ``settings``, which name
    what the samples were made of."""
    begins = [rows[number] for number in range(min(len(rows), 1000))]
    return hashlib.sha256(repr((begins, len(rows), settings)).encode() + lengths.tobytes()).hexdigest()[:16]


def check_state(state: TrainingState, args: ModelArgs, shapes: dict[str, Shape], data_digest: str, base: str | None) -> None:
    """Refuse a training state of another run. ``args``: the model's; ``shapes``: of what trains, and of buffers."""
    where, notes = state.directory, state.notes
    if notes.data_digest != data_digest:
        raise UserError(
            f"{where}: was saved with other samples, or another order or length of them: resume with the mix, tokenizer, "
            "model.labels, train.seed, data.max_seq_len, data.packing and data.validation that it was saved with"
        )
    if odd := sorted(state.names.keys() ^ shapes.keys()):
        has = "holds" if odd[0] in state.names else "lacks"
        raise UserError(f"{where}: {has} {odd[0]}: resume with the tuning and train.balance that it was saved with")
    for name, shape in shapes.items():
        if state.names[name] != shape:
            raise UserError(f"{where}: {name} has shape {list(state.names[name])}, this model's has {list(shape)}")
    for key, value in vars(args).items():
        if (was := getattr(state.args, key)) != value and key not in ("load_balancing_weight", "max_seq_len"):
            raise UserError(f"{where}: was saved with {key} {was} in config.json, this model has {value}")
    if notes.base != base:
        raise UserError(f"{where}: belongs to a base with fingerprint {notes.base}, model.checkpoint's is {base}")


def number_settings(config: RunConfig, args: ModelArgs, data_parallel: int) -> dict[str, Any]:
    """What the numbers of a run depend on, by name, of all that ``check_state`` lets change: plain data.

    Args:
        args: the model's, as it trains. data_parallel: how many ranks are.
    """
    train, lora = config.train, config.tuning.lora
    settings = {f"optim.{name}": value for name, value in dataclasses.asdict(config.optim).items()}
    named = ("epochs", "max_steps", "balance", "bias_rate", "z_loss_weight", "reference_loss")
    settings |= {f"train.{name}": getattr(train, name) for name in named}
    settings |= {"load_balancing_weight": args.load_balancing_weight, "parallel.precision": config.parallel.precision}
    settings |= {"model.quantise": args.quantise and dataclasses.asdict(args.quantise)}
    if lora:
        alpha = float(lora.rank) if lora.alpha is None else lora.alpha
        settings |= {"tuning.lora.alpha": alpha, "tuning.lora.rslora": lora.rslora, "tuning.lora.dropout": lora.dropout}
    if train.balance in ("microbatch", "hf"):  # taken over what depends on how a batch is cut
        settings |= {"train.batch_size": train.batch_size, "train.accumulation": train.accumulation}
        settings |= {"data-parallel ranks": data_parallel}
    return json.loads(json.dumps(settings))


def changed_settings(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A clause for each setting that both have, with other values."""

    def shown(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return [f"{k} {shown(was[k])} -> {shown(now[k])}" for k in now if k in was and was[k] != now[k]]


@torch.no_grad()
def save_state(
    model: Decoder,
    optimizer: Optimizer,
    directory: Path,
    notes: StateNotes,
    keep: int,
    keep_every: int | None = None,
    write: Callable[[Save], None] = write_now,
) -> None:
    """Save a training state; every rank its own part.

    Args:
        keep, keep_every: see ``drop_states``. write: what to do with it: at once, or in the background.
    """
    pieces = {key: (box, to_host(values)) for key, (box, values) in _own_pieces(model, optimizer).items()}
    wait_for_copies()
    rank = dist.get_rank()

    def finish(folder: Path, sums: list[dict[str, str]]) -> None:
        write_notes(folder, model.args, notes, dict(ChainMap(*sums)))

    write(
        Save(
            directory,
            "to resume from",
            lambda folder: write_part(folder, rank, pieces),
            finish,
            saved=lambda: drop_states(directory.parent, keep, keep_every),
        )
    )


@torch.no_grad()
def load_moments(model: Decoder, optimizer: Optimizer, state: TrainingState) -> None:
    """Give AdamW the moments and the step count of a training state; each rank reads its own slices."""
    for name, parameter in _trained(model):
        moments = {kind: torch.zeros_like(parameter) for kind in KINDS if kind != "weight"}
        for kind, moment in moments.items():
            local = local_part(moment)
            for rows, box in model.holdings[name].boxes:
                local[rows] = state.read_kind(kind, name, box).reshape(local[rows].shape).to(local)
                progressed()
        step = torch.tensor(float(state.notes.steps), device=parameter.device)
        optimizer.state[parameter] = {"step": step, **moments}


def _own_pieces(model: Decoder, optimizer: Optimizer) -> dict[str, tuple[Region, Tensor]]:
    """What this rank has to write: what it owns."""
    values: dict[str, dict[str, Tensor]] = {}  # by name, and by kind
    for name, parameter in _trained(model):
        moments = optimizer.state[parameter]
        values[name] = {kind: parameter if kind == "weight" else moments[kind] for kind in KINDS}
    values |= {name: {"weight": buffer} for name, buffer in model.named_buffers()}
    return {
        f"{kind}/{name}/{number}": (box, local_part(value)[rows])
        for name, kinds in values.items()
        for kind, value in kinds.items()
        for number, (rows, box) in enumerate(model.holdings[name].boxes if model.holdings[name].is_owner else ())
    }


def _trained(model: Decoder) -> Iterator[tuple[str, nn.Parameter]]:
    show_masters(model)
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
