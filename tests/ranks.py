"""Run a function as several real processes that talk over gloo, with a time limit, and leave none behind."""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from accessory.parallel.forkserver import fork_server


def server():
    """Processes forked from it have imported what tests and the program need; once for each process of pytest."""
    return fork_server(
        "accessory.cli",  # first, as in the command: it tells torch what to log
        "pytest",
        "matplotlib.pyplot",
        "transformers.models.mixtral.modeling_mixtral",
        "peft",
        "accessory.train.loop",
        "accessory.train.report",
        "accessory.certify.run",
    )


def run_ranks(world: int, body: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``body(*args)`` on ``world`` ranks of one gloo group; return what each returned, in rank order.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or the time ran out.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            server().Process(target=_rank, args=(rank, world, folder, body, args), daemon=True) for rank in range(world)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            while any(p.is_alive() for p in ranks):
                errors = sorted(Path(folder).glob("error*"))
                assert not errors, errors[0].read_text()
                assert time.monotonic() < deadline, f"{world} ranks did not end within {timeout} s"
                time.sleep(0.02)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        errors = sorted(Path(folder).glob("error*"))
        assert not errors, errors[0].read_text()
        assert all(p.exitcode == 0 for p in ranks), f"exit codes {[p.exitcode for p in ranks]}"
        return [torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
        torch.save(body(*args), Path(folder, f"result{rank}"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error{rank}.part").write_text(traceback.format_exc())
        Path(folder, f"error{rank}.part").rename(Path(folder, f"error{rank}"))
    os._exit(0)  # gloo's threads can abort a regular interpreter exit
