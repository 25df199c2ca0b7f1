"""Pictures and tables of runs, from their metrics.jsonl."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.errors import UserError


@dataclass(frozen=True)
class History:
    """What metrics.jsonl of a run directory says."""

    name: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    loads: list[list[float]]  # [L][E], shares of the whole run

    @classmethod
    def load(cls, directory: Path) -> "History":
        path = directory / "metrics.jsonl"
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected a run directory")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        train = [row for row in rows if "loss" in row]
        if not train:
            raise UserError(f"{path}: no training step was logged")
        totals = [[sum(c) for c in zip(*layer, strict=True)] for layer in zip(*(r["loads"] for r in train), strict=True)]
        loads = [[count / sum(layer) for count in layer] for layer in totals]
        return cls(directory.name, train, [row for row in rows if "val_loss" in row], loads)


def load_table(loads: list[list[float]]) -> str:
    """Expert load per layer as text; 1.00 is a fair share."""
    experts = len(loads[0])
    lines = ["layer  " + "".join(f"   e{e:<3d}" for e in range(experts)) + "   max"]
    for number, layer in enumerate(loads):
        lines.append(f"{number:5d}  " + "".join(f"{x * experts:7.2f}" for x in layer) + f"{max(layer) * experts:6.2f}")
    return "\n".join(lines)


def compare_table(runs: list[History]) -> str:
    """Loss curves side by side, largest difference, perplexity before and after, speed."""
    width = max(14, *(len(run.name) for run in runs))
    by_step = [{row["step"]: row["loss"] for row in run.train} for run in runs]
    steps = sorted(set.intersection(*(set(losses) for losses in by_step)))
    lines = ["  step" + "".join(f"  {run.name:>{width}}" for run in runs) + "    difference"]
    differences = []
    for step in steps:
        losses = [losses[step] for losses in by_step]
        differences.append(max(losses) - min(losses))
        lines.append(f"{step:6d}" + "".join(f"  {x:{width}.6f}" for x in losses) + f"    {differences[-1]:.1e}")
    if differences:
        lines.append(f"largest difference of the loss: {max(differences):.1e}")
    for label, row in (("before", 0), ("after", -1)):
        if all(run.validation for run in runs):
            values = (f"{math.exp(min(700.0, run.validation[row]['val_loss'])):{width}.3f}" for run in runs)
            lines.append(f"validation perplexity {label:>6}: " + "  ".join(values))
    rates = (sum(r["tokens"] for r in run.train) / sum(r["seconds"] for r in run.train) for run in runs)
    lines.append(f"{'tokens/s':>29}: " + "  ".join(f"{rate:{width}.0f}" for rate in rates))
    return "\n".join(lines)


def plot(runs: list[History], path: Path) -> None:
    """Draw loss curves and a map of expert load for each run into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(runs), figsize=(5.5 + 3.2 * len(runs), 4), layout="constrained", squeeze=False)
    curve, *maps = axes[0]
    for run, style in zip(runs, ("-", "--", ":", "-.") * len(runs), strict=False):
        (line,) = curve.plot([r["step"] for r in run.train], [r["loss"] for r in run.train], style, label=run.name)
        if run.validation:
            steps, losses = [r["step"] for r in run.validation], [r["val_loss"] for r in run.validation]
            curve.plot(steps, losses, "o", color=line.get_color(), label=f"{run.name}, validation")
    curve.set(xlabel="step", ylabel="loss (nats per target token)", title="loss")
    curve.grid(alpha=0.3)
    curve.legend()
    for run, axis in zip(runs, maps, strict=True):
        experts = len(run.loads[0])
        shares = [[x * experts for x in layer] for layer in run.loads]
        image = axis.imshow(shares, cmap="coolwarm", vmin=0, vmax=2, aspect="auto")
        axis.set(xlabel="expert", ylabel="layer", title=f"expert load, {run.name}\n(1 = fair share)")
        axis.set_xticks(range(experts))
        axis.set_yticks(range(len(shares)))
        figure.colorbar(image, ax=axis)
    figure.savefig(path, dpi=120)
    plt.close(figure)
