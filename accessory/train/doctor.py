"""``accessory doctor``: whether the processes of a job can work together here, told on one screen before a run needs it."""

import argparse
import os
import platform
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from accessory import __version__
from accessory.console import in_bytes, is_main, listed
from accessory.errors import UserError
from accessory.files import write_rate
from accessory.model.attention import varlen_runs
from accessory.model.memory import memory_of
from accessory.model.moe.kernels import pick_kernel
from accessory.parallel.launch import Launch, run_job
from accessory.parallel.mesh import plan_mesh
from accessory.parallel.watchdog import end_stalls_after, progressed, store_holder
from accessory.settings import RunConfig
from accessory.train.dry_run import SaveSizes
from accessory.train.model import Start

PATIENCE_S = 60.0
"""After so long without an answer the job ends, and says who waits where."""
SEEN_WITHIN_S = 10.0
CLOCKS_S = 2.0
PACKAGES = ("torch", "fairscale", "safetensors", "numpy", "sentencepiece", "transformers", "triton")
TRANSFER = 2**24  # bytes of an all-reduce whose time is told


@dataclass(frozen=True)
class Finding:
    """What one examination found; ``wrong``: a run would suffer from it."""

    text: str
    wrong: bool = False


class Examination:
    """What is looked at, by all ranks together; every method returns the same on each (collectives).

    Args:
        directory: where a run would write. sizes: of what it would write next, if that is known.
    """

    def __init__(self, launch: Launch, directory: Path, sizes: SaveSizes | None):
        self.launch, self.directory, self.sizes = launch, directory, sizes
        self.group = dist.new_group(backend="gloo")  # so that NCCL is not needed to say that it does not work

    def findings(self) -> Iterator[tuple[str, Finding]]:
        looks: dict[str, Callable[[], Finding]] = {
            "versions": self.versions,
            "devices": self.devices,
            "kernels": self.kernels,
            "meeting": self.meeting,
            "gloo": lambda: self.round_trip("cpu", self.group),
            "nccl": lambda: self.round_trip("cuda", dist.group.WORLD),
            "files": self.files,
            "disk": self.disk,
            "clocks": self.clocks,
        }
        if self.launch.device.type != "cuda":
            del looks["nccl"]
        for name, look in looks.items():
            progressed(f"examining: {name}")
            yield name, look()

    def everyone(self, own: Any) -> list[Any]:
        """What each rank has, in their order."""
        gathered = [None] * self.launch.world
        dist.all_gather_object(gathered, own, group=self.group)
        return gathered

    def versions(self) -> Finding:
        own = {"accessory": __version__, "Python": platform.python_version()} | _packages()
        if torch.cuda.is_available():
            own |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        text = ", ".join(f"{name} {number}" for name, number in own.items())
        theirs = self.everyone(own)
        if odd := [f"rank {rank} has {other}" for rank, other in enumerate(theirs) if other != theirs[0]]:
            return Finding(f"not the same on all ranks: rank 0 has {theirs[0]}, {listed(odd, 1)}", wrong=True)
        return Finding(text)

    def devices(self) -> Finding:
        device, launch = self.launch.device, self.launch
        hosts = Counter(self.everyone(socket.gethostname()))
        where = ", ".join(f"{count} on {host}" for host, count in hosts.items())
        memory = in_bytes(memory_of(device))
        if device.type == "cuda":
            kinds = Counter(self.everyone(torch.cuda.get_device_name(device)))
            text = f"{launch.world} process(es), {where}; {', '.join(kinds)} with {memory} each"
            if any(self.everyone(launch.sharing > 1)):
                return Finding(f"{text}; processes share a GPU, which NCCL refuses: start one for each GPU", wrong=True)
            return Finding(text)
        text = f"{launch.world} process(es), {where}; {os.cpu_count()} cores and {memory} each machine; no GPU"
        if any(self.everyone(Path("/dev/nvidia0").exists())):
            text += ": one is there, but torch does not see it: a CPU build of torch, an old driver, or CUDA_VISIBLE_DEVICES"
            return Finding(text, wrong=True)
        return Finding(text)

    def kernels(self) -> Finding:
        device = self.launch.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        kernel = pick_kernel("auto", torch.empty(1, 4096, device=device, dtype=dtype), 14336)
        attention = "in one kernel" if varlen_runs(device, dtype) else "document by document"
        return Finding(f"experts: {kernel.name}; attention: {attention}; {torch.get_num_threads()} thread(s) a process")

    def meeting(self) -> Finding:
        """The store was reached, or nothing of this would run."""
        if self.launch.world == 1:
            return Finding("alone: start it with torchrun or srun to see whether the ranks of a job can talk")
        began = time.perf_counter()
        dist.barrier(group=self.group)
        took = f"{1e3 * (time.perf_counter() - began):.1f} ms"
        return Finding(
            f"{self.launch.world} ranks by {store_holder()}, port {os.environ['MASTER_PORT']}; a barrier takes {took}"
        )

    def round_trip(self, device: str, group: dist.ProcessGroup | None) -> Finding:
        """A sum over all ranks, whose result is known, and how fast it is."""
        world, rank = self.launch.world, self.launch.rank
        data = torch.full((TRANSFER // 4,), float(rank + 1), device=self.launch.device if device == "cuda" else "cpu")
        problem, rate = "", 0.0
        try:
            dist.all_reduce(data, group=group)  # the first connects
            right = bool((data == world * (world + 1) / 2).all())
            problem = "" if right else "a sum over the ranks came out wrong"
            began = time.perf_counter()
            dist.all_reduce(data, group=group)
            float(data[0])
            rate = TRANSFER / (time.perf_counter() - began)
        except RuntimeError as error:
            problem = " ".join(str(error).split())[:200]
        problems = [f"rank {number}: {text}" for number, text in enumerate(self.everyone(problem)) if text]
        if problems:
            return Finding(
                f"{listed(problems, 2)}; NCCL_DEBUG=INFO or the interface (NCCL_SOCKET_IFNAME) may help", wrong=True
            )
        return Finding(f"the sum over {world} rank(s) is right, {in_bytes(rate)}/s")

    def files(self) -> Finding:
        """What each rank writes, all see."""
        token = self.everyone(secrets.token_hex(4))[0]
        folder = self.directory / f".doctor-{token}"
        problem, names = "", [str(rank) for rank in range(self.launch.world)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / names[self.launch.rank]).write_text(token)
        except OSError as error:
            problem = f"{self.directory} cannot be written ({error.strerror})"
        dist.barrier(group=self.group)
        deadline = time.monotonic() + SEEN_WITHIN_S
        while not problem and (missing := [name for name in names if not _reads(folder / name, token)]):
            if time.monotonic() > deadline:
                problem = f"does not see what rank {', '.join(missing[:4])} wrote: {self.directory} is not on shared storage"
                break
            time.sleep(0.05)
        problems = [f"rank {number} {text}" for number, text in enumerate(self.everyone(problem)) if text]
        shutil.rmtree(folder, ignore_errors=True)
        if problems:
            return Finding(f"{listed(problems, 2)}; set out to a directory that all ranks share", wrong=True)
        return Finding(f"{self.directory}: what one rank writes, all {self.launch.world} see")

    def disk(self) -> Finding:
        """The rate is that of rank 0 alone."""
        if not is_main():
            return self.everyone(None)[0]
        free = shutil.disk_usage(self.directory).free
        text = f"{in_bytes(free)} free in {self.directory}"
        wrong = False
        try:
            text += f", {in_bytes(write_rate(self.directory))}/s from one process"
        except OSError as error:
            text, wrong = f"{text}, but writing fails ({error.strerror})", True
        if self.sizes:
            need = self.sizes.model + self.sizes.state
            text += f"; the next save takes {in_bytes(need)}" + (": too much" if free < need else "")
            wrong |= free < need
        return self.everyone(Finding(text, wrong))[0]

    def clocks(self) -> Finding:
        dist.barrier(group=self.group)
        times = self.everyone(time.time())
        apart = max(times) - min(times)
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S %Z', time.localtime(times[0]))}, {apart:.2f} s apart at most"
        late = apart > CLOCKS_S
        return Finding(text + ": logs of several nodes will not fit together; set them by NTP" * late, wrong=late)


def examine(config: RunConfig | None, launch: Launch) -> None:
    """Look at everything and print it. Raises UserError, on all ranks, if something is wrong."""
    end_stalls_after(PATIENCE_S)
    sizes = None
    directory = Path(config.out).absolute() if config else Path.cwd()
    if config:
        mesh = plan_mesh(launch.world, config.parallel.model_parallel, config.parallel.dp_shard())
        sizes = SaveSizes.of(config, Start(config, mesh, launch))
        directory = next(folder for folder in (directory, *directory.parents) if folder.is_dir())
    wrong = []
    for name, finding in Examination(launch, directory, sizes).findings():
        wrong += [name] * finding.wrong
        if is_main():
            print(f"{'WRONG' if finding.wrong else 'ok':<7}{name:<10}{finding.text}", flush=True)
    if wrong:
        raise UserError(f"doctor: {', '.join(wrong)}: see above")
    if is_main():
        print("a run can start here")


def run_doctor(arguments: argparse.Namespace) -> None:
    """The ``doctor`` verb."""

    def config() -> RunConfig | None:
        return RunConfig.load(arguments.config, arguments.overrides) if arguments.config else None

    run_job(lambda launch: examine(config(), launch), PATIENCE_S)


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _reads(path: Path, content: str) -> bool:
    try:
        return path.read_text() == content
    except OSError:
        return False
