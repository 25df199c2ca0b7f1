"""Pictures and tables of runs, from their metrics.jsonl."""

import argparse
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from accessory.errors import UserError
from accessory.files import check_directory, check_file, check_writable
from accessory.train.health import STARVED
from accessory.train.loggers import METRICS, read_metrics
from accessory.train.picture import picture

MEASURED = {"step", "loss", "tokens", "seconds", "loads"}
"""What every training step has been logged with, always."""
MOST_NUMBERS = 128
"""So many fit into a map of loads."""


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
    def steps(self) -> list[int]:
        return [row["step"] for row in self.train]

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
    times = Counter(run.name for run in runs)
    by_path = [replace(run, name=str(path)) for run, path in zip(runs, arguments.runs, strict=True)]
    runs = [long if times[run.name] > 1 or not run.name else run for run, long in zip(runs, by_path, strict=True)]
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
    """Loss curves side by side, largest difference, measures of the validation before and after, speed."""
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
    else:
        lines.append("no step is in the logs of all of them")
    for measure in ("perplexity", "accuracy", "macro_f1"):
        for label, row in (("before", 0), ("after", -1)):
            if all(run.validation and f"val_{measure}" in run.validation[row] for run in runs):
                values = (f"{run.validation[row][f'val_{measure}']:{width}.3f}" for run in runs)
                lines.append(f"{f'validation {measure} {label:>6}':>28}: " + "  ".join(values))
    rates = (sum(r["tokens"] for r in run.train) / sum(r["seconds"] for r in run.train) for run in runs)
    lines.append(f"{'tokens/s':>29}: " + "  ".join(f"{rate:{width}.0f}" for rate in rates))
    return "\n".join(lines)


def plot(runs: list[History], path: Path) -> None:
    """Draw into one PNG: the loss curves, how far the routing moved, and below for each run its experts' load, the load of
    each layer's busiest expert and the entropy of its router. What was not measured is left out."""
    columns = 2 if any(run.routing for run in runs) else 1
    with picture(path, 14, 3.8 * (1 + len(runs)), [run.name for run in runs]) as (figure, names):
        above, *rows = figure.subfigures(1 + len(runs), 1, squeeze=False)[:, 0]
        loss, *routing = above.subplots(1, columns, squeeze=False, width_ratios=(2, 1)[:columns])[0]
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            style = {"color": f"C{number}", "linestyle": ("-", "--", ":", "-.")[number % 4], "marker": "."}
            loss.plot(run.steps, [row["loss"] for row in run.train], label=name, **style)
            if run.validation:
                steps, losses = [r["step"] for r in run.validation], [r["val_loss"] for r in run.validation]
                loss.plot(steps, losses, "o", color=style["color"], markerfacecolor="none", label=f"{name}, validation")
            for row in run.routing:
                last = row is run.routing[-1]
                label, alpha = (f"{name}, step {row['step']}", 1) if last else (None, 0.25)
                routing[0].plot(row["layer_routing_change"], label=label, alpha=alpha, **style)
        loss.set(xlabel="step", ylabel="nats per target", title="loss")
        for axis in routing:
            axis.set(xlabel="layer", ylabel="share of the probe's choices", ylim=(0, None))
            axis.set_title("routing that changed since the start\n(pale: at earlier validations)")
        for axis in (loss, *routing):
            axis.xaxis.set_major_locator(_whole_numbers())
            axis.grid(alpha=0.3)
            axis.legend()
        for row, run, name in zip(rows, runs, names, strict=True):
            row.suptitle(name, fontweight="bold")
            _plot_routers(row, run)


def _plot_routers(figure: Any, run: History) -> None:
    """The row of one run."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    measured = {"load of each layer's busiest expert\n(fair shares: 1 = all alike)": run.largest_loads}
    if run.entropy_shares is not None:
        measured["entropy of each layer's router\n(share of log E: 1 = no preference, 0 = always sure)"] = run.entropy_shares
    load, *curves = figure.subplots(1, 1 + len(measured))
    _plot_loads(load, np.array(run.loads) * len(run.loads[0]))
    depth = ScalarMappable(Normalize(0, max(1, len(run.loads) - 1)), "viridis")
    colours = depth.to_rgba(np.arange(len(run.loads)))
    for axis, (title, layers) in zip(curves, measured.items(), strict=True):
        for values, colour in zip(layers, colours, strict=True):
            axis.plot(run.steps, values, color=colour, marker=".")
        axis.set(xlabel="step", title=title)
        axis.xaxis.set_major_locator(_whole_numbers())
        axis.grid(alpha=0.3)
    figure.colorbar(depth, ax=curves, label="layer", ticks=_whole_numbers())


def _plot_loads(axis: Any, shares: np.ndarray) -> None:
    """A map of ``shares`` [L, E], in fair shares; red is busy, blue idle."""
    from matplotlib.colors import TwoSlopeNorm

    spread = max(0.25, float(abs(shares - 1).max()))  # a load that is even stays pale
    image = axis.imshow(shares, cmap="coolwarm", norm=TwoSlopeNorm(1, max(0.0, 1 - spread), 1 + spread), aspect="auto")
    for layer, expert in np.ndindex(*shares.shape):
        starved = shares[layer, expert] < STARVED
        if starved or shares.size <= MOST_NUMBERS:
            text = "\N{MULTIPLICATION SIGN}" if starved else f"{shares[layer, expert]:.2f}"
            axis.text(expert, layer, text, ha="center", va="center", fontsize=8)
    axis.set(
        xlabel="expert", ylabel="layer", title="expert load of the run\n(1 = fair share, \N{MULTIPLICATION SIGN} = starved)"
    )
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(_whole_numbers())
    axis.figure.colorbar(image, ax=axis)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)
