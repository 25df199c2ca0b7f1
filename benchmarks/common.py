"""Shared by the benchmarks: fair timing, and a line about the environment."""

import os
import platform
import subprocess
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import transformers

from accessory.train.measure import seconds_of


def start_one_process() -> None:
    """Start a process group of one rank with the device's own backend."""
    own = {"backend": "nccl", "device_id": torch.device("cuda", 0)} if torch.cuda.is_available() else {"backend": "gloo"}
    dist.init_process_group(**own, store=dist.HashStore(), rank=0, world_size=1)


def pick_device() -> torch.device:
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def time_in_turn(bodies: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each body over ``rounds``, taken in turn so that a slow moment affects all of them.

    A body is stopped when it has taken 20 s in all, after at least three rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in bodies}
    for number in range(rounds + 1):
        for name, body in bodies.items():
            if len(seconds[name]) >= 3 and sum(seconds[name]) > 20:
                continue
            taken = seconds_of(body, device)
            if number:  # the first round warms up
                seconds[name].append(taken)
    return {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}


def environment() -> str:
    """The hardware, versions and commit of this run."""
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    else:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
        hardware = f"{model}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{hardware}; {versions}; commit {commit or 'unknown'}; {time.strftime('%Y-%m-%d')}"
