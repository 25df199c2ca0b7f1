"""Runs jobs on several processes of this machine, each with a time limit, and leaves no process behind."""

import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from accessory.parallel.forkserver import end_with_parent, fork_server
from accessory.parallel.launch import own_cores

Job = TypeVar("Job")
Body = Callable[[Any, torch.device, Path], Any]
"""Does a job on one rank: (job, device, a directory shared by the job's ranks) -> a picklable result on the CPU."""

LIMIT_S = 300.0
START_S = 120.0


@dataclass(frozen=True)
class Failure:
    """Why there is no result: one line, and the last output of the rank that failed, if there is any."""

    reason: str
    log: str = field(default="", compare=False)


def run_jobs(
    world: int,
    device: str,
    body: Body,
    jobs: Sequence[Job],
    limit_s: float = LIMIT_S,
    imports: Sequence[str] = ("accessory.certify.run",),
) -> Iterator[tuple[Job, list[Any] | Failure]]:
    """Do each job on ``world`` ranks; yield it with the list of the ranks' results, or with a Failure.

    After a failure other ranks may hang, waiting for the failed one. So all are ended, and new ones do the remaining jobs.

    Args:
        device: "cpu" (gloo) or "cuda" (NCCL, one GPU for each rank).
        body: must be picklable; all ranks call it with the same jobs, each job in a process group of its own.
        limit_s: seconds for each job; the first job of a set of processes has ``START_S`` more.
        imports: modules to import before processes are forked, if these are the first that this program forks.
    """
    left = list(jobs)
    while left:
        with tempfile.TemporaryDirectory(prefix="accessory-certify-") as name:
            folder = Path(name)
            context = fork_server(*imports)
            ranks = [
                context.Process(target=_rank, args=(rank, world, device, body, left, folder), daemon=True)
                for rank in range(world)
            ]
            try:
                for process in ranks:
                    process.start()
                for number, job in enumerate(list(left)):
                    outcome = _wait(ranks, number, folder, limit_s if number else START_S + limit_s)
                    left.remove(job)
                    yield job, outcome
                    if isinstance(outcome, Failure):
                        break
            finally:
                for process in ranks:
                    if process.pid is not None:
                        process.kill()
                        process.join()


def _wait(ranks: Sequence[Any], number: int, folder: Path, limit_s: float) -> list[Any] | Failure:
    """The ranks' results of job ``number``."""
    paths = [folder / f"{number}-{rank}.result" for rank in range(len(ranks))]
    deadline = time.monotonic() + limit_s
    while not all(path.exists() for path in paths):
        # the death or error of one rank makes the collectives of others fail, so the first of several failures is the cause
        ended = [rank for rank, process in enumerate(ranks) if process.exitcode is not None and not paths[rank].exists()]
        if dead := [rank for rank in ended if not (folder / f"{rank}.error").exists()]:
            log = (folder / f"{dead[0]}.log").read_text(errors="replace").strip()
            last = log.rpartition("\n")[2]
            return Failure(f"rank {dead[0]} died with exit code {ranks[dead[0]].exitcode}: {last}".removesuffix(": "), log)
        if errors := sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns):
            return Failure(errors[0].read_text(), errors[0].with_suffix(".log").read_text(errors="replace"))
        if time.monotonic() > deadline:
            late = [str(rank) for rank, path in enumerate(paths) if not path.exists()]
            return Failure(f"no result of rank {', '.join(late)} within {limit_s:.0f} s")
        time.sleep(0.01)
    results = [torch.load(path, weights_only=False) for path in paths]  # this program's own ranks wrote them
    for path in paths:
        path.unlink()
    return results


def _rank(rank: int, world: int, device: str, body: Body, jobs: Sequence[Any], folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=end_with_parent, daemon=True).start()
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    tqdm.set_lock(threading.RLock())  # tqdm's own is an interprocess semaphore, which a killed process would leak
    torch.set_num_threads(max(1, own_cores() // (world + 1)))  # the parent computes, too
    place = torch.device("cpu")
    if device == "cuda":
        place = torch.device("cuda", rank)
        torch.cuda.set_device(place)
    for number, job in enumerate(jobs):
        scratch = folder / str(number)
        scratch.mkdir(exist_ok=True)
        try:
            store = dist.FileStore(str(folder / f"{number}.store"), world)
            dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=rank, world_size=world)
            result = body(job, place, scratch)
            dist.barrier()
            dist.destroy_process_group()
        except BaseException as error:
            traceback.print_exc()
            sys.stderr.flush()
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"rank {rank}: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            (folder / f"{rank}.part").write_text(reason)
            (folder / f"{rank}.part").rename(folder / f"{rank}.error")
            os._exit(1)
        torch.save(result, folder / f"{rank}.part")
        (folder / f"{rank}.part").rename(folder / f"{number}-{rank}.result")
    os._exit(0)  # gloo's threads can abort a regular interpreter exit
