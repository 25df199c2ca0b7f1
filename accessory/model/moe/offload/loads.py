"""How often each expert was used elsewhere: what a run told of its routers."""

import json
from pathlib import Path

from accessory.errors import UserError
from accessory.files import check_file
from accessory.model.args import ModelArgs

METRICS = "metrics.jsonl"


def read_loads(path: Path, args: ModelArgs) -> list[list[float]]:
    """[L][E] how often a token uses each expert, by all the ``loads`` of a run.

    Args:
        path: its metrics.jsonl, or its directory.

    Raises:
        UserError: it is not there, has none, or is of another model.
    """
    where = f"offload.loads: {path}"
    path = check_file(path / METRICS if path.is_dir() else path, "a run's metrics.jsonl")
    experts, top_k = args.moe.num_experts, args.moe.num_experts_per_tok
    totals = [[0.0] * experts for _ in range(args.n_layers)]
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if '"loads"' in line]
        found = [row["loads"] for row in rows]
        for loads in found:
            for total, layer in zip(totals, loads, strict=True):
                total[:] = [sum(pair) for pair in zip(total, layer, strict=True)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where}: not the loads of a model with {args.n_layers} layers of {experts} experts: name a run of this model"
        ) from error
    if not all(sum(total) for total in totals):
        raise UserError(f"{where}: no loads in it: name the directory of a run, or its metrics.jsonl")
    return [[top_k * load / sum(total) for load in total] for total in totals]
