"""Sums that stay on the device until they are logged, and the speed of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from accessory.model.args import ModelArgs
from accessory.parallel.mesh import Axis
from accessory.train.cards import card_of
from accessory.train.health import RouterHealth
from accessory.train.objective import Objective
from accessory.train.step import StepResult


class Window:
    """What happened since the last log, as sums over steps; averages are taken once, after one reduction."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.steps: list[StepResult] = []
        self.started = time.perf_counter()

    def add(self, step: StepResult) -> None:
        self.steps.append(step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (validation, saving) does not count as training time."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def reduce(self, dp: Axis) -> tuple[dict[str, float], dict[str, float], RouterHealth]:
        """Sum over steps and the data-parallel ranks of ``dp`` (a collective), and start anew.

        Returns:
            loss (mean over targets), balance and z_loss (means over steps), grad_norm (of the last step), targets,
            tokens, seconds; the objective's metrics; and what the routers did, on the CPU.
        """
        steps, last = self.steps, self.steps[-1]
        each = [[x.flatten().double() for x in (s.loss_sum, s.balance, s.z, s.entropy, s.measures)] for s in steps]
        sums = dp.all_reduce(torch.stack([torch.cat(step) for step in each]).sum(0)).cpu()
        losses, entropy, measures = sums.split([3, len(last.entropy), last.measures.numel()])
        loss_sum, balance, z = losses.tolist()
        counts = dp.all_reduce(torch.stack([s.counts for s in steps]).sum(0))
        targets = int(sum(s.targets for s in steps))
        tokens = int(sum(s.tokens for s in steps))
        now = time.perf_counter()
        loss = loss_sum / max(1, targets)
        values = {
            "loss": loss,
            "balance": balance / len(steps),
            "z_loss": z / len(steps),
            "grad_norm": float(last.grad_norm),
            "targets": targets,
            "tokens": tokens,
            "seconds": now - self.started,
        }
        metrics = self.objective.metrics(loss, measures.view_as(last.measures))
        self.steps, self.started = [], now
        return values, metrics, RouterHealth(counts.cpu(), entropy / max(1, tokens))


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The most FLOP/s this rank could do, and where that number is from: a data sheet, or a matrix product timed here."""
    if device.type == "cuda" and dtype == torch.bfloat16 and (found := card_of(torch.cuda.get_device_name(device))):
        return found[1].flops, f"{found[0]} data sheet"
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * size**3 / seconds, f"a {size} x {size} matrix product timed here"


def speed(values: dict[str, float], args: ModelArgs, mean_length: float, trained: float, peak: float) -> dict[str, float]:
    """Tokens/s of the whole job, and model FLOPs utilisation: model FLOPs (no recompute) over all ranks' peak."""
    rate = values["tokens"] / values["seconds"]
    mfu = rate * args.train_flops_per_token(round(mean_length), trained) / (peak * dist.get_world_size())
    return {"tokens_per_s": rate, "mfu": mfu}
