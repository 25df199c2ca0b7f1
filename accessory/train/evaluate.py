"""The verb ``evaluate``: scores of a model on tasks and data, or of two models side by side."""

import argparse
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from accessory.console import say
from accessory.data.image_reader import ImageReader
from accessory.data.loader import BatchPlan, sample_lengths
from accessory.data.mix import load_mix
from accessory.data.packing import Rows
from accessory.errors import UserError, extra, needs
from accessory.files import check_directory, check_writable, replacing
from accessory.infer.chat import answer_job, load
from accessory.infer.meta import MetaModel
from accessory.infer.scoring import MOST_TOKENS
from accessory.parallel.launch import Launch, first_on_each_node
from accessory.settings import DataSection, RunConfig
from accessory.train.data_check import run_of
from accessory.train.objective import Classification, Objective, TokenAccuracy
from accessory.train.validate import mean_loss

Results = dict[str, dict[str, Any]]
"""As lm-evaluation-harness has them: task -> "metric,filter" and "metric_stderr,filter" -> value."""


def run_evaluate(arguments: argparse.Namespace) -> None:
    """The ``evaluate`` verb."""
    answer_job(evaluate, arguments)


def evaluate(arguments: argparse.Namespace, launch: Launch) -> None:
    """Measure one model after the other over all ranks of the job; print a table of both."""
    if not arguments.tasks and not arguments.data:
        raise UserError("there is nothing to evaluate on: name --tasks, --data or both")
    of_tasks = {name: getattr(arguments, name) for name in ("include", "num_fewshot", "limit", "apply_chat_template")}
    if not arguments.tasks and (
        given := [name for name, value in of_tasks.items() if value is not None and value is not False]
    ):
        raise UserError(f"--{given[0].replace('_', '-')} says how --tasks are asked, and there are none")
    if arguments.out:
        check_writable(arguments.out)
    run = run_of(arguments.data) if arguments.data else None
    manager = _find_tasks(arguments) if arguments.tasks and not launch.rank else None
    models = [[arguments.checkpoint, *arguments.adapter]]
    if arguments.against:
        models.insert(0, arguments.against)
    measured = []
    for directories in models:
        measured.append(_measure(directories, arguments, run, manager, launch))
        gc.collect()  # of the one, before there is another
        if launch.device.type == "cuda":
            torch.cuda.empty_cache()
    if launch.rank:
        return
    named = [(" + ".join(map(str, model)), found["results"]) for model, found in zip(models, measured, strict=True)]
    say(table(named))
    if arguments.out:
        asked = {name: getattr(arguments, name) for name in ("tasks", "data", "num_fewshot", "limit", "precision")}
        told = [{"checkpoint": model} | found for model, found in zip(models, measured, strict=True)]
        with replacing(arguments.out) as unfinished:
            unfinished.write_text(json.dumps({"asked": asked, "models": told}, indent=2, default=str) + "\n")


def _find_tasks(arguments: argparse.Namespace) -> Any:
    if arguments.include:
        check_directory(arguments.include, "a directory of YAML task files")
    with needs("--tasks", extra("evaluate")):
        from accessory.infer.lm_eval import find_tasks

    return find_tasks(arguments.tasks, arguments.include)


def _measure(
    directories: Sequence[Path], arguments: argparse.Namespace, run: RunConfig | None, manager: Any, launch: Launch
) -> dict[str, Any]:
    """What is measured of one model, under ``results`` (on rank 0)."""
    model = load(arguments, launch, directories)
    found: dict[str, Any] = {"results": {}}
    if arguments.data:
        found["results"] |= on_data(model, arguments.data, run, launch, arguments.max_seq_len)
    if arguments.tasks:
        from accessory.infer.lm_eval import run_tasks

        told = run_tasks(
            model, arguments.tasks, manager, arguments.num_fewshot, arguments.limit, arguments.apply_chat_template
        )
        found["results"] |= told.pop("results", {})
        found |= {name: told[name] for name in ("versions", "n-shot", "n-samples", "higher_is_better") if name in told}
    return found


def on_data(model: MetaModel, path: Path, run: RunConfig | None, launch: Launch, longest: int | None = None) -> Results:
    """Loss and what else validation tells, of what a mix marks for validation (of all of it if it marks nothing), or of
    what a run holds out; on all ranks. ``longest``: tokens of a sample; None: as the run has it, else the model."""
    section = run.data if run else DataSection(str(path), validation=0.0)
    seed, labels = run.train.seed if run else 0, model.llma.args.labels
    max_seq_len = longest or section.max_seq_len or model.max_seq_len
    visual = model.llma.sight
    data = first_on_each_node(
        lambda: load_mix(
            section.mix,
            model.tokenizer,
            max_seq_len,
            seed,
            validation=section.validation,
            bad_records=section.bad_records,
            labels=labels,
            visual=visual,
        ),
        launch,
    )
    samples = data.validation or data.training
    lengths = sample_lengths(samples)
    say(f"{path}: {len(samples)} {'held-out ' if data.validation else ''}samples, {lengths.sum():,} tokens")
    rows = Rows.packed(lengths.argsort(kind="stable"), lengths, max(MOST_TOKENS, int(lengths.max())))
    objective: Objective = Classification() if labels else TokenAccuracy()
    plan = BatchPlan(1, 1, 0, 1, images=ImageReader(visual.size, section.bad_records == "skip") if visual else None)
    loss, metrics = mean_loss(model.llma, objective, samples, rows, plan)
    return {str(path): {f"{name},none": value for name, value in ({"loss": loss} | metrics).items()}}


def table(models: Sequence[tuple[str, Results]]) -> str:
    """A line for each metric of each task, with a value and its standard error for each model; of two, the difference."""
    measured = [_values(results) for _, results in models]
    lines = [["task", "metric", *(head for name, _ in models for head in (name if len(models) > 1 else "value", "stderr"))]]
    if len(models) > 1:
        lines[0].append("difference")
    task = ""
    for key in dict.fromkeys(key for values in measured for key in values):
        line = ["" if key[0] == task else key[0], key[1]]
        task = key[0]
        found = [values.get(key, (None, None)) for values in measured]
        for value, stderr in found:
            line += [_shown(value), _shown(stderr)]
        if len(models) > 1:
            (before, _), (after, _) = found
            line.append(_shown(None if before is None or after is None else after - before, "+"))
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    written = (
        "  ".join(
            cell.ljust(width) if n < 2 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in written)


def _shown(number: float | None, sign: str = "") -> str:
    if number is None:
        return ""
    return format(number, f"{sign}.4f" if abs(number) < 1e6 else f"{sign}.4g")


def _values(results: Results) -> dict[tuple[str, str], tuple[float, float | None]]:
    """(value, standard error) by task and metric."""
    found = {}
    for task, measured in results.items():
        for key, value in measured.items():
            metric, comma, how = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                stderr = measured.get(f"{metric}_stderr,{how}")
                name = metric if how == "none" else f"{metric} ({how})"
                found[task, name] = float(value), stderr if isinstance(stderr, float) else None
    return found
