"""Some layers of Mixtral 8x7B at full size on one GPU: time and memory of a step, next to the planner's estimates.

python benchmarks/full_size.py --layers 8 --tuning lora
python benchmarks/full_size.py --layers 2 --tuning full --rows 4
"""

import argparse
import dataclasses
import json
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from common import environment, start_one_process

from accessory.checkpoint.description import load_args
from accessory.settings import OptimSection, ParallelSection, Recompute
from accessory.train.balance import RouterLosses
from accessory.train.cards import card_of
from accessory.train.measure import measured_here, seconds_of
from accessory.train.objective import NextToken
from accessory.train.optim import make_optimizer
from accessory.train.planned_step import PlannedRun, planned_job
from accessory.train.planner import TUNINGS, step_seconds
from accessory.train.step import train_step
from accessory.train.trace import Figure

MODEL = Path(__file__).parents[1] / "configs/model/mixtral-8x7b.json"
RECOMPUTES: tuple[Recompute, ...] = ("none", "norms_and_experts", "block")
GPU = torch.device("cuda", 0)


def measured(run: PlannedRun, steps: int) -> tuple[float, float]:
    """Seconds of the median step, and the peak in bytes."""
    model = run.model_without_weights("cuda")
    model.to_empty(device=GPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02)
    optimizer, batch, seconds = make_optimizer(model, OptimSection(lr=1e-5)), run.batch().to(GPU), []

    def step() -> None:
        train_step(model, optimizer, [batch], NextToken(), RouterLosses(), clip_grad=1.0)

    for number in range(steps + 2):
        if number == 2:
            torch.cuda.reset_peak_memory_stats()
        seconds.append(seconds_of(step, GPU))
    return median(seconds[2:]), torch.cuda.max_memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tuning", choices=list(TUNINGS), default="lora")
    parser.add_argument("--rows", type=int, default=1, help="of 4096 tokens")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "no GPU here: nothing is measured\n")
    print(environment())
    found = card_of(torch.cuda.get_device_name(GPU))
    card = measured_here(found[1] if found else None)
    args = dataclasses.replace(load_args(MODEL), n_layers=arguments.layers)
    for recompute in RECOMPUTES:
        parallel = ParallelSection(recompute=recompute)
        run = PlannedRun(args, TUNINGS[arguments.tuning], "mixtral", parallel, arguments.rows, 1, 4096)
        with planned_job(1):
            figures = run.traced()
        planned = sum(step_seconds(figures, run, card, per_node=1, world=1).values())
        start_one_process()
        try:
            seconds, peak = measured(run, arguments.steps)
        except torch.OutOfMemoryError:
            print(f"{recompute:18s} out of memory; planned {figures[Figure('peak')] / 2**30:.1f} GiB")
            continue
        finally:
            dist.destroy_process_group()
            torch.cuda.empty_cache()
        line = {"recompute": recompute, "tokens/s": arguments.rows * 4096 / seconds, "seconds": seconds, "planned": planned}
        line |= {"peak GiB": peak / 2**30, "planned GiB": figures[Figure("peak")] / 2**30}
        print(json.dumps({name: round(x, 3) if isinstance(x, float) else x for name, x in line.items()}), flush=True)


if __name__ == "__main__":
    main()
