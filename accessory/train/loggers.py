"""Where a run's numbers go: metrics.jsonl always, TensorBoard and wandb if asked. Only rank 0 writes."""

import json
import math
import secrets
from pathlib import Path
from typing import Any

from accessory.console import say
from accessory.errors import UserError
from accessory.settings import LogSection

METRICS = "metrics.jsonl"
WANDB_ID = "wandb_id.txt"
"""What wandb calls the run: it goes on as the same one."""


class Loggers:
    """Append dictionaries of numbers to every destination.

    wandb is never allowed to stop a run: if it cannot start, the run says so and goes on without.
    """

    def __init__(self, directory: Path, config: LogSection, run_config: dict[str, Any], done: int = 0):
        """``done``: steps of a run that goes on; what was logged behind them is forgotten."""
        path = directory / METRICS
        kept = [row for row in read_metrics(path) if row["step"] <= done] if done and path.is_file() else []
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
        unfinished.replace(path)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (closed in close)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=done + 1 if done else None)
        if config.wandb != "off":
            self._wandb = _start_wandb(directory, config, run_config, goes_on=done > 0)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write ``values``: numbers, and lists with one for each layer; anything else goes to the JSONL file only."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        lists = {key: value for key, value in values.items() if isinstance(value, list)}
        numbers = values | {f"{key}/{layer:02d}": x for key, value in lists.items() for layer, x in enumerate(value)}
        numbers = {key: value for key, value in numbers.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for key, value in numbers.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; the last one of a run that was killed may not be whole, and is left out."""
    try:
        lines = path.read_text().splitlines()
        if lines and not lines[-1].endswith("}"):
            lines.pop()
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path}: not the metrics of a run ({error})") from error


def lowest_validation(directory: Path, done: int) -> float:
    """The lowest validation loss that a run had after some of the first ``done`` steps; infinite if there is none."""
    path = directory / METRICS
    rows = read_metrics(path) if done and path.is_file() else []
    return min((row["val_loss"] for row in rows if 0 < row["step"] <= done and "val_loss" in row), default=math.inf)


def _start_wandb(directory: Path, config: LogSection, run_config: dict[str, Any], goes_on: bool) -> Any:
    import wandb

    assert config.wandb != "off"
    known = directory / WANDB_ID
    try:
        number = known.read_text().strip() if goes_on and known.is_file() else secrets.token_hex(4)
        known.write_text(f"{number}\n")
        return wandb.init(
            id=number,
            resume="allow",
            dir=str(directory),
            mode=config.wandb,
            project=config.project,
            name=directory.name,
            config=run_config,
            settings=wandb.Settings(silent=True, init_timeout=30),
        )
    except Exception as error:  # no key, no network, ...: whatever wandb raises
        say(f"wandb could not start, the run goes on without it: {' '.join(str(error).split())}")
        return None
