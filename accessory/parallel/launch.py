"""Join the processes of one job, however they were started: torchrun, srun, or one plain process."""

import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from accessory.errors import UserError
from accessory.parallel.watchdog import LONGEST_COLLECTIVE_S, Watchdog

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """This process's place in the job."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @property
    def device(self) -> torch.device:
        """This rank's GPU, or the CPU. Where the scheduler shows each task a single GPU, that one."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())


def read_environment() -> Launch:
    """Find rank and world size; set MASTER_ADDR and MASTER_PORT under srun. RANK, where set (torchrun), wins."""
    env = os.environ
    if "RANK" in env:
        world = int(env["WORLD_SIZE"])
        return Launch(int(env["RANK"]), world, int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", world)))
    # a shell inside an allocation (salloc) has SLURM_NTASKS as well, but is no task of a step
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in env:
        world = int(env["SLURM_NTASKS"])
        env.setdefault("MASTER_ADDR", _first_host(env["SLURM_JOB_NODELIST"]))
        env.setdefault("MASTER_PORT", str(20000 + (int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % 20000))
        per_node = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_NTASKS_PER_NODE", str(world)))
        return Launch(int(env["SLURM_PROCID"]), world, int(env["SLURM_LOCALID"]), int(per_node.split("(")[0].split(",")[0]))
    return Launch(0, 1, 0, 1)


def _first_host(nodelist: str) -> str:
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    return hosts.stdout.split()[0]


def join(launch: Launch) -> None:
    """Initialise the default process group (NCCL on GPUs, gloo on CPU) and share the cores between local ranks."""
    device = launch.device
    if "OMP_NUM_THREADS" not in os.environ or device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // launch.local_world))
    backend = "gloo" if device.type == "cpu" else "nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        wait = timedelta(seconds=LONGEST_COLLECTIVE_S)
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.world, timeout=wait)


def first_on_each_node(body: Callable[[], T], launch: Launch) -> T:
    """Run ``body``, which leaves something on the disk for others to find, on one rank of each node before the others.

    However long it takes: those who wait look into the job's key-value store, they are in no collective that times out.
    """
    if launch.world == 1:
        return body()
    store = dist.distributed_c10d._get_default_store()
    key = f"accessory/first/{socket.gethostname()}/{launch.rank - launch.local_rank}"
    if launch.local_rank == 0:
        try:
            result = body()
        except BaseException:
            store.set(key, "failed")
            raise
        store.set(key, "done")
    else:
        while not store.check([key]):
            time.sleep(0.05)
        if store.get(key) != b"done":
            raise UserError("the first rank of this node failed")
        result = body()
    store.add("accessory/first", 1)
    while store.add("accessory/first", 0) < launch.world:  # another node may take longer
        time.sleep(0.05)
    return result


def run_job(body: Callable[[Launch], Any]) -> NoReturn:
    """Run ``body`` as one rank of a job and end the process.

    A UserError is one sentence, anything else a traceback; of all ranks that fail, only the first to do so speaks. The
    watchdog ends those that do not notice, and speaks where a rank can not: it is gone, or waits for ever.
    """
    launch = read_environment()
    code, watchdog = 0, None
    try:
        join(launch)
        if launch.world > 1:
            watchdog = Watchdog()
        body(launch)
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        code = 1
        if watchdog:
            watchdog.failing(error)
        if _first_to_fail():
            if isinstance(error, UserError):
                print(f"accessory: error: {error}", file=sys.stderr)
            else:
                print(f"accessory: rank {launch.rank} of {launch.world} failed", file=sys.stderr)
                traceback.print_exception(error)
    if watchdog:
        watchdog.farewell(code)
    leave(code)


def _first_to_fail() -> bool:
    """Count failures in the job's own key-value store; if it cannot be reached, rather speak twice than not at all."""
    try:
        return dist.distributed_c10d._get_default_store().add("accessory/failures", 1) == 1
    except (RuntimeError, ValueError):
        return True


def leave(code: int) -> NoReturn:
    """End this process. Gloo's threads can abort a regular interpreter exit, so after cleaning up it is left at once."""
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
