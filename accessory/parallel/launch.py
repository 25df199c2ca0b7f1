"""Join the processes of one job, however they were started: torchrun, srun, or one plain process."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from accessory.console import complain
from accessory.errors import STOPS, Stopped, UserError, sentence
from accessory.parallel.watchdog import (
    Watchdog,
    doing,
    end_stalls_after,
    memory_note,
    store_holder,
    torchrun_holds_store,
)
from accessory.settings import LONGEST_COLLECTIVE_S

T = TypeVar("T")


def own_device() -> torch.device:
    """The GPU that torch uses in this process, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def own_cores() -> int:
    """How many cores this process may use: a scheduler or a container may give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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

    @property
    def sharing(self) -> int:
        """How many ranks share the memory of this one's device."""
        return -(-self.local_world // max(1, torch.cuda.device_count()))


def start_ranks(count: int) -> None:
    """Make this process the first of ``count`` ranks on this machine; the others run the same command beside it.

    Nothing that is typed reaches them, Ctrl-C neither: they end when this one tells them, or is gone. Where torchrun or srun
    has started the ranks, there is nothing to do.
    """
    if count == 1 or "RANK" in os.environ:
        return
    held = hold_port()
    port = held.getsockname()[1]
    held.detach()  # as long as this process lives
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "RANK": "0"}
    for rank in range(1, count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "accessory", *sys.argv[1:]]
        subprocess.Popen(command, env=os.environ | place, stdin=subprocess.DEVNULL, start_new_session=True)


def hold_port() -> socket.socket:
    """A socket at a free port of this machine: until it is closed rank 0 can listen there, and nobody else is given it."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def read_environment() -> Launch:
    """Find rank and world size; set MASTER_ADDR and MASTER_PORT under srun. RANK, where set (torchrun), wins.

    Raises:
        UserError: a variable that says so is missing, or says what cannot be.
    """
    env = os.environ
    if "RANK" in env:
        world = _number("WORLD_SIZE", beside="RANK")
        rank, local_world = _number("RANK"), _number("LOCAL_WORLD_SIZE", default=world)
        launch = Launch(rank, world, _number("LOCAL_RANK", default=0), local_world)
    # a shell inside an allocation (salloc) has SLURM_NTASKS as well, but is no task of a step
    elif "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and _number("SLURM_NTASKS", default=1) > 1:
        world = _number("SLURM_NTASKS")
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")  # a step may have some of the job's alone
        if nodes:
            env.setdefault("MASTER_ADDR", _first_host(nodes))
        port = 20000 + (_number("SLURM_JOB_ID", beside="SLURM_STEP_ID") + _number("SLURM_STEP_ID")) % 20000
        env.setdefault("MASTER_PORT", str(port))
        per_node = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_NTASKS_PER_NODE", str(world)))
        local_rank = _number("SLURM_LOCALID", beside="SLURM_PROCID")
        launch = Launch(_number("SLURM_PROCID"), world, local_rank, int(re.split("[(,]", per_node)[0]))
    else:
        return Launch(0, 1, 0, 1)
    if launch.rank >= launch.world:
        raise UserError(
            f"this is rank {launch.rank} of {launch.world} by the environment, where ranks are counted from 0: start it "
            "with torchrun or srun, or unset RANK and WORLD_SIZE"
        )
    return launch


def _number(name: str, default: int | None = None, beside: str = "") -> int:
    """What an environment variable says, a whole number from 0; ``default`` where it is not set."""
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise UserError(f"{beside} is set in the environment and {name} is not: start it with torchrun or srun, or unset it")
    if not value.strip().isdecimal():
        raise UserError(f"{name} is '{value}' in the environment, where a whole number is expected")
    return int(value)


def _first_host(nodelist: str) -> str:
    """The first of Slurm's list of nodes, as ``rack[1-2]n[08-12,20],login``; by hand, for a container has no scontrol."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])*", nodelist)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else "")


def reach_store(launch: Launch, patience_s: float) -> dist.Store:
    """The job's key-value store, which is in rank 0's process, or in torchrun's.

    Where it cannot be reached for ``patience_s`` seconds, this process ends: torch's own call may wait for ever, as when
    something else listens on the port, and says with pages of C++ frames that it has given up.

    Raises:
        UserError: rank 0 cannot open it, or nothing says where it is.
    """
    if launch.world == 1:
        return dist.HashStore()
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        place = f"this is rank {launch.rank} of {launch.world}"
        raise UserError(f"{place}, but {missing[0]} is not set: start it with torchrun or srun, or set it")
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT is {port} in the environment; ports are from 1 to 65535")
    opens = launch.rank == 0 and not torchrun_holds_store()
    longer = timedelta(seconds=2 * LONGEST_COLLECTIVE_S)
    give_up = threading.Timer(patience_s, _end_unreachable, [launch, patience_s])
    give_up.daemon = True
    give_up.start()
    try:
        store = dist.TCPStore(host, port, launch.world, opens, longer, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        if not opens:
            raise UserError(_unreachable(launch)) from error
        raise UserError(
            f"rank 0 cannot listen on port {port} of {socket.gethostname()}, which another program may use: set another "
            "MASTER_PORT"
        ) from error
    finally:
        give_up.cancel()
    # torchrun's store outlives the processes that it starts anew
    return dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _unreachable(launch: Launch) -> str:
    return (
        f"rank {launch.rank} of {launch.world} cannot reach {store_holder()}, port {os.environ['MASTER_PORT']}: it died at "
        "start-up, or was never started; its own log may say why"
    )


def _end_unreachable(launch: Launch, patience_s: float) -> NoReturn:
    complain(f"waited for {patience_s:g} s: {_unreachable(launch)}")
    leave(1)


def watch(launch: Launch, store: dist.Store) -> Watchdog:
    """Raises UserError: the store was lost meanwhile."""
    try:
        return Watchdog(store, launch.rank, launch.world)
    except (RuntimeError, OSError) as error:
        raise UserError(_unreachable(launch)) from error


def join(launch: Launch, store: dist.Store) -> None:
    """Initialise the default process group (NCCL on GPUs, gloo on CPU) and share the cores between local ranks."""
    device = launch.device
    if "OMP_NUM_THREADS" not in os.environ or device.type == "cpu":
        torch.set_num_threads(max(1, own_cores() // launch.local_world))
    backend, own = "gloo", None
    if device.type == "cuda":
        # blocks of every size come and go with the routing: what is left between them is used as one
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its name before torch 2.9
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
        backend, own = "nccl", device  # connected now, not in the middle of the first step
    wait = timedelta(seconds=LONGEST_COLLECTIVE_S)
    store.set_timeout(wait)
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world, timeout=wait, device_id=own)


FAILURES = "accessory/failures"
"""Key of the job's store: how many ranks have failed."""


def first_on_each_node(body: Callable[[], T], launch: Launch) -> T:
    """Run ``body``, which leaves something on the disk for others to find, on one rank of each node before the others.

    However long it takes: those who wait look into the job's key-value store, they are in no collective that times out.
    """
    if launch.world == 1:
        return body()
    store = dist.distributed_c10d._get_default_store()
    key = f"accessory/first/{socket.gethostname()}/{launch.rank - launch.local_rank}"
    if launch.local_rank == 0:
        result = body()
        store.set(key, "done")
    else:
        while not store.check([key]):
            if store.add(FAILURES, 0):  # counted by the rank itself, which therefore is the one that speaks
                raise UserError("another rank failed")
            time.sleep(0.05)
        result = body()
    store.add("accessory/first", 1)
    while store.add("accessory/first", 0) < launch.world:  # another node may take longer
        time.sleep(0.05)
    return result


def run_job(body: Callable[[Launch], Any], start_timeout_s: float) -> NoReturn:
    """Run ``body`` as one rank of a job and end the process.

    A UserError is one sentence, anything else a traceback; of all ranks that fail, only the first to do so speaks. The
    watchdog ends those that do not notice, and speaks where a rank can not: it is gone, or waits for ever.

    Args:
        start_timeout_s: seconds until all ranks must have come, and then until they must have made their group.
    """
    launch = read_environment()
    code = told = 0  # told: to the other ranks
    store, watchdog = None, None
    try:
        end_stalls_after(start_timeout_s)
        store = reach_store(launch, start_timeout_s)
        if launch.world > 1:
            watchdog = watch(launch, store)
            watchdog.meet()
        join(launch, store)
        end_stalls_after(math.inf)  # until the body says otherwise
        body(launch)
    except Stopped as stop:
        code, told = stop.code, 0 if stop.everywhere else stop.code
        if _first_to_fail(store):
            print(f"accessory: {stop}", file=sys.stderr)
    except BaseException as error:
        code = told = 1
        if watchdog:
            watchdog.failing(error)
        if _first_to_fail(store):
            text = sentence(error) or _out_of_memory(error)
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError) and text:
                text += f" (while {doing()})"
            if text is None:
                traceback.print_exception(error)
            complain(text or f"rank {launch.rank} of {launch.world} failed: {type(error).__name__}; its traceback is above")
    for number in STOPS:  # torchrun sends one as soon as another rank has ended
        signal.signal(number, signal.SIG_IGN)
    if watchdog:
        watchdog.farewell(told)
    leave(code)


def _out_of_memory(error: BaseException) -> str | None:
    """The sentence for an error that says that there is no memory left; None: it is another one."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return (
            f"out of memory while {doing()}{memory_note()}: lower train.batch_size or data.max_seq_len, set "
            "parallel.recompute=block, or raise parallel.model_parallel or the number of processes"
        )
    return None


def _first_to_fail(store: dist.Store | None) -> bool:
    """Count failures in the job's own key-value store; if it cannot be reached, rather speak twice than not at all."""
    try:
        return store is None or store.add(FAILURES, 1) == 1
    except RuntimeError:
        return True


def leave(code: int) -> NoReturn:
    """End this process. Gloo's threads can abort a regular interpreter exit, so after cleaning up it is left at once."""
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    with suppress(OSError):  # nobody may read them any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
