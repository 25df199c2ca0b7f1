"""Saving a training state: the pause of training, the seconds until it is on disk, and the extra memory.

    python benchmarks/save.py             # 2 ranks, 1.5 GB of fp32 masters and moments, in a temporary directory

It is compared with the same save without a thread, with torch.distributed.checkpoint's async_save, and with a state
gathered on rank 0 for torch.save. Each side runs in processes of its own, in turn. Memory is the largest growth of any
rank's anonymous pages, as a share of its shard of the state.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import environment
from torch.distributed.tensor import DTensor
from train_step import SHAPE

from accessory.checkpoint.state import StateNotes
from accessory.model.build import RandomWeights, build_model
from accessory.model.logical import LogicalModel
from accessory.model.moe.layouts import EXPERT
from accessory.parallel.fsdp import local_part, wrap
from accessory.parallel.launch import hold_port, join, leave, reach_store, read_environment
from accessory.parallel.mesh import make_mesh
from accessory.settings import OptimSection
from accessory.train.optim import make_optimizer
from accessory.train.saver import Save, Saver
from accessory.train.state import save_state

SIDES = ("accessory", "accessory, at once", "DCP async_save", "gathered torch.save")


class PeakMemory:
    """The peak growth of this process's anonymous memory since this object was made, watched by a thread."""

    def __init__(self) -> None:
        self._first = self.most = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.most - self._first

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024


def measure(side: str, folder: Path, rounds: int, layers: int) -> None:
    """Measure as one rank; rank 0 prints the results of each round as a line of JSON."""
    launch = read_environment()
    join(launch, reach_store(launch, 60))
    mesh, logical = make_mesh(), LogicalModel(replace(SHAPE, n_layers=layers))
    model = build_model(
        logical,
        EXPERT,
        RandomWeights(logical, 0),
        mesh=mesh,
        dtype=torch.float32,
        device=launch.device,
        shard=lambda m: wrap(m, mesh, "fsdp", torch.float32, launch.device.type),
    )
    optimizer = make_optimizer(model, OptimSection())
    for parameter in model.parameters():  # moments as after a step, without running one
        moments = {name: torch.ones_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    shard = 3 * sum(local_part(parameter).nbytes for parameter in model.parameters())
    begin = {"accessory": ours, "accessory, at once": at_once, "DCP async_save": theirs, "gathered torch.save": gathered}
    save, finish = begin[side](model, optimizer)
    found = []
    for number in range(rounds + 1):
        dist.barrier()
        peak, began = PeakMemory(), time.perf_counter()
        save(folder / f"step{number}")
        stall = time.perf_counter() - began
        finish()
        found.append((stall, time.perf_counter() - began, peak.stop() / shard))
    everyone: list[list[tuple[float, float, float]]] = [[] for _ in range(launch.world)]
    dist.all_gather_object(everyone, found[1:])  # the first round warms up
    if launch.rank == 0:
        worst = [[max(rank[n][kind] for rank in everyone) for kind in range(3)] for n in range(rounds)]
        values = dict(zip(("stall", "seconds", "memory"), map(median, zip(*worst, strict=True)), strict=True))
        print(json.dumps(values | {"state": shard * launch.world, "shard": shard}), flush=True)
    leave(0)


Begun = tuple[Callable[[Path], None], Callable[[], None]]
"""A function that begins a save into a directory, and one that waits for it."""


def ours(model, optimizer) -> Begun:
    saver = Saver()

    def save(directory: Path) -> None:
        saves: list[Save] = []
        save_state(model, optimizer, directory, notes(), 2, write=saves.append)
        saver.begin(saves)

    return save, saver.wait


def at_once(model, optimizer) -> Begun:
    return lambda directory: save_state(model, optimizer, directory, notes(), 2), lambda: None


def notes() -> StateNotes:
    return StateNotes(dist.get_world_size(), steps=1, rows=1, of_steps=2, global_batch=1, data_digest="")


def tensors(model, optimizer) -> dict[str, torch.Tensor]:
    named = dict(model.named_parameters())
    moments = {f"{k}/{name}": optimizer.state[p][k] for name, p in named.items() for k in ("exp_avg", "exp_avg_sq")}
    return named | moments


def theirs(model, optimizer) -> Begun:
    group, pending = dist.new_group(backend="gloo"), []

    def save(directory: Path) -> None:
        pending.append(dcp.async_save(tensors(model, optimizer), checkpoint_id=directory, process_group=group))

    return save, lambda: pending.pop().result()


def gathered(model, optimizer) -> Begun:
    def save(directory: Path) -> None:
        whole = {}
        for name, tensor in tensors(model, optimizer).items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if dist.get_rank() == 0:
                whole[name] = full.detach().cpu()
        if dist.get_rank() == 0:
            directory.mkdir()
            with open(directory / "state.pth", "wb") as file:
                torch.save(whole, file)
                os.fsync(file.fileno())
        dist.barrier()

    return save, lambda: None


def run(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run all ranks of one side."""
    with hold_port() as held, tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        port = held.getsockname()[1]
        command = [sys.executable, __file__, "--measure", side, folder, "--rounds", str(arguments.rounds)]
        command += ["--layers", str(arguments.layers)]
        job = {"WORLD_SIZE": arguments.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        ranks = [
            subprocess.Popen(
                command,
                env=os.environ | {k: str(v) for k, v in (job | {"RANK": rank, "LOCAL_RANK": rank}).items()},
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
            for rank in range(arguments.ranks)
        ]
        said, *_ = [process.communicate()[0] for process in ranks]
        assert all(process.returncode == 0 for process in ranks), side
        return json.loads(next(line for line in said.splitlines() if line.startswith("{")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4, help="of 24 M parameters each, beside 33 M; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where to write; default: the system's temporary directory")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], Path(arguments.measure[1]), arguments.rounds, arguments.layers)
        return
    print(environment())
    results = {side: run(side, arguments) for side in SIDES}
    first, base = results["accessory"], results["accessory, at once"]["stall"]
    print(f"a state of {first['state'] / 1e9:.2f} GB on {arguments.ranks} ranks, {first['shard'] / 1e9:.2f} GB each\n")
    print(f"{'':22}{'stall, s':>10}{'of ours at once':>17}{'on disk, s':>12}{'extra memory / shard':>22}")
    for side, found in results.items():
        share = found["stall"] / base
        print(f"{side:22}{found['stall']:10.2f}{share:17.0%}{found['seconds']:12.2f}{found['memory']:22.2f}")


if __name__ == "__main__":
    main()
