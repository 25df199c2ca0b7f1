"""Where a run's numbers go: metrics.jsonl always, TensorBoard and wandb if asked. Only rank 0 writes."""

import json
from pathlib import Path
from typing import Any

from accessory.console import say
from accessory.train.config import LogSection


class Loggers:
    """Append dictionaries of numbers to every destination.

    wandb is never allowed to stop a run: if it cannot start, the run says so and goes on without.
    """

    def __init__(self, directory: Path, config: LogSection, run_config: dict[str, Any]):
        self._file = open(directory / "metrics.jsonl", "w", buffering=1)  # noqa: SIM115 (closed in close)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory / "tensorboard"))
        if config.wandb != "off":
            self._wandb = _start_wandb(directory, config, run_config)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write ``values`` (numbers, or lists of them, which go to the JSONL file only)."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
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


def _start_wandb(directory: Path, config: LogSection, run_config: dict[str, Any]) -> Any:
    import wandb

    assert config.wandb != "off"

    try:
        return wandb.init(
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
