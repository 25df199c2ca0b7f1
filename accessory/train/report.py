"""Pictures and tables of runs, from their metrics.jsonl."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accessory.errors import UserError
from accessory.files import check_directory, check_file, check_writable, replacing
from accessory.train.health import STARVED
from accessory.train.loggers import METRICS, read_metrics

MEASURED = {"step", "loss", "tokens", "seconds", "loads"}
"""What every training step has been logged with, always."""


@dataclass(frozen=True)
class History:
    """What metrics.jsonl of a run directory says."""

    name: str
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    routing: list[dict[str, Any]]  # of the probe, if there was one
    loads: list[list[float]]  # [L][E], shares of the whole run

    @classmethod
    def load(cls, directory: Path) -> "History":
        path = check_file(check_directory(directory, "a run directory") / METRICS, "a run directory")
        rows = read_metrics(path)
        train = [row for row in rows if "loss" in row]
        if not train:
            raise UserError(f"{path}: no training step was logged")
        if not all(row.keys() >= MEASURED for row in train):
            raise UserError(f"{path}: not the metrics of a run: a training step lacks one of {', '.join(sorted(MEASURED))}")
        totals = [[sum(c) for c in zip(*layer, strict=True)] for layer in zip(*(r["loads"] for r in train), strict=True)]
        loads = [[count / sum(layer) for count in layer] for layer in totals]
        validation, routing = ([row for row in rows if key in row] for key in ("val_loss", "routing_change"))
        return cls(directory.name, train, validation, routing, loads)

    @property
    def largest_loads(self) -> np.ndarray:
        """[L, log steps] load of the busiest expert, in fair shares; found in the oldest metrics, too."""
        counts = np.array([row["loads"] for row in self.train], dtype=float)
        return (counts.max(2) / counts.mean(2).clip(1e-9)).T

    @property
    def entropy_shares(self) -> np.ndarray | None:
        """[L, log steps] entropy of the router's probabilities as a share of log E; None in older metrics."""
        rows = [row.get("layer_entropy_share") for row in self.train]
        return None if None in rows else np.array(rows).T


def run_compare(arguments: argparse.Namespace) -> None:
    """The ``compare`` verb."""
    check_writable(arguments.png)
    runs = [History.load(directory) for directory in arguments.runs]
    print(compare_table(runs))
    for run in runs:
        print(f"\nexpert load of {run.name}, 1.00 = a fair share\n{load_table(run.loads)}")
    plot(runs, arguments.png)
    print(f"\npicture: {arguments.png}")


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
    """Draw loss curves, the change of routing, and maps of each run's expert load and router entropy into one PNG.

    In every map white is healthy.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1 + len(runs), 3, figsize=(14, 3.6 * (1 + len(runs))), layout="constrained")
    grid = axes[0, 0].get_gridspec()
    for axis in axes[0, :2]:
        axis.remove()
    curve, routing = figure.add_subplot(grid[0, :2]), axes[0, 2]
    for run, style in zip(runs, ("-", "--", ":", "-.") * len(runs), strict=False):
        (line,) = curve.plot([r["step"] for r in run.train], [r["loss"] for r in run.train], style, label=run.name)
        if run.validation:
            steps, losses = [r["step"] for r in run.validation], [r["val_loss"] for r in run.validation]
            curve.plot(steps, losses, "o", color=line.get_color(), label=f"{run.name}, validation")
        if run.routing:
            steps = [0, *(r["step"] for r in run.routing)]
            layers = np.array([[0.0] * len(run.loads), *(r["layer_routing_change"] for r in run.routing)])
            routing.plot(steps, layers.mean(1), style, marker="o", color=line.get_color())
            routing.fill_between(steps, layers.min(1), layers.max(1), color=line.get_color(), alpha=0.15, linewidth=0)
    curve.set(xlabel="step", ylabel="loss (nats per target token)", title="loss")
    curve.legend()
    routing.set(xlabel="step", ylabel="share of the probe's choices", ylim=(0, None))
    routing.set_title("routing that changed since the start\n(line: mean, shade: from least to most changed layer)")
    for axis in (curve, routing):
        axis.grid(alpha=0.3)
    for run, (load, busiest, entropy) in zip(runs, axes[1:], strict=True):
        experts, steps = len(run.loads[0]), [0, *(row["step"] for row in run.train)]
        shares = np.array(run.loads) * experts
        _map(load, np.arange(experts + 1) - 0.5, shares, "bwr", 0, 2)
        for layer, expert in zip(*np.nonzero(shares < STARVED), strict=True):
            load.text(expert, layer, "\N{MULTIPLICATION SIGN}", color="white", ha="center", va="center")
        load.set(
            xlabel="expert", title=f"{run.name}: expert load of the run\n(1 = fair share, \N{MULTIPLICATION SIGN} = starved)"
        )
        _map(busiest, steps, run.largest_loads, "Reds", 1, 3)
        busiest.set(xlabel="step", title=f"{run.name}: load of each layer's busiest expert\n(1 = all alike)")
        if run.entropy_shares is None:
            entropy.set_axis_off()
        else:
            _map(entropy, steps, run.entropy_shares, "Reds_r", 0, 1)
            entropy.set(
                xlabel="step", title=f"{run.name}: entropy of each layer's router\n(1 = no preference, 0 = always sure)"
            )
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    plt.close(figure)


def _map(axis: Any, edges: Any, values: np.ndarray, colours: str, least: float, most: float) -> None:
    """Draw ``values`` [L, n]; column i lies between ``edges`` i and i + 1."""
    from matplotlib.ticker import MaxNLocator

    rows = np.arange(len(values) + 1) - 0.5
    image = axis.pcolormesh(edges, rows, values, cmap=colours, vmin=least, vmax=most)
    axis.set(ylabel="layer", ylim=(rows[-1], rows[0]))
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    axis.figure.colorbar(image, ax=axis, extend="max" if most > 1 else "neither")
