"""The verb ``certify``."""

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from accessory.certify.judge import TOLERANCES, Judge, Verdict
from accessory.certify.matrix import (
    cache_cells,
    check_fits,
    classifier_cells,
    file_cells,
    kernel_cells,
    offloaded_cells,
    other_kernels,
    quantised_cells,
    seeing_cells,
    training_cells,
)
from accessory.certify.parity import TransformersJudge, parity_cells, run_parity
from accessory.certify.precision import PrecisionJudge, precision_cells, run_precision
from accessory.certify.problem import SMALL, WIDE, Problem
from accessory.certify.processes import Body, run_jobs
from accessory.certify.run import run_cell
from accessory.certify.serving import serving_cells
from accessory.certify.table import Certificate, environment, quantities, text_header, text_line, to_html
from accessory.checkpoint.description import load_args
from accessory.config import write_json
from accessory.console import progress, say
from accessory.dtypes import get_dtype
from accessory.errors import UserError
from accessory.files import check_writable, replacing
from accessory.model.args import ModelArgs
from accessory.model.logical import LogicalModel
from accessory.model.memory import memory_of


def run_certify(arguments: argparse.Namespace) -> None:
    """Certify, print the table, and write the requested files; exit code 1 if a cell fails."""
    torch.set_num_threads(1)  # the ranks have the other cores
    for file in filter(None, (arguments.json, arguments.html)):
        check_writable(file)
    worlds = _worlds(arguments)
    built_in = WIDE if arguments.precision == "bf16" else SMALL
    args = load_args(arguments.model) if arguments.model else built_in
    if not args.load_balancing_weight:  # else its gradient would not be tested
        args = replace(args, load_balancing_weight=SMALL.load_balancing_weight)
    where = str(arguments.model or "the model")
    if args.moe.score_bias:
        raise UserError(f"{where}: other programs' files cannot hold moe.score_bias: certify a copy where it is false")
    check_fits(args, worlds, where)
    _check_memory(args, worlds[-1], where)
    if arguments.against:
        certificate = _parity(arguments, Problem(args, torch.float32), worlds)
    elif arguments.precision == "bf16":
        certificate = _low_precision(arguments, Problem(args, torch.bfloat16), worlds)
    else:
        certificate = _matrix(arguments, Problem(args, get_dtype(arguments.precision or "fp64")), worlds)
    say(_text(certificate))
    if arguments.json:
        with replacing(arguments.json) as unfinished:
            write_json(unfinished, certificate.to_json())
    if arguments.html:
        with replacing(arguments.html) as unfinished:
            unfinished.write_text(to_html(certificate), encoding="utf-8")
    sys.exit(0 if certificate.passed else 1)


def _check_memory(args: ModelArgs, world: int, where: str) -> None:
    """Raise UserError if the full fp64 weights, which each rank and the reference hold, exceed the machine's memory."""
    numbers = sum(LogicalModel(args).sizes.values())
    needed, there = (world + 1) * 8 * numbers, memory_of(torch.device("cpu"))
    if needed > there:
        raise UserError(
            f"{where}, --world {world}: {world + 1} copies of the weights in fp64 need {needed / 2**30:.0f} GiB and this "
            f"machine has {there / 2**30:.0f} GiB: use a smaller n_layers in a copy of the file, or a smaller --world"
        )


def _worlds(arguments: argparse.Namespace) -> list[int]:
    """The world sizes to run. Raises UserError if this machine cannot run them."""
    text = arguments.world or ("1,2" if arguments.quick else "1,2,4")
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise UserError(f"--world {text}: expected numbers of processes, such as 1,2,4")
    worlds = sorted({int(part) for part in text.split(",")})
    if arguments.device == "cuda" and worlds[-1] > torch.cuda.device_count():
        raise UserError(
            f"--world {text}: --device cuda needs a GPU for each process and there are {torch.cuda.device_count()}: "
            "name smaller worlds, or use --device cpu"
        )
    return worlds


def _matrix(arguments: argparse.Namespace, problem: Problem, worlds: Sequence[int]) -> Certificate:
    """Training and files against the plain reference."""
    judge, strength = Judge(problem), 2 if arguments.quick else 3
    kinds = (
        training_cells(worlds, strength),
        classifier_cells(worlds),
        seeing_cells(worlds),
        quantised_cells(problem.args, worlds),
        offloaded_cells(problem.args, worlds),
        kernel_cells(worlds, _kernels(arguments, problem, worlds[-1])),
        file_cells(worlds),
        cache_cells(worlds),
        serving_cells(worlds),
    )
    cells = _only(arguments, [cell for kind in kinds for cell in kind])
    about = {
        "model": str(arguments.model or "the small one that is built in"),
        "reference": "one plain process in fp64 that shares no distributed code with what is certified",
        "cells": f"every {strength} settings meet in every combination that exists, among cells chosen for it",
        "precision": arguments.precision or "fp64",
    }
    certificate = Certificate("accessory certify", about | environment(arguments.device))
    _fill(certificate, judge, functools.partial(run_cell, problem), cells, arguments.device)
    certificate.about["closest routing decision"] = f"router logits {judge.margin:.1e} apart"
    if judge.margin < TOLERANCES[problem.dtype]:
        certificate.about["closest routing decision"] += ": rounding may turn it, and a FAIL be no fault of the program"
    return certificate


def _low_precision(arguments: argparse.Namespace, problem: Problem, worlds: Sequence[int]) -> Certificate:
    """Pieces of training in bf16 against fp64."""
    about = {
        "model": str(arguments.model or "a small one that is built in"),
        "reference": "fp64, on the numbers that each piece was given; of the curve, one plain process in fp64",
        "precision": "bf16, masters in fp32",
    }
    certificate = Certificate("accessory certify --precision bf16", about | environment(arguments.device))
    cells = _only(arguments, precision_cells(worlds, _kernels(arguments, problem, 1)))
    _fill(certificate, PrecisionJudge(problem), functools.partial(run_precision, problem), cells, arguments.device)
    return certificate


def _parity(arguments: argparse.Namespace, problem: Problem, worlds: Sequence[int]) -> Certificate:
    """Logits, loss and gradients against transformers."""
    if arguments.precision == "fp64":
        raise UserError("--against hf compares in fp32, in which transformers computes its norms: use --precision fp32")
    judge = TransformersJudge(problem)
    about = {
        "model": str(arguments.model or "the small one that is built in"),
        "reference": f"Mixtral of transformers {judge.version}, in one process",
        "precision": "fp32",
    }
    certificate = Certificate("accessory certify --against hf", about | environment(arguments.device))
    cells = _only(arguments, parity_cells(worlds))
    _fill(certificate, judge, functools.partial(run_parity, problem), cells, arguments.device)
    return certificate


def _kernels(arguments: argparse.Namespace, problem: Problem, most_ranks: int) -> list[str]:
    asked = [word.removeprefix("kernel=") for word in arguments.only]
    return other_kernels(problem.args, problem.dtype, arguments.device, most_ranks, asked)


def _only(arguments: argparse.Namespace, cells: Sequence[Any]) -> list[Any]:
    """The cells selected by --only, by the settings in their lines of the table."""
    wanted = {tuple(word.split("=", 1)) for word in arguments.only}
    found = [cell for cell in cells if wanted <= cell.settings().items()]
    if not found:
        names = dict.fromkeys(name for cell in cells for name in cell.settings())
        raise UserError(
            f"--only {' '.join(arguments.only)}: no cell of this certificate has that; settings: {', '.join(names)}"
        )
    return found


def _fill(certificate: Certificate, judge: Any, body: Body, cells: Sequence[Any], device: str) -> None:
    """Run the cells, one set of processes for each world size."""
    with progress(total=len(cells), unit="cell") as bar:
        for world in sorted({cell.world for cell in cells}):
            for cell, outcome in run_jobs(world, device, body, [cell for cell in cells if cell.world == world]):
                certificate.rows.append(_verdict(judge, cell, outcome))
                bar.update()


def _verdict(judge: Any, cell: Any, outcome: Any) -> Verdict:
    """The verdict on a cell. An exception in judging it is a failure of this cell only: results can be wrong in any way."""
    try:
        row: Verdict = judge.row(cell, outcome)
        return row
    except Exception as error:
        return Verdict(cell, {}, judge.bounds, f"cannot be judged: {type(error).__name__}: {error}")


def _text(certificate: Certificate) -> str:
    lines = []
    for rows in certificate.sections():
        lines += [text_header(rows), *(text_line(row, quantities(rows)) for row in rows), ""]
    lines += [f"{name}: {value}" for name, value in certificate.about.items()]
    return "\n".join([*lines, certificate.summary()])
